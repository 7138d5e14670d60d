"""The GitHub action and the workflow: what they ask for exists, and the script keeps its word."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from owl_deploy.cli import app
from owl_deploy.models import digests

Fake = Callable[..., Path]
ACTION: dict[str, Any] = yaml.safe_load(Path("action.yml").read_text())
WORKFLOW: dict[str, Any] = yaml.safe_load(Path(".github/workflows/owl-bench.yml").read_text())
GATE: dict[str, Any] = next(step for step in ACTION["runs"]["steps"] if step.get("id") == "gate")


def commands(script: str) -> list[list[str]]:
    """The words of each line that runs `owl`."""
    lines = script.replace("\\\n", " ").splitlines()
    return [line.split("#")[0].split() for line in lines if line.strip().startswith("owl ")]


def workflow_scripts() -> str:
    return "\n".join(step.get("run", "") for step in WORKFLOW["jobs"]["gate"]["steps"])


def test_every_option_in_the_scripts_exists() -> None:
    verbs = get_command(app).commands  # type: ignore[attr-defined]
    found = commands(GATE["run"]) + commands(workflow_scripts())
    assert len(found) >= 5
    for _, verb, *words in found:
        known = {option for parameter in verbs[verb].params for option in parameter.opts}
        assert {word for word in words if re.match(r"--?[a-z]", word)} <= known
    known = {option for parameter in verbs["bench"].params for option in parameter.opts}
    assert set(re.findall(r"\((--[a-z-]+) ", GATE["run"])) <= known


def test_inputs_are_used_and_those_used_exist() -> None:
    text = Path("action.yml").read_text()
    assert set(re.findall(r"inputs\.([a-z-]+)", text)) == set(ACTION["inputs"])
    (step,) = [s for s in WORKFLOW["jobs"]["gate"]["steps"] if s.get("uses") == "./"]
    required = {name for name, about in ACTION["inputs"].items() if about.get("required")}
    assert required <= set(step["with"]) <= set(ACTION["inputs"])
    for script in (GATE["run"], workflow_scripts()):
        assert "${{" not in script  # an expression in a script is code that anyone may send


@pytest.fixture
def gate(fake: Fake, tmp_path: Path) -> Callable[..., tuple[int, str, str, str]]:
    """Runs the action's script on fake deployments: code, verdict, summary and what was printed."""
    file = tmp_path / "baseline.json"
    # Beside so much, what a process takes more or less where memory is short is within the margin;
    # with noise 24 rounds are now and then too few to tell.
    now = fake("now", peak_bytes=200_000_000, noise=0.0)
    reference = fake("reference", noise=0.0)
    saving = ["bench", str(now), "-b", str(reference), "--save-baseline", str(file)]
    assert CliRunner().invoke(app, saving).exit_code == 0
    defaults = {name.upper().replace("-", "_"): about for name, about in ACTION["inputs"].items()}

    def run(**given: str) -> tuple[int, str, str, str]:
        inputs = {name: str(about.get("default", "")) for name, about in defaults.items()}
        inputs |= {"DEPLOYMENT": "now", "REFERENCE": "reference", "BASELINE": "baseline.json"}
        inputs |= {"GITHUB_OUTPUT": "outputs", "GITHUB_STEP_SUMMARY": "summary.md", **given}
        assert set(GATE["env"]) <= set(inputs)
        path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", GATE["run"]],
            cwd=tmp_path,
            env={**inputs, "PATH": path, "OWL_CACHE": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=False,
        )
        outputs = (tmp_path / "outputs").read_text().split("verdict=")[-1].strip()
        summary = (tmp_path / "summary.md").read_text()
        return done.returncode, outputs, summary, done.stdout + done.stderr

    return run


def test_the_script_passes_what_is_as_it_was_and_writes_the_report(
    gate: Callable[..., tuple[int, str, str, str]], tmp_path: Path
) -> None:
    code, verdict, summary, printed = gate()
    assert (code, verdict) == (0, "OK"), printed
    assert "## owl bench: OK" in summary
    assert (tmp_path / "owl-bench" / "report.html").read_text().startswith("<!doctype html>")


def test_the_script_fails_what_is_worse_and_what_cannot_be_compared(
    gate: Callable[..., tuple[int, str, str, str]], fake: Fake, tmp_path: Path
) -> None:
    code, verdict, summary, _ = gate(THREADS="1", SCENARIO="decode", ALLOW_INCONCLUSIVE="true")
    assert (code, verdict) == (3, "INCOMPARABLE")
    fake("now", logits_off=0.5)
    code, verdict, summary, _ = gate(ALLOW_INCONCLUSIVE="true")
    assert (code, verdict) == (1, "REGRESSED")
    (tmp_path / "baseline.json").write_text("{}")
    code, verdict, summary, _ = gate()
    assert (code, verdict) == (2, "")
    assert "## owl bench: no verdict" in summary
    assert "not a baseline file" in summary


def test_noise_is_a_warning_only_where_that_is_asked_for(
    gate: Callable[..., tuple[int, str, str, str]], tmp_path: Path
) -> None:
    file = tmp_path / "baseline.json"
    saved = json.loads(file.read_text())
    del saved["digest"]
    ratios = saved["side"]["ratios"]
    saved["side"]["ratios"] = {metric: [-1.0, 1.0] * 4 for metric in ratios}  # what noise would do
    file.write_text(json.dumps(saved | {"digest": digests.of_json(saved)}))
    for allow, wanted in (("true", 0), ("false", 3)):
        code, verdict, _, printed = gate(PAIRS="3", ALLOW_INCONCLUSIVE=allow)
        assert (code, verdict) == (wanted, "INCONCLUSIVE"), printed
        assert ("::warning" in printed) == (allow == "true")
