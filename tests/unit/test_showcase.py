"""The showcase's plan and its table; the whole of it runs for hours as `make showcase`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from owl_deploy import showcase
from owl_deploy.bench.result import Comparison
from owl_deploy.distributed.pipeline import (
    Bench,
    Evaluate,
    Export,
    Finetune,
    Prune,
    RunTasks,
    Task,
    needs,
)
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.export.targets import TARGETS
from tests.unit.bench import made


def planned(plan: showcase.Plan = showcase.SHOWCASE) -> tuple[Task, ...]:
    return showcase.tasks(plan, Path("input"), Path("sister"), Path("out"))


def test_every_deployment_is_judged_before_it_is_benched() -> None:
    plan = planned(replace(showcase.SHOWCASE, every=4, limit=3))
    kinds = [type(task) for task in plan]
    count = sum(map(len, showcase.SHOWCASE.roads.values()))
    numbers = [kinds.count(kind) for kind in (Prune, Finetune, Export, Evaluate, RunTasks, Bench)]
    assert numbers == [5, 1, count, count, count, 2]
    assert len({task.output for task in plan}) == len(plan)
    before = needs(plan)
    bench = plan[-1]
    assert isinstance(bench, Bench)
    # Each deployment and its perplexity, which the benchmark shows.
    assert len(before[-1]) == 2 * count
    assert all(path.name.startswith("dense") for path in bench.plan.baselines)
    for task, numbers in zip(plan, before, strict=True):
        if isinstance(task, RunTasks):
            assert (task.every, task.limit, task.allow_code) == (4, 3, True)
            assert [plan[number].output for number in numbers] == [task.model]


def test_the_owl_engine_is_there_in_every_precision() -> None:
    exported = {task.output.name for task in planned() if isinstance(task, Export)}
    for model in ("dense", "sparse"):
        for precision in TARGETS["owl"].precisions.keys() - {"int3"}:
            rounded = model == "sparse" and precision == "int4"  # to nearest is not how one rounds
            assert f"{'rounded' if rounded else model}-owl-{precision}" in exported
    assert {"dense-rounded-owl-int4", "dense-budget-owl-int4", "recovered-owl-int8"} <= exported
    assert not any(name.endswith("-int3") for name in exported)


@pytest.mark.parametrize(
    ("skipped", "gone", "tasks_gone"),
    [
        (["llama.cpp"], {"dense-llama.cpp-Q8_0"}, set()),
        (["recovered"], {"recovered-owl-int8"}, {Finetune}),
        (["sparse"], {"sparse-owl-int8"}, set()),
        (
            ["sparse", "*rounded", "dense-budget", "recovered", "sister"],
            {"sparse-owl-int8", "rounded-owl-int4", "recovered-owl-int8", "sister-owl-int4"},
            {Prune, Finetune},
        ),
        (["*-fp32"], {"dense-owl-fp32", "sparse-owl-fp32"}, set()),
        (["dense-owl-bf16"], {"dense-owl-bf16"}, set()),
    ],
)
def test_what_is_skipped_is_not_made(
    skipped: list[str], gone: set[str], tasks_gone: set[type]
) -> None:
    whole, plan = planned(), planned(showcase.SHOWCASE.without(skipped))
    assert {type(task) for task in whole} - {type(task) for task in plan} == tasks_gone
    left = {task.output.name for task in plan if isinstance(task, Export)}
    assert gone.isdisjoint(left)
    assert gone <= {task.output.name for task in whole}
    bench = plan[-1]
    assert isinstance(bench, Bench)
    assert {path.name for path in (*bench.plan.candidates, *bench.plan.baselines)} == left


def test_the_sister_drafts_for_the_dense_model() -> None:
    [*_, drafts, bench] = planned()
    assert isinstance(drafts, Bench)
    assert isinstance(bench, Bench)
    names = [path.name for path in drafts.plan.candidates]
    assert names == ["dense-owl-int8", "dense-owl-int4"]
    assert Path(drafts.plan.draft or "").name == "sister-owl-int4"
    assert Path(drafts.plan.draft or "") in drafts.reads()
    assert drafts.plan.described()
    without = planned(showcase.SHOWCASE.without(["sister"]))
    assert sum(isinstance(task, Bench) for task in without) == 1
    without = planned(showcase.SHOWCASE.without(["dense-owl-int*"]))
    assert sum(isinstance(task, Bench) for task in without) == 1


@pytest.mark.parametrize(
    ("skipped", "words"),
    [(["lama.cpp"], "names nothing in the showcase"), (["*"], "leaves nothing")],
)
def test_what_cannot_be_skipped_is_told(skipped: list[str], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        showcase.SHOWCASE.without(skipped)


def test_an_engine_that_cannot_be_had_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no compiler there
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    plan = showcase.SHOWCASE.without(["owl", "onnxruntime"])
    with pytest.raises(EnvironmentFailed, match=r"no C compiler.*--skip llama\.cpp\."):
        showcase.prepare(plan, print)


def test_the_table_has_quality_beside_speed(capsys: pytest.CaptureFixture[str]) -> None:
    result = made.with_code(40)
    table = showcase.rows(result)
    assert [row["pass_at_1"] for row in table] == [0.1, 0.1, 0.6, 0.8, 0.8, 0.7, 0.5]
    assert {row["problems"] for row in table} == {40}
    assert table[1]["speedup"].startswith("1.4")  # over dense in the same engine
    showcase.show(result, table, 0.02)
    shown = capsys.readouterr().out
    assert shown.startswith("Deploy dense-")
    assert "70.0 ± 7.3" in shown
    assert max(map(len, shown.splitlines()[1:])) <= 80


def test_a_draft_gains_over_the_same_model_without_it() -> None:
    result = made.result()
    first, dense, other = result.subjects[0], result.subjects[3], result.subjects[5]
    tally = {"share_accepted": 0.5, "tokens_per_step": 2.0}
    drafted = first.model_copy(
        update={
            **{"name": "dense with sister", "path": dense.path, "draft": "sister"},
            "samples": tuple(one.model_copy(update={"draft": tally}) for one in first.samples),
        }
    )
    row = {"scenario": "decode@512", "candidate": drafted.name, "against": ("best of all",)}
    row |= {"low": 1.0, "high": 3.0, "pairs": 8, "verdict": "faster", "text": ""}
    compared = [
        Comparison.model_validate({**row, "baseline": one.name, "ratio": ratio})
        for one, ratio in ((dense, 2.0), (other, 1.4))
    ]
    update = {"subjects": (drafted, dense, other), "comparisons": tuple(compared)}
    (said,) = showcase._gains(result.model_copy(update=update))
    assert said.startswith("dense with sister: 2.00x (1.00-3.00) as fast")
    update["comparisons"] = ()
    assert [*showcase._gains(result.model_copy(update=update))] == []


def test_programs_run_only_where_that_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="--allow-code"):
        showcase.main(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"pairs": 0}, "--pairs 0 is too small"),
        ({"limit": 0}, "--limit must be at least 1"),
    ],
)
def test_wrong_numbers_are_said_before_hours_of_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any], complaint: str
) -> None:
    monkeypatch.setattr(showcase, "_check_code", lambda _: None)
    monkeypatch.setattr(showcase, "prepare", lambda *_: pytest.fail("too late"))
    with pytest.raises(BadInput, match=complaint):
        showcase.main(tmp_path / "out", allow_code=True, **asked)
