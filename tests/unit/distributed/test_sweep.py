from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.show import show_trade_off
from owl_deploy.distributed.pipeline import Bench, attempt, needs
from owl_deploy.distributed.sweep import (
    SweepPlan,
    check_here,
    read_plan,
    run,
    tasks,
    trade_off,
    without,
)
from owl_deploy.errors import BadInput, EnvironmentFailed
from tests.unit.bench import made

PLAN = SweepPlan(allocations=("owl",), sparsities=(0.5, 0.7), pairs=4, scenarios=("decode",))
TEXTS = ("wikitext", "c4")  # to prune by, and to evaluate on


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def planned(checkpoint: Path, plan: SweepPlan) -> list[str]:
    return [task.title for task in tasks(checkpoint, checkpoint.parent / "out", plan, *TEXTS)]


def test_every_combination_is_made_evaluated_and_benched(checkpoint: Path) -> None:
    dense = [f"dense-onnxruntime-{precision}" for precision in ("fp32", "int8", "int4")]
    mine = ["wanda-owl-50-onnxruntime-fp32", "wanda-owl-70-onnxruntime-fp32"]
    assert planned(checkpoint, PLAN) == [
        *("Pruning wanda-owl-50", f"Exporting {mine[0]}"),
        *("Pruning wanda-owl-70", f"Exporting {mine[1]}"),
        *(f"Exporting {name}" for name in dense),
        *(f"Perplexity of {name}" for name in (*mine, *dense)),
        "Benchmarking 5 deployments",
    ]
    before = needs(tasks(checkpoint, checkpoint.parent / "out", PLAN, *TEXTS))
    assert before[:7] == [[], [0], [], [2], [], [], []]
    assert before[7:12] == [[1], [3], [4], [5], [6]]
    assert before[12] == [1, *range(3, 12)]  # each deployment and each perplexity


def test_a_wider_sweep_plans_the_same_and_more(checkpoint: Path) -> None:
    wider = PLAN.model_copy(update={"sparsities": (0.5, 0.7, 0.9)})
    output = checkpoint.parent / "out"
    narrow, wide = (tasks(checkpoint, output, plan, *TEXTS) for plan in (PLAN, wider))
    assert set(narrow[:-1]) < set(wide)
    assert narrow[-1].output != wide[-1].output  # another benchmark


def test_what_is_lost_is_benchmarked_without(checkpoint: Path) -> None:
    output = checkpoint.parent / "out"
    whole = tasks(checkpoint, output, PLAN, *TEXTS)

    def rest(*lost: int) -> tuple[list[str], list[str]]:
        kept = without(whole, lost, output)
        assert kept is not None
        bench = kept[-1]
        assert isinstance(bench, Bench)
        folders = (*bench.plan.candidates, *bench.plan.baselines)
        return [task.title for task in kept], [folder.name for folder in folders]

    titles = [task.title for task in whole]
    mine = ["wanda-owl-50-onnxruntime-fp32", "wanda-owl-70-onnxruntime-fp32"]
    dense = [f"dense-onnxruntime-{precision}" for precision in ("fp32", "int8", "int4")]
    one_less = "Benchmarking 4 deployments"
    # A pruning, and what it took along; an evaluation; a dense one.
    assert rest(0, 1, 7, 12) == ([*titles[2:7], *titles[8:12], one_less], [mine[1], *dense])
    assert rest(8, 12) == ([*titles[:8], *titles[9:12], one_less], [mine[0], *dense])
    assert rest(6, 11, 12) == ([*titles[:6], *titles[7:11], one_less], [*mine, *dense[:2]])
    assert without(whole, (1, 3, 7, 8, 12), output) is None
    assert without(whole, (12,), output) is None


def test_where_nothing_is_whole_the_report_says_why(checkpoint: Path) -> None:
    output = checkpoint.parent / "out"
    plan = tasks(checkpoint, output, PLAN, *TEXTS)
    result, left = run(plan, output, lambda some: attempt(some, list))
    assert result is None
    assert {record.title for record in left} == {task.title for task in plan}
    page = (output / "report.html").read_text()
    assert "Nothing was measured." in page
    assert "it needs what failed: Pruning wanda-owl-50" in page


def test_a_widening_that_fails_leaves_the_earlier_figures_in_the_report(
    checkpoint: Path,
) -> None:
    output, result = checkpoint.parent / "out", made.result()
    for name, content in (("bench-a", result), ("bench-b", None), ("benchmark", None)):
        (output / name).mkdir(parents=True)
        told = content.model_dump_json() if content else "{"
        (output / name / "result.json").write_text(told)
    found, left = run(
        tasks(checkpoint, output, PLAN, *TEXTS), output, lambda some: attempt(some, list)
    )
    assert found is None
    assert left
    page = (output / "report.html").read_text()
    assert "Nothing was measured." not in page
    assert result.subjects[0].name in page


