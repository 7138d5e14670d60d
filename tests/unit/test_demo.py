"""The demo's plan, as it is; the whole demo runs as `make demo`."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from owl_deploy import demo, showcase
from owl_deploy.demo import FIRST_LOOK, FULL, tasks
from owl_deploy.distributed.pipeline import Bench, Evaluate, Export, Prune, needs
from owl_deploy.errors import BadInput, EngineFailed
from tests.unit.bench.made import result


def test_the_first_look_is_a_part_of_the_full_demo():
    full = {variant.name: variant for variant in FULL.variants}
    for variant in FIRST_LOOK.variants:
        assert variant.settings == full[variant.name].settings
        assert set(variant.roads) <= set(full[variant.name].roads)
    assert FIRST_LOOK.windows < FULL.windows


@pytest.mark.parametrize("plan", [FIRST_LOOK, FULL], ids=["first look", "full"])
@pytest.mark.parametrize("has_owl", [True, False])
def test_every_deployment_is_made_evaluated_and_benched_once(plan, has_owl):
    made = tasks(plan, Path("input"), Path("out"), has_owl=has_owl)
    assert len({task.output for task in made}) == len(made)
    roads = [
        f"{variant.name}-{target}-{precision}"
        for variant in plan.variants
        for target, precision in variant.roads
        if has_owl or target != "owl"
    ]
    exports = [task for task in made if isinstance(task, Export)]
    assert [task.output.name for task in exports] == roads
    bench = made[-1]
    assert isinstance(bench, Bench)
    benched = (*bench.plan.candidates, *bench.plan.baselines)
    assert sorted(path.name for path in benched) == sorted(roads)
    assert all(path.name.startswith("dense") for path in bench.plan.baselines)
    before = needs(made)
    # The benchmark shows each deployment's perplexity, which is to be there first.
    assert len(before[-1]) == 2 * len(roads)
    for task, numbers in zip(made, before, strict=True):
        expected = {Prune: 0, Export: int("dense" not in task.output.name)}.get(type(task))
        assert expected is None or len(numbers) == expected
    for task in made:
        if isinstance(task, Evaluate):
            assert (task.known is not None) == task.model.name.endswith("-fp32")


def test_an_engine_that_failed_is_said_after_the_table(tmp_path, monkeypatch):
    made = result()
    failed = made.subjects[0].model_copy(update={"failure": "it aborted", "samples": ()})
    shown = []
    monkeypatch.setattr(demo, "write_report", lambda results, file, **_: file.touch())
    with pytest.raises(EngineFailed, match="it aborted") as raised:
        demo.conclude(
            [made.model_copy(update={"subjects": (failed, *made.subjects[1:])})],
            [],
            tmp_path,
            lambda *of: shown.append(of),
        )
    assert raised.value.exit_code == 4
    assert len(shown) == 1
    assert (tmp_path / "table.json").is_file()


@pytest.mark.parametrize("main", [demo.main, showcase.main])
@pytest.mark.parametrize("wrong", ["", "file"])
def test_an_output_that_cannot_be_is_said_before_anything_is_fetched(
    main, wrong, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    for module in (demo, showcase):
        monkeypatch.setattr(module, "prepare", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(showcase, "_check_code", lambda _: None)
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(main)
    told = CliRunner().invoke(app, ["-o", wrong])
    assert isinstance(told.exception, BadInput) or told.exit_code == 2, told.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
