"""The showcase's plan and its table; the whole of it runs for hours as `make showcase`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owl_deploy import showcase
from owl_deploy.pipeline import Bench, Evaluate, Export, Prune, RunTasks, needs
from tests.unit.bench import made


def test_every_deployment_is_judged_before_it_is_benched() -> None:
    plan = showcase.tasks(Path("input"), Path("out"), limit=3)
    kinds = [type(task) for task in plan]
    count = len(showcase.DENSE) + len(showcase.SPARSE)
    assert [kinds.count(kind) for kind in (Prune, Export, Evaluate, RunTasks, Bench)] == [
        *(1, count, count, count, 1)
    ]
    assert len({task.output for task in plan}) == len(plan)
    before = needs(plan)
    bench = plan[-1]
    assert isinstance(bench, Bench)
    # Each deployment and its perplexity, which the benchmark shows.
    assert len(before[-1]) == 2 * count
    assert all(path.name.startswith("dense") for path in bench.plan.baselines)
    for task, numbers in zip(plan, before, strict=True):
        if isinstance(task, RunTasks):
            assert (task.limit, task.allow_code) == (3, True)
            assert [plan[number].output for number in numbers] == [task.model]


def test_the_table_has_quality_beside_speed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = made.result(pairs=4)
    subjects = []
    for number, subject in enumerate(result.subjects[:5]):
        folder = tmp_path / subject.name
        (folder / "measured").mkdir(parents=True)
        metrics = {"pass@1": {"value": number / 10, "stderr": 0.03}}
        judged = {"humaneval": {"metrics": metrics, "documents": 164}}
        (folder / "measured" / "tasks.json").write_text(json.dumps(judged))
        subjects.append(subject.model_copy(update={"path": str(folder)}))
    result = result.model_copy(update={"subjects": tuple(subjects)})
    table = showcase.rows(result)
    assert [row["pass_at_1"] for row in table] == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert {row["problems"] for row in table} == {164}
    assert table[1]["speedup"].startswith("1.4")  # over dense in the same engine
    showcase.show(result, table)
    shown = capsys.readouterr().out
    assert "40.0% ± 3.0%" in shown
    assert max(map(len, shown.splitlines()[: len(table) + 1])) <= 80


def test_programs_run_only_where_that_is_allowed(tmp_path: Path) -> None:
    app = showcase.typer.Typer()
    app.command()(showcase.main)
    answer = CliRunner().invoke(app, ["--output", str(tmp_path / "out")])
    assert answer.exit_code == 2
    assert "--allow-code" in answer.output
    assert not (tmp_path / "out").exists()