def test_a_target_without_a_precision_has_its_own(checkpoint: Path) -> None:
    asked = {"targets": ("owl", "owl:bf16", "owl:int8"), "sparsities": (0.5,)}
    titles = planned(checkpoint, PLAN.model_copy(update=asked))
    exported = {title for title in titles if title.startswith("Exporting wanda")}
    assert exported == {"Exporting wanda-owl-50-owl-bf16", "Exporting wanda-owl-50-owl-int8"}
    assert {"Exporting dense-owl-bf16", "Exporting dense-owl-int8"} <= set(titles)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"targets": ("onnxruntime", "owl:int2")}, "'owl' has no precision 'int2'"),
        ({"allocations": ("owl", "searched")}, "--allocation searched is gone"),
        ({"methods": ("wandb",)}, "Did you mean 'wanda'"),
        ({"sparsities": (1.5,)}, "impossible"),
        ({"pairs": 0}, "--pairs 0 is too small"),
        ({"scenarios": ("decod",)}, "Did you mean 'decode'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    checkpoint: Path, wrong: dict[str, object], words: str
) -> None:
    with pytest.raises(BadInput, match=words):
        planned(checkpoint, PLAN.model_copy(update=wrong))


def test_the_trade_off_marks_what_nothing_beats(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = trade_off(made.result())
    show_trade_off(rows, tmp_path / "report.html")
    assert "* nothing is both faster and better." in capsys.readouterr().out
    beaten = {row["deployment"] for row in rows if not row["pareto"]}
    assert beaten == {"dense-fp32", "owl-70-deepsparse"}  # by dense-deepsparse, and dense-int4
    speeds = [row["tokens_per_s"] for row in rows]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sparsity: [0.5]", r"Unknown key 'sparsity' in .*sweep\.yaml. Known: methods, alloc"),
        ("samples: 0", r"^samples in .*sweep\.yaml is 0: input should be .* equal to 1\.$"),
        ("sparsities: []", "^sparsities in"),
        ("context: []", "^context in"),
        ("prompt: []", "^prompt in"),
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
    assert list(plan.prunings()) == ["magnitude-fisher-90"]
    with pytest.raises(BadInput, match="cannot be read"):
        read_plan(tmp_path / "none.yaml", {})
    assert read_plan(None, {}) == SweepPlan()


@pytest.mark.parametrize("wrong", [{"calibration": "no.txt"}, {"text": "hf:name"}])
def test_a_text_that_is_not_there_is_missed_before_any_work(
    checkpoint: Path, wrong: dict[str, str]
) -> None:
    given = {"calibration": "wikitext", "text": "wikitext"} | wrong
    with pytest.raises(BadInput, match=r"There is no text file 'no\.txt'|not of the form hf:"):
        tasks(checkpoint, checkpoint.parent / "out", PLAN, **given)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({}, "The model takes 512 tokens, not 2048. Give a smaller --sequence-length."),
        ({"sequence_length": 512}, "The model takes 512 tokens, not 2048. Give a smaller --window"),
        ({"sequence_length": 512, "window": 512}, None),
        (
            {"sequence_length": 512, "window": 512, "context": (4096,)},
            "--context 4096 is more than the 512 tokens that .*model takes",
        ),
        # Nothing looks at the text to prune by.
        ({"methods": ("magnitude",), "allocations": ("uniform",), "window": 512}, None),
    ],
)
def test_windows_that_the_model_does_not_take_are_refused_before_any_work(
    checkpoint: Path, wanted: dict[str, object], words: str | None
) -> None:
    (checkpoint / "config.json").write_text('{"max_position_embeddings": 512}')
    plan = PLAN.model_copy(update=wanted)
    if words is None:
        assert planned(checkpoint, plan)
        return
    with pytest.raises(BadInput, match=words):
        planned(checkpoint, plan)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"scenarios": ("decode", "requests"), "targets": ("deepsparse",)}, "has no server"),
        ({"scenarios": ("answers",), "context": (65,)}, "The longest prompt has"),
    ],
)
def test_what_only_the_benchmark_would_refuse_is_refused_before_any_work(
    llama: Path, tmp_path: Path, wanted: dict[str, object], words: str
) -> None:
    plan = PLAN.model_copy(update={"sequence_length": 64, "window": 64, **wanted})
    with pytest.raises(BadInput, match=words):
        tasks(llama, tmp_path / "out", plan, *TEXTS)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    for name, words in (("no", "There is no model folder"), ("file", "is a file"), ("", "config")):
        (tmp_path / "file").touch()
        with pytest.raises(BadInput, match=words):
            tasks(tmp_path / name, tmp_path / "out", PLAN, *TEXTS)


