"""The demo's plan on a tiny model: killed twice, gone on with, and then done."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from owl_deploy.bench import machine, read_result
from owl_deploy.demo import CALIBRATION, EVALUATION, MODEL, Plan, Variant, rows, tasks
from owl_deploy.manifest import measurement
from owl_deploy.pipeline import execute, survey
from owl_deploy.recipe import PruneSettings
from tests import tiny

FP32, INT8 = ("onnxruntime", "fp32"), ("onnxruntime", "int8")
PLAN = Plan(
    (
        Variant("dense", "dense", (FP32, INT8)),
        Variant("owl-50", "OWL 50 %", (FP32,), PruneSettings(sparsity=0.5)),
    ),
    samples=4,
    length=64,
    windows=1,
    pairs=1,
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tiny.write_llama(tmp_path / "input" / MODEL, max_position_embeddings=2048)
    for name in (CALIBRATION, EVALUATION):
        (tmp_path / "input" / name).write_text(tiny.text(20000))
    return tmp_path / "input"


def killed_at(reached: Path, source: Path, output: Path) -> None:
    """Run the plan in a process, and kill that as soon as `reached` is there."""
    code = (
        "import sys, pathlib\n"
        "from tests.integration.test_killed_plan import PLAN, execute, tasks\n"
        "execute(tasks(PLAN, *map(pathlib.Path, sys.argv[1:])), print)"
    )
    command = [sys.executable, "-c", code, str(source), str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 300
        while not reached.exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()


def test_the_demo_goes_on_where_it_was_killed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 30.0)
    output = tmp_path / "out"
    plan = tasks(PLAN, source, output)
    killed_at(output / "checkpoints" / ".owl-50.owl-partial" / "run.json", source, output)
    assert set(survey(plan)) == {"to do"}
    killed_at(output / "deployments" / ".dense-onnxruntime-int8.owl-lock", source, output)
    states = survey(plan)
    assert states == ["done"] * 4 + ["to do"] * 6
    said: list[str] = []
    execute(plan, said.append)
    assert said == [task.title for task in plan[4:]]
    assert set(survey(plan)) == {"done"}
    assert [path for path in output.rglob(".*") if "owl" in path.name] == []
    dense, sparse = (measurement(task.output, "perplexity") for task in (plan[1], plan[6]))
    assert dense is not None
    assert sparse is not None
    known = json.loads((output / "checkpoints" / "dense.perplexity.json").read_text())
    assert dense == known | {"engine": "torch"}
    table = rows(read_result(output / "bench"), PLAN)
    assert sorted(row["perplexity"] for row in table)[0] > 1
    assert {row["model"]: row["sparsity"] for row in table} == {"dense": 0.0, "OWL 50 %": 0.5}
    os.utime(source / CALIBRATION)  # touched, and the same
    assert set(survey(plan)) == {"done"}
    (source / EVALUATION).write_text(tiny.text(10000))
    assert survey(plan)[:4] == ["done", "done", "outdated", "outdated"]
