"""The plans of demo and showcase on a tiny model: killed twice, gone on with, and then done."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from owl_deploy import showcase
from owl_deploy.bench import machine, read_result
from owl_deploy.bench.decision import refreshed
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.demo import CALIBRATION, EVALUATION, MODEL, Plan, Variant, conclude, rows, tasks
from owl_deploy.distributed.pipeline import RunTasks, Task, execute, survey
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.models.measurements import measurement
from tests import fresh, tiny

FP32, INT8 = ("onnxruntime", "fp32"), ("onnxruntime", "int8")
PLAN = Plan(
    (
        Variant("dense", "dense", (FP32, INT8)),
        Variant("owl-50", "OWL 50 %", (FP32,), PruneSettings(allocation="owl", sparsity=0.5)),
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


def carry_out(reached: Path, tasks_of: Callable[..., tuple[Task, ...]], *arguments: object) -> None:
    """Execute a plan's tasks, and be killed once `reached` is there: the work of a process."""
    fresh.signalled_at(reached, signal.SIGKILL)
    execute(tasks_of(*arguments), print)


def killed_at(reached: Path, tasks_of: Callable[..., tuple[Task, ...]], *arguments: object) -> None:
    """Run the plan in a process that is killed as soon as `reached` is there."""
    done = fresh.ran(carry_out, reached, tasks_of, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_the_demo_goes_on_where_it_was_killed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 30.0)
    output = tmp_path / "out"
    plan = tasks(PLAN, source, output)
    asked = (tasks, PLAN, source, output)
    killed_at(output / "checkpoints" / ".owl-50.owl-partial" / "run.json", *asked)
    assert set(survey(plan)) == {"to do"}
    killed_at(output / "deployments" / ".dense-onnxruntime-int8.owl-lock", *asked)
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


TINY = showcase.Plan(
    roads={
        "dense": (INT8, ("owl", "int8")),
        "dense-rounded": (),
        "dense-budget": (("owl", "int4"),),
        "sparse": (("owl", "int8"),),
        "rounded": (("owl", "int4"),),
        "recovered": (("owl", "int8"),),
        "sister": (("owl", "int4"),),
    },
    pruning=showcase.SHOWCASE.pruning,
    rounding=showcase.SHOWCASE.rounding,
    choosing=PruneSettings(method="none", budget="3.9"),
    recovery=FinetuneSettings(
        method="masked", max_steps=3, max_minutes=1, sequence_length=64, block_group=1
    ),
    samples=4,
    length=64,
    window=512,
    windows=1,
    every=80,
    scenarios=("decode@64", "decode@64x2", "prefill@32"),
    pairs=1,
)


def made(plan: showcase.Plan, source: Path, output: Path) -> tuple[Task, ...]:
    """The showcase's tasks, whose sister lies beside its model."""
    return showcase.tasks(plan, source, source, output)


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")
def test_the_showcase_goes_on_where_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
    source, output = tmp_path / "input", tmp_path / "out"
    shape = {"max_position_embeddings": 2048, "hidden_size": 128}
    for name in (showcase.MODEL, showcase.SISTER):
        tiny.write_llama(source / name, **shape)
    for name in (CALIBRATION, EVALUATION):
        (source / name).write_text(tiny.text(20000))
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 30.0)
    plan, asked = made(TINY, source, output), (made, TINY, source, output)
    training = output / "checkpoints" / ".recovered-50.owl-partial" / "group-0.json"
    killed_at(training, *asked)
    assert survey(plan)[:5] == ["done", "done", "done", "done", "to do"]
    answering = output / "deployments" / "sparse-owl-int8" / "measured" / "perplexity.json"
    killed_at(answering, *asked)
    trained = read_manifest(plan[4].output, CheckpointManifest)
    assert trained is not None
    assert trained.to_json()["finetune"]["resumed"]
    said: list[str] = []
    execute(plan, said.append)
    # Perplexity's receipt, HumanEval, three more models', the drafts, the bench.
    assert len(said) in (9, 10)
    assert set(survey(plan)) == {"done"}
    result, drafts = refreshed(read_result(output / "bench")), read_result(output / "drafts")
    shown_with = partial(showcase.show, drafts=[drafts])
    conclude([result, drafts], showcase.rows(result), output, shown_with)
    shown = capsys.readouterr().out
    gains = re.findall(r"^dense-owl-int8 with .*: .* as fast, with the same answers; ", shown, re.M)
    assert len(gains) == 1
    assert max(map(len, shown.partition(gains[0])[0].splitlines()[1:])) <= 80
    assert {row["problems"] for row in showcase.rows(result)} == {3}
    showcase.show_steps(plan, output)
    took = json.loads((output / "steps.json").read_text())
    assert list(took) == [task.title for task in plan]
    assert all(time > 0 for title, time in took.items() if not title.startswith("Perplexity"))
    assert "<figure>" in (output / "report.html").read_text()
    # Other problems are asked anew, and nothing else is done again.
    others = made(replace(TINY, every=60), source, output)
    states = dict(zip((type(task) for task in others), survey(others), strict=True))
    assert states[RunTasks] == "outdated"
    assert {state for kind, state in states.items() if kind is not RunTasks} == {"done"}