def test_what_the_options_say_wrong(owl: Any, checkpoint: Path) -> None:
    line = ("sweep", checkpoint, "-o", checkpoint.parent / "out", "-c", "c4", "-p", "c4")
    for option in ("--samples", "--sequence-length", "--window", "--windows", "--pairs"):
        code, _, err = owl(*line, option, 0, "--dry-run")
        assert (code, f"Invalid value for '{option}'" in err, "Known" in err) == (2, True, False)


def test_more_threads_than_can_be_are_refused_before_any_work(owl: Any, checkpoint: Path) -> None:
    line = ("sweep", checkpoint, "-o", checkpoint.parent / "out", "-c", "c4", "-p", "c4")
    code, _, err = owl(*line, "--threads", 9999, "--dry-run")
    assert (code, "--threads 9999 is too large" in err) == (2, True)


def test_a_sweep_or_a_benchmark_of_nothing_is_refused() -> None:
    with pytest.raises(BadInput, match="scenarios"):
        read_plan(None, {"scenarios": ()})
    with pytest.raises(ValidationError, match="scenarios"):
        BenchPlan(candidates=(Path("one"),), scenarios=())


@pytest.mark.parametrize("name", ["samples", "sequence_length", "windows", "threads", "pairs"])
def test_numbers_that_cannot_be(name: str) -> None:
    with pytest.raises(BadInput, match=name):
        read_plan(None, {name: 0})


def test_what_this_machine_lacks_is_missed_before_any_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too few words.")
    with pytest.raises(BadInput, match="token"):
        check_here(llama, PLAN, str(short), str(short))
    plan = PLAN.model_copy(update={"targets": ("deepsparse",)})
    monkeypatch.setattr("owl_deploy.inference.environment.is_installed", lambda _: False)
    with pytest.raises(EnvironmentFailed, match="'deepsparse' is not installed"):
        check_here(llama, plan, str(short), str(short))


@pytest.mark.parametrize(
    ("calibration", "changes", "words"),
    [
        ("Too few words.", {}, "holds 0 windows of 64 tokens, not 4"),
        ("The river ran past the mill. " * 200, {"sparsities": (0.5, 1.0)}, "1.0 is impossible"),
    ],
)
def test_a_pruning_that_cannot_be_is_refused_before_the_first(
    llama: Path, tmp_path: Path, calibration: str, changes: dict[str, object], words: str
) -> None:
    (tmp_path / "few.txt").write_text(calibration)
    (tmp_path / "enough.txt").write_text("The river ran past the mill. " * 200)
    asked = {"sequence_length": 64, "window": 64, "samples": 4, **changes}
    with pytest.raises(BadInput, match=words):
        check_here(
            llama,
            PLAN.model_copy(update=asked),
            str(tmp_path / "few.txt"),
            str(tmp_path / "enough.txt"),
        )


def test_a_page_that_is_not_owls_is_not_replaced(checkpoint: Path) -> None:
    output = checkpoint.parent / "out"
    output.mkdir()
    (output / "report.html").write_text("<h1>Ours</h1>")
    with pytest.raises(BadInput, match=r"report\.html is no page of owl's\. Move it away"):
        tasks(checkpoint, output, PLAN, *TEXTS)
    assert (output / "report.html").read_text() == "<h1>Ours</h1>"


@pytest.mark.parametrize("target", ["owl", "owl:fp32", "onnxruntime:int8"])
def test_a_target_that_a_model_cannot_have_is_refused_before_any_work(
    checkpoint: Path, target: str
) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "opt"}')
    with pytest.raises(BadInput, match="model builder does not know 'opt'"):
        planned(checkpoint, PLAN.model_copy(update={"targets": (target,)}))
    titles = planned(checkpoint, PLAN.model_copy(update={"targets": ("deepsparse",)}))
    dense = [title for title in titles if title.startswith("Exporting dense")]
    assert dense == ["Exporting dense-deepsparse-fp32", "Exporting dense-onnxruntime-fp32"]


def test_a_sweep_is_not_made_within_its_model(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="lies inside the input"):
        tasks(checkpoint, checkpoint / "out", PLAN, *TEXTS)
