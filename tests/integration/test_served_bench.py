"""`owl bench --scenario requests` with the real servers of the engines that this Python has."""

import json

import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.runtime import library_path

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

KEYS = [f"requests@40+8x2:{part}" for part in ("answer", "first", "text")]


@pytest.fixture(scope="module")
def deployments(llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deployments")
    for target in ("owl", "onnxruntime"):
        export(llama, folder / target, target=target)
    return folder


def test_both_servers_are_measured_and_reported(owl, deployments, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OWL_API_KEY", "of another server")
    bench = ("bench", deployments / "owl", "--baseline", deployments / "onnxruntime", "--pairs", 1)
    asked = ("--scenario", "requests", "--clients", 2, "--prompt", 40, "--new-tokens", 8)
    code, out, err = owl(*bench, *asked, "-t", 1, "-o", tmp_path / "result", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert list(result["statistics"]) == KEYS
    for subject in result["subjects"]:
        (sample,) = subject["samples"]
        assert len(sample["latencies_ms"][KEYS[0]]) == 1
        # A random model's tokens are often no whole character, of which no text comes.
        assert 0 < len(sample["latencies_ms"][KEYS[1]]) <= 10
        assert 0 < len(sample["latencies_ms"][KEYS[2]]) <= 10 * 7
        assert sample["peak_bytes"] > 10e6
        assert "2 requests at once" in subject["about"]["through"]
        row = result["statistics"][KEYS[0]][subject["name"]]
        assert row["requests_per_s"] * 8 == pytest.approx(row["tokens_per_s"])
    assert any("the servers' cores" in note for note in result["notes"])
    assert owl("report", tmp_path / "result", "-o", tmp_path / "report.html")[0] == 0
    assert "an answer of 8 tokens" in (tmp_path / "report.html").read_text()


def test_what_a_server_says_of_a_deployment_that_it_cannot_open(owl, deployments, llama, tmp_path):
    export(llama, tmp_path / "traced", target="deepsparse")
    asked = ("--scenario", "requests@40+8x2", "--pairs", 1)
    code, _, err = owl("bench", tmp_path / "traced", *asked)
    assert (code, "The engine 'deepsparse' has no server." in " ".join(err.split())) == (2, True)
    code, out, err = owl("bench", tmp_path / "traced", "-e", "onnxruntime", *asked)
    assert (code, out, "has no genai_config.json" in " ".join(err.split())) == (2, "", True)
