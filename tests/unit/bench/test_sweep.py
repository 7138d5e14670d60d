import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.artefact import MANIFEST
from owl_deploy.bench.dense import dense_baselines
from owl_deploy.bench.sweep import REPORT, Steps, SweepPlan, read_plan, sweep, trade_off
from owl_deploy.bench.table import show_trade_off
from owl_deploy.errors import BadInput
from owl_deploy.manifest import keep_measurement

pytestmark = pytest.mark.usefixtures("in_process")


class Made:
    """The other verbs, replaced: they note what was asked and leave fake deployments."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def steps(self) -> Steps:
        return Steps(
            validate=lambda settings: None,
            precision=self.precision,
            prune=self.prune,
            export=self.export,
            perplexity=self.perplexity,
            say=lambda text: None,
        )

    def precision(self, target: str, precision: str | None) -> str:
        if precision == "int2":
            raise BadInput(f"The target {target!r} has no precision 'int2'.")
        return precision or {"owl": "bf16"}.get(target, "fp32")

    def prune(self, output: Path, settings: dict[str, Any]) -> None:
        self.did.append(f"prune {output.name}")
        output.mkdir()
        (output / MANIFEST).write_text(json.dumps(settings))

    def export(self, checkpoint: Path, output: Path, target: str, precision: str) -> None:
        self.did.append(f"export {output.name}")
        output.mkdir()
        (output / MANIFEST).write_text(json.dumps({"target": "fake", "precision": precision}))
        speed = {"int8": 5, "int4": 4}.get(precision, 10 if "dense" in output.name else 7)
        (output / "fake.json").write_text(json.dumps({"decode_ms": speed, "prefill_ms": 50}))

    def perplexity(self, deployment: Path) -> None:
        self.did.append(f"perplexity {deployment.name}")
        manifest = json.loads((deployment / MANIFEST).read_text())
        value = 13.0 if "dense" in deployment.name else 20.0
        value += {"int8": 0.1, "int4": 4}.get(manifest["precision"], 0)
        keep_measurement(deployment, "perplexity", {"text": "t", "value": value})


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


PLAN = SweepPlan(sparsities=(0.5, 0.7), pairs=4, scenarios=("decode",))


def test_a_sweep_does_everything_once(checkpoint: Path, tmp_path: Path) -> None:
    made, output = Made(), tmp_path / "out"
    result = sweep(checkpoint, output, PLAN, made.steps())
    assert [did for did in made.did if did.startswith("prune")] == [
        "prune wanda-owl-50",
        "prune wanda-owl-70",
    ]
    assert len([did for did in made.did if did.startswith("export")]) == 2 + 3
    assert len([did for did in made.did if did.startswith("perplexity")]) == 5
    assert (output / REPORT).read_text().startswith("<!doctype html>")
    again = Made()
    assert sweep(checkpoint, output, PLAN, again.steps()) == result
    assert again.did == []
    wider = PLAN.model_copy(update={"sparsities": (0.5, 0.7, 0.9)})
    sweep(checkpoint, output, wider, again.steps())
    assert again.did == [
        "prune wanda-owl-90",
        "export wanda-owl-90-onnxruntime-fp32",
        "perplexity wanda-owl-90-onnxruntime-fp32",
    ]


def test_a_target_without_a_precision_has_its_own(checkpoint: Path, tmp_path: Path) -> None:
    made = Made()
    asked = {"targets": ("owl", "owl:bf16", "owl:int8"), "sparsities": (0.5,)}
    sweep(checkpoint, tmp_path / "out", PLAN.model_copy(update=asked), made.steps())
    exported = {did for did in made.did if did.startswith("export") and "owl-50" in did}
    assert exported == {"export wanda-owl-50-owl-bf16", "export wanda-owl-50-owl-int8"}
    assert {"export dense-owl-bf16", "export dense-owl-int8"} <= set(made.did)


def test_a_precision_that_cannot_be_is_refused_before_any_work(
    checkpoint: Path, tmp_path: Path
) -> None:
    made, wrong = Made(), PLAN.model_copy(update={"targets": ("onnxruntime", "owl:int2")})
    with pytest.raises(BadInput, match="'owl' has no precision 'int2'"):
        sweep(checkpoint, tmp_path / "out", wrong, made.steps())
    assert made.did == []
    assert not (tmp_path / "out").exists()


def test_a_sweep_goes_on_where_it_was_interrupted(checkpoint: Path, tmp_path: Path) -> None:
    made, output = Made(), tmp_path / "out"

    def stop(deployment: Path) -> None:
        raise KeyboardInterrupt

    broken = replace(made.steps(), perplexity=stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(checkpoint, output, PLAN, broken)
    before = len(made.did)
    sweep(checkpoint, output, PLAN, made.steps())
    assert all(did.startswith("perplexity") for did in made.did[before:])


def test_the_trade_off_marks_what_nothing_beats(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trade_off(sweep(checkpoint, tmp_path / "out", PLAN, Made().steps()))
    show_trade_off(rows, tmp_path / "report.html")
    printed = capsys.readouterr().out
    assert "* nothing is both faster and better." in printed
    assert {row["deployment"] for row in rows if row["pareto"]} == {
        "dense-onnxruntime-fp32",
        "dense-onnxruntime-int8",
        "dense-onnxruntime-int4",
    }
    assert [row["tokens_per_s"] for row in rows] == sorted(
        (row["tokens_per_s"] for row in rows), reverse=True
    )


def test_dense_baselines_are_made_once_for_a_checkpoint(checkpoint: Path) -> None:
    made = Made()
    mine = [("owl", "int8"), ("deepsparse", "fp32"), ("onnxruntime", "fp32"), ("owl", "int8")]
    first = dense_baselines(checkpoint, mine, made.export)
    assert [path.name for path in first] == [
        "dense-deepsparse-fp32",
        "dense-owl-int8",
        "dense-onnxruntime-fp32",
        "dense-onnxruntime-int8",
        "dense-onnxruntime-int4",
    ]
    assert dense_baselines(checkpoint, mine, made.export) == first
    assert len(made.did) == 5
    (checkpoint / "config.json").write_text('{"changed": 1}')
    assert dense_baselines(checkpoint, [], made.export)[0] != first[2]
    with pytest.raises(BadInput, match=r"no config\.json"):
        dense_baselines(checkpoint / "nothing", [], made.export)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsity: [0.5]", "'sparsity'"),
        ("sparsities: []", "^sparsities in"),
        ("sparsities: much", "^sparsities in"),
        ("- 1", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_plan_gets_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(text)
    with pytest.raises(BadInput, match=words):
        read_plan(file, {})


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text("sparsities: [0.5]\nmethods: [magnitude]\n")
    plan = read_plan(file, {"sparsities": (0.9,)})
    assert list(plan.prunings()) == ["magnitude-owl-90"]
    with pytest.raises(BadInput, match="cannot be read"):
        read_plan(tmp_path / "none.yaml", {})
    assert read_plan(None, {}) == SweepPlan()
