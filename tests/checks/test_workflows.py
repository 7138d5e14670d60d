"""What runs in CI: what it names exists here, and it may do no more than read."""

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

FILES = sorted(Path(".github/workflows").glob("*.yml"))
ACTIONS = sorted(Path(".github/actions").glob("*/action.yml"))
PROJECT: dict[str, Any] = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def read(path: Path) -> dict[Any, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def jobs(path: Path) -> dict[str, dict[str, Any]]:
    return dict(read(path)["jobs"])


def steps(path: Path) -> list[dict[str, Any]]:
    """Those of a workflow's jobs, or of an action."""
    content = read(path)
    if "runs" in content:
        return list(content["runs"]["steps"])
    return [step for job in content["jobs"].values() for step in job["steps"]]


def scripts(path: Path) -> list[str]:
    return [step["run"] for step in steps(path) if "run" in step]


def test_the_workflows_are_those():
    assert [path.stem for path in FILES] == ["ci", "owl-bench", "weekly", "wheels"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_workflow_only_reads_and_comes_to_an_end(path):
    content = read(path)
    assert content["permissions"] == {"contents": "read"}
    assert content[True]  # what YAML makes of `on`
    for job in jobs(path).values():
        assert "permissions" not in job
        assert job["runs-on"] == "ubuntu-24.04"
        assert 0 < job["timeout-minutes"] <= 120


@pytest.mark.parametrize("path", [*FILES, *ACTIONS], ids=str)
def test_steps_use_what_is_there_at_a_version(path):
    for step in steps(path):
        assert ("run" in step) != ("uses" in step)
        name = step.get("uses", "./")
        if name.startswith("./"):
            action = Path(name) / "action.yml"
            known = read(action)["inputs"]
            assert set(step.get("with", {})) <= set(known)
        else:
            assert re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40}", name), name  # a tag may be moved


@pytest.mark.parametrize("path", [*FILES, *ACTIONS], ids=str)
def test_scripts_are_bash_without_expressions(path):
    for script in scripts(path):
        assert "${{" not in script  # an expression in a script is code that anyone may send
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_make_has_the_targets_that_are_asked_for(path):
    phony = re.search(r"^\.PHONY: (.*)$", Path("Makefile").read_text(), re.MULTILINE)
    assert phony
    asked = re.findall(r"(?:^|&& )make ([a-z ]+)", "\n".join(scripts(path)), re.MULTILINE)
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs(path).values()]
    wanted = {name for line in asked for name in line.split()}
    wanted |= {name for matrix in matrices for name in matrix.get("target", ())}
    assert wanted <= set(phony[1].split())
    if path.stem == "weekly":
        assert wanted == {"sanitize", "vnni", "arm"}
    if path.stem == "ci":
        assert {"check", "test"} <= wanted


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_job_installs_torch_for_a_gpu(path):
    """PyPI's has gigabytes of libraries that no runner has a use for."""
    for job in jobs(path).values():
        said = "\n".join(step.get("run", "") for step in job["steps"])
        if re.search(r"^python -m pip install .*\.\[|^make ", said, re.MULTILINE):
            variables = read(path).get("env", {}) | job.get("env", {})
            assert variables["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu")


def test_ci_runs_every_python_that_we_promise():
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(PROJECT["classifiers"]))
    assert jobs(Path(".github/workflows/ci.yml"))["test"]["strategy"]["matrix"] == {
        "python": promised
    }


def test_the_citation_is_of_this_version():
    citation = read(Path("CITATION.cff"))
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert all(one["url"].startswith("https://arxiv.org/abs/") for one in citation["references"])
