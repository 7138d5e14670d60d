import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.bench import BenchPlan, decision, entries
from owl_deploy.bench.measure import conclude
from owl_deploy.bench.result import Result, Score, Subject, metrics_of
from owl_deploy.bench.run import Outcome
from owl_deploy.errors import BadInput
from owl_deploy.models.measurements import keep_measurement
from tests.unit.bench.made import result, with_code


def option(name: str, speed: float, loss: float, noise: float = 0.0) -> decision.Option:
    subject = result().subjects[-1].model_copy(update={"name": name})
    return decision.Option(subject, speed, 15 ** (1 + loss), loss, noise)


def said(made: Result, max_loss: float | None = None, key: str | None = None) -> str:
    return decision.sentence(decision.judge(made, key), max_loss)


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("0.02", 0.02), (" 0 % ", 0.0), ("150%", 1.5)]
)
def test_a_share_is_read(text: str, share: float) -> None:
    assert decision.read_loss(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "two", "-1%", "nan", "inf"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="such as 2%"):
        decision.read_loss(text)


def test_what_the_api_decides_is_what_bench_prints() -> None:
    made = result()
    for loss in (None, 0.02, 0.5):
        wanted = Outcome(made).to_json(loss, "perplexity")["decision"]
        assert decision.decide(made, max_loss=loss, quality_metric="perplexity") == wanted
    assert decision.decide(made, "2%") == decision.decide(made, 0.02)
    with pytest.raises(BadInput, match="no share"):
        decision.decide(made, -0.1)


def test_the_fastest_that_loses_no_more_is_chosen() -> None:
    every = [
        option("fp32", 50, 0.0),
        option("int8", 200, 0.004),
        option("int4", 260, 0.09),
        option("half", 300, 0.28),
    ]
    picks = [decision.choose(every, loss) for loss in (None, 0.0, 0.1, 0.5)]
    assert [one and one.subject.name for one in picks] == ["int8", "fp32", "int4", "half"]
    assert decision.choose([], None) is None


def test_losses_are_shares_of_the_best_dense_ones_log_perplexity() -> None:
    by_name = {one.subject.name: one for one in decision.judge(result()).options}
    assert by_name["dense-fp32"].loss == 0
    expected = math.log(16.2 / 13.7) / math.log(13.7)
    assert by_name["owl-50-deepsparse"].loss == pytest.approx(expected)


def changed(made: Result, of: dict[str, dict[str, Any]]) -> Result:
    subjects = tuple(one.model_copy(update=of.get(one.name, {})) for one in made.subjects)
    return made.model_copy(update={"subjects": subjects})


def test_no_sparse_one_is_the_measure_of_what_is_lost() -> None:
    made = result()
    unmeasured = {s.name: {"perplexity": None} for s in made.subjects if not s.is_sparse}
    for most in (None, 0.0, 0.02):
        told = said(changed(made, unmeasured), most)
        assert told.startswith("Nothing here says what to deploy: no dense deployment has")
    unmeasured.pop("dense-int8")
    assert said(changed(made, unmeasured)).startswith("Deploy dense-int8 ")
    # A sparse baseline is none either, where a dense candidate is there.
    roles = {s.name: {"role": "baseline" if s.is_sparse else "candidate"} for s in made.subjects}
    by_name = {one.subject.name: one for one in decision.judge(changed(made, roles)).options}
    assert by_name["dense-deepsparse"].loss == 0 < by_name["owl-50-deepsparse"].loss


def test_for_machines() -> None:
    judged = decision.judge(result())
    found = decision.to_json(judged, max_loss=0.5)
    pick = decision.choose(judged.options, 0.5)
    assert pick is not None
    assert found["deploy"] == pick.subject.name
    assert found["why"] == decision.sentence(judged, 0.5)
    assert found["quality"] == "perplexity"
    allowed = {one["name"] for one in found["options"] if one["loss"] <= one["allowed"]}
    assert pick.subject.name in allowed
    assert json.loads(json.dumps(found)) == found


def test_sentences() -> None:
    # int8's 13.8 for 13.7 is a loss of 0.28 %: nothing that one would notice.
    assert said(result()).startswith("Deploy dense-int8 (onnxruntime, int8): 54 ")
    told = said(result(), 0.02)
    assert "the fastest here that loses at most 2 % of log-perplexity" in told
    assert "owl-50-deepsparse (deepsparse, fp32) decodes at 1.0" in told
    assert "it would be the choice if that were 2 % or less" in told
    assert "by its engine, precision and sparsity together: a dense int8 export for owl would " in (
        said(result(), 0.5)
    )


@pytest.mark.parametrize(
    ("verdict", "text", "says"),
    [
        ("faster", "1.3x (1.2 to 1.4)", "Sparsity pays: it is 1.3x (1.2 to 1.4) the best dense"),
        ("inconclusive", "inconclusive (too few pairs): 1.1x", "it is inconclusive (too few"),
        ("no speed-up", "no speed-up (0.9 to 1.1)", "it is no speed-up (0.9 to 1.1)."),
    ],
)
def test_sparsity_pays_by_the_interval_and_in_one_engine(
    verdict: Any, text: str, says: str
) -> None:
    made = result()
    dense = next(one for one in made.subjects if not one.is_sparse)
    sparse = max((one for one in made.subjects if one.is_sparse), key=lambda one: one.zeros or 0)
    found = made.comparisons[0].model_copy(
        update={
            "scenario": metrics_of(made.scenarios)[0].key,
            "candidate": sparse.name,
            "baseline": dense.name,
            "verdict": verdict,
            "text": text,
        }
    )
    alike = {"engine": sparse.engine, "precision": sparse.precision}
    subjects = (dense.model_copy(update=alike), sparse)
    told = said(made.model_copy(update={"subjects": subjects, "comparisons": (found,)}), 0.9)
    assert says in told
    assert ("Sparsity pays" in told) is (verdict == "faster")


def beside(
    dense: dict[str, Any], *others: Subject, slower: float = 1.5, perplexity: float = 13.7
) -> str:
    """What is said of the int8 `owl-70-owl-int8`, taken for one that loses nothing unless by its
    `perplexity`, where `dense` takes `slower` times as long in each round, and no comparison of
    them was kept.
    """
    made = result()
    sparse = made.subjects[0].model_copy(update={"perplexity": perplexity})
    samples = tuple(
        sample.model_copy(
            update={
                "latencies_ms": {
                    key: tuple(slower * one for one in values)
                    for key, values in sample.latencies_ms.items()
                }
            }
        )
        for sample in sparse.samples
    )
    whole = {"engine": "owl", "precision": "int8", "samples": samples, **dense}
    subjects = (sparse, made.subjects[4].model_copy(update=whole), *others)
    return said(made.model_copy(update={"subjects": subjects, "comparisons": ()}))


def test_what_was_not_compared_is_by_the_rounds_of_both() -> None:
    assert beside({}).endswith(
        "Sparsity pays: it is 1.50x (1.50 to 1.50) the best dense one's speed."
    )
    assert beside({}, slower=1.0).endswith(
        "Beside dense-fp32 (owl, int8) it is no speed-up (1.00 to 1.00)."
    )
    few = result(pairs=2).subjects[4].samples
    assert "it is inconclusive (too few pairs): " in beside({"samples": few})
    later = tuple(one.model_copy(update={"round": 100 + one.round}) for one in few)
    assert beside({"samples": later}).endswith("it is inconclusive (no round timed both).")


def test_a_faster_one_that_loses_too_much_is_faster_by_the_rounds_of_both() -> None:
    assert "owl-70-owl-int8 (owl, int8) decodes at 1.50x (1.50 to 1.50) that speed, but loses " in (
        beside({}, perplexity=30.0)
    )
    # By its median alone it is faster.
    assert beside({}, perplexity=30.0, slower=1.0).endswith(
        "Beside it owl-70-owl-int8 (owl, int8) is no speed-up (1.00 to 1.00)."
    )


def in_rounds(*slower: float, pairs: int = 8) -> Result:
    """Deployments "one", a candidate, "two" and so on, which take `slower` times as long as it."""
    made = result(pairs=pairs)
    key = metrics_of(made.scenarios)[0].key
    first = made.subjects[4]
    subjects = []
    for name, factor in zip(("one", "two", "three"), (1.0, *slower), strict=False):
        samples = tuple(
            sample.model_copy(
                update={"latencies_ms": {key: tuple(factor * x for x in sample.latencies_ms[key])}}
            )
            for sample in first.samples
        )
        role = "candidate" if name == "one" else "baseline"
        subjects.append(first.model_copy(update={"name": name, "role": role, "samples": samples}))
    return conclude(
        BenchPlan(candidates=("x",), scenarios=("decode",), pairs=pairs),
        made.scenarios[:1],
        made.machine,
        2,
        30.0,
        tuple(subjects),
    )


def test_one_deployment_alone_is_not_recommended() -> None:
    alone = in_rounds()
    told = said(alone)
    assert told == (
        "Nothing here says what to deploy: only one was timed, and there is nothing to compare it "
        "with. Give another DEPLOYMENT as well, or a dense one by --baseline."
    )
    assert said(changed(alone, {"one": {"perplexity": None}})).startswith(told)
    found = decision.to_json(decision.judge(alone))
    assert (found["deploy"], found["why"]) == (None, told)
    assert [one["name"] for one in found["options"]] == ["one"]
    told = said(changed(in_rounds(1.5), {"two": {"perplexity": None}}))
    assert told.startswith("Nothing here says what to deploy: the quality of one alone is known.")


@pytest.mark.parametrize(
    ("slower", "pairs", "doubt"),
    [
        (1.5, 8, ""),
        (1.5, 2, "inconclusive (too few pairs): 1.50x (1.50 to 1.50)"),
        (1.0, 8, "no speed-up (1.00 to 1.00)"),
    ],
)
def test_a_lead_that_the_rounds_do_not_show_is_said(slower: float, pairs: int, doubt: str) -> None:
    told = said(in_rounds(slower, pairs=pairs))
    assert told.startswith("Deploy one (onnxruntime, fp32): ")
    lead = ", though its lead over two (onnxruntime, fp32) is not established. Beside two "
    lead += f"(onnxruntime, fp32) it is {doubt}."
    assert told.endswith(lead) if doubt else "lead" not in told


def test_a_lead_is_over_the_next_that_may_be_deployed() -> None:
    made = in_rounds(1.0, 1.5)
    assert "its lead over two " in said(made)
    assert "lead" not in said(changed(made, {"two": {"perplexity": 99.0}}))


def test_a_baselines_lead_is_by_the_same_comparison_turned_round() -> None:
    made = in_rounds(0.5)
    assert said(made).startswith("Deploy two ")
    assert "lead" not in said(made)
    (kept,) = made.comparisons
    wide = kept.model_copy(update={"ratio": 0.8, "low": 0.5, "high": 1.25})  # by more looks
    assert said(made.model_copy(update={"comparisons": (wide,)})).endswith(
        "it is inconclusive (noisy machine): 1.25x (0.80 to 2.00)."
    )


def test_a_doubt_is_told_once() -> None:
    """Of a sparse one its place beside the best dense one is told in any case."""
    told = beside({}, slower=1.0)
    assert "though its lead over dense-fp32 (owl, int8) is not established. " in told
    assert told.count("it is no speed-up") == 1


@pytest.mark.parametrize(
    ("unlike", "by", "tells"),
    [
        ({"engine": "onnxruntime"}, "engine", "int8 export for owl"),
        ({"precision": "int4"}, "precision", "int8 export for owl"),
        ({"draft": "lookup"}, "draft", "int8 export for owl"),
    ],
)
def test_what_else_may_make_it_faster_is_not_sparsity_s_merit(
    unlike: dict[str, Any], by: str, tells: str
) -> None:
    told = beside(unlike)
    assert f"by its {by} and sparsity together: a dense {tells} would tell what spars" in told
    assert "Sparsity pays" not in told


def test_a_dense_one_of_its_kind_tells_what_sparsity_is_worth() -> None:
    """It may lose too much to be deployed."""
    made = result()
    update = {"engine": "owl", "perplexity": 99.0, "samples": made.subjects[0].samples}
    told = beside({"precision": "int4"}, made.subjects[5].model_copy(update=update))
    assert "It decodes at 1.50x (1.50 to 1.50) the speed of dense-fp32 (owl, int4), by its " in told
    assert told.endswith(
        "together: beside dense-int8 (owl, int8) it is no speed-up (1.00 to 1.00)."
    )


def test_who_is_left_out_is_named() -> None:
    made = result()
    blind = made.subjects[0].model_copy(update={"perplexity": None})
    told = said(made.model_copy(update={"subjects": (blind, *made.subjects[1:])}))
    assert f"Left out, for their perplexity is not known: {blind.name} (owl eval" in told


def test_without_perplexities_nothing_is_said_to_deploy() -> None:
    made = result()
    blind = tuple(s.model_copy(update={"perplexity": None}) for s in made.subjects)
    assert said(made.model_copy(update={"subjects": blind})).startswith("Nothing here says what")


def test_a_dense_candidate_that_wins_is_not_sparsity_s_merit() -> None:
    made = result()
    dense = [subject for subject in made.subjects if not subject.is_sparse]
    assert [subject.role for subject in dense] == ["baseline"] * len(dense)
    asked = dense[0].model_copy(update={"role": "candidate", "zeros": 0.12})
    found = made.model_copy(update={"subjects": (asked, *dense[1:])})
    assert "parsity pays" not in said(found)
    # What another tool pruned has no blocks in a manifest of ours.
    assert asked.model_copy(update={"zeros": 0.5}).is_sparse
    rounded = asked.model_copy(update={"zeros": 0.35, "precision": "int3"})
    assert not rounded.is_sparse
    assert not asked.model_copy(update={"zeros": None}).is_sparse


def test_pass_at_1_judges_where_all_have_it() -> None:
    judged = decision.judge(with_code(40))
    assert (judged.key, judged.metric, judged.documents) == ("humaneval", "pass@1", 40)
    losses = {one.subject.name: one.loss for one in judged.options}
    assert losses["dense-int8"] == pytest.approx(1 / 8)
    assert losses["owl-50-deepsparse"] == pytest.approx(2 / 8)
    # Two solve 80 %, and what is slower and no better than another is not on the front.
    beaten = {one.subject.name for one in judged.options if not one.on_front}
    assert beaten == {"dense-fp32", "owl-70-deepsparse"}
    by_perplexity = decision.judge(with_code(40), "perplexity").options
    assert [one.loss for one in by_perplexity] == [
        one.loss for one in decision.judge(result()).options
    ]


def test_a_difference_is_taken_problem_by_problem() -> None:
    (half,) = (
        one
        for one in decision.judge(with_code(40)).options
        if one.subject.name == "owl-50-deepsparse"
    )
    pairs = [1] * 8 + [0] * 32  # the two of ten that the dense one solves, and it does not
    assert half.noise == pytest.approx(statistics.stdev(pairs) / math.sqrt(40) / 0.8)
    unpaired = math.hypot(*(math.sqrt(p * (1 - p) / 39) for p in (0.8, 0.6))) / 0.8
    assert half.noise < unpaired


@pytest.mark.parametrize("without", [("owl-", "dense-"), ("dense-",), ("owl-",)])
def test_a_task_without_its_answers_has_the_noise_of_two_samples(without: tuple[str, ...]) -> None:
    """None has them, or those that were evaluated before they were kept have not."""
    made = with_code(40)
    kept = {
        one.name: {"passed": {}} if one.name.startswith(without) else {} for one in made.subjects
    }
    subjects = tuple(
        one.model_copy(
            update={"scores": {"boolq": one.scores["humaneval"].model_copy(update=kept[one.name])}}
        )
        for one in made.subjects
    )
    judged = decision.judge(made.model_copy(update={"subjects": subjects}), "boolq")
    (half,) = (one for one in judged.options if one.subject.name == "owl-50-deepsparse")
    unpaired = math.hypot(*(math.sqrt(p * (1 - p) / 39) for p in (0.8, 0.6))) / 0.8
    assert half.noise == pytest.approx(unpaired)


def test_what_may_be_chance_is_said_to_be() -> None:
    few = said(with_code(10), 0.2)
    assert few.startswith("Deploy dense-int8 (onnxruntime, int8): 54 tokens/s")
    assert "loses at most 20 % of pass@1 (pass@1 70.0 ± 15.3 % of 10 problems" in few
    assert "the best has 80.0 ± 13.3 %, which is within the noise of 10 problems)" in few
    assert "but loses 25 % of pass@1 (it has 60.0 ± 16.3 %); it would be the choice" in few
    assert few.endswith("That difference is within the noise of 10 problems.")
    many = said(with_code(160), 0.2)
    assert "it would be the choice if that were 20 % or less." in many
    assert "noise" not in many


def test_by_default_one_standard_error_may_go() -> None:
    # One of ten is one standard error of ten problems, and more than that of 160.
    assert said(with_code(10)).startswith("Deploy dense-int8")
    assert "loses no more than one standard error" in said(with_code(10))
    assert said(with_code(160)).startswith("Deploy dense-deepsparse")


@pytest.mark.parametrize(
    "spoil",
    [
        {},
        {"passed": {"HumanEval/163": True}},
        {"documents": 5},
        {"value": 0.9, "stderr": 0.5},
    ],
)
def test_pass_at_1_judges_nothing_that_it_cannot(spoil: dict[str, object]) -> None:
    made = with_code()
    first = made.subjects[3]
    assert first.name == "dense-deepsparse"
    changed = {name: one.model_copy(update=spoil) for name, one in first.scores.items()}
    subjects = list(made.subjects)
    subjects[3] = first.model_copy(update={"scores": changed if spoil else {}})
    found = made.model_copy(update={"subjects": tuple(subjects)})
    assert decision.judge(found).key == "perplexity"
    assert ("That is by perplexity: " in said(found)) == ("stderr" not in spoil)
    if "stderr" not in spoil:
        with pytest.raises(BadInput, match=r"other documents|has no humaneval measured"):
            decision.judge(found, "humaneval")


def test_the_metric_is_one_that_is_measured(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Did you mean 'humaneval'"):
        decision.judge(result(), "humanevl")
    with pytest.raises(BadInput, match=r"owl eval .*deployment --tasks humaneval"):
        decision.check_measured([tmp_path / "deployment"], "humaneval")
    decision.check_measured([tmp_path / "deployment"], None)


def test_what_is_measured_later_is_taken_up(tmp_path: Path) -> None:
    made = result()
    folder = tmp_path / "dense-int8"
    folder.mkdir()
    kept = {
        "humaneval": {
            "metrics": {"pass@1": {"value": 0.5, "stderr": 0.5}},
            "documents": 2,
            "answers": [
                {"problem": "HumanEval/0", "answer": "", "passed": True, "why": ""},
                {"problem": "HumanEval/1", "answer": "", "passed": False, "why": "a test failed"},
            ],
        },
        "boolq": {
            "metrics": {"acc": {"value": 1.0, "stderr": 0.1}},
            "documents": 2,
            "right": {"0": True, "1": True},
        },
        "wikitext": {"metrics": {"word_perplexity": {"value": 9.0, "stderr": None}}},
    }
    keep_measurement(folder, "tasks", kept)
    subject = made.subjects[5].model_copy(update={"path": str(folder)})
    found = decision.refreshed(made.model_copy(update={"subjects": (subject,)})).subjects[0]
    passed = {"HumanEval/0": True, "HumanEval/1": False}
    score = Score(metric="pass@1", value=0.5, stderr=0.5, documents=2, passed=passed)
    right = {"0": True, "1": True}
    choices = Score(metric="acc", value=1.0, stderr=0.1, documents=2, passed=right)
    assert found.scores == {"humaneval": score, "boolq": choices}


@pytest.mark.parametrize(
    ("how", "usual", "other", "complaint"),
    [
        ("window", 2048, 512, r"saw 2048 tokens .*512.* the same --window"),
        ("every", 1, 4, r"were asked other documents .* the same --limit and --every"),
        ("questions", "a", "b", r"were asked other questions of humaneval"),
    ],
)
def test_what_was_asked_otherwise_is_not_compared(
    how: str, usual: int, other: int, complaint: str
) -> None:
    made = with_code()
    subjects = []
    for place, one in enumerate(made.subjects):
        seen = {how: other if place == 3 else usual}
        scores = {name: score.model_copy(update=seen) for name, score in one.scores.items()}
        subjects.append(one.model_copy(update={"scores": scores}))
    found = made.model_copy(update={"subjects": tuple(subjects)})
    with pytest.raises(BadInput, match=complaint):
        decision.judge(found, "humaneval")


def test_pareto() -> None:
    points = [(10, 20), (20, 20), (30, 30), (5, 10), (25, 40), (20, 20)]
    assert [points[index] for index in decision.pareto(points)] == [
        *((5, 10), (20, 20), (20, 20), (30, 30))
    ]


def test_perplexities_of_different_text_are_not_compared(tmp_path: Path) -> None:
    made = result()
    subjects = [
        one.model_copy(update={"perplexity_on": "ab" if place else "cd"})
        for place, one in enumerate(made.subjects)
    ]
    mixed = made.model_copy(update={"subjects": tuple(subjects)})
    assert "measured on other text" in said(mixed)
    assert said(mixed).startswith("Nothing here says what to deploy: ")
    with pytest.raises(BadInput, match="same --perplexity, --window and --windows"):
        decision.judge(mixed, "perplexity")
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        kept = {"value": 5.0, "token_ids_sha256": folder.name}
        keep_measurement(folder, "perplexity", kept)
    with pytest.raises(BadInput, match="measured on other text"):
        decision.check_measured(folders, "perplexity")


def test_perplexities_over_windows_of_other_lengths_are_not_compared(
    fake: Callable[..., Path],
) -> None:
    """The same tokens, but their first in each window is predicted from nothing."""
    folders = [fake("long"), fake("short")]
    for folder, window in zip(folders, (2048, 512), strict=True):
        kept = {"value": 5.0, "token_ids_sha256": "ab", "window": window}
        keep_measurement(folder, "perplexity", kept)
    with pytest.raises(BadInput, match=r"measured on other text, or in other windows.* --window "):
        decision.check_measured(folders, "perplexity")
    decision.check_measured(folders[:1] * 2, "perplexity")
    subjects = [one for one, _ in entries.entries_of(BenchPlan(candidates=tuple(folders)))]
    speeds = {one.name: {"tokens_per_s": 1.0} for one in subjects}
    assert "in other windows" in decision._by_what_is_known(subjects, speeds).unlike


def with_perplexity(made: Result, name: str, value: float, role: str) -> Result:
    subjects = [
        one.model_copy(update={"perplexity": value, "role": role}) if one.name == name else one
        for one in made.subjects
    ]
    return made.model_copy(update={"subjects": tuple(subjects)})


def test_of_the_best_nothing_better_is_named() -> None:
    told = said(with_perplexity(result(), "owl-50-deepsparse", 9.0, "candidate"))
    assert told.startswith("Deploy owl-50-deepsparse (deepsparse, fp32): 5")
    assert "(perplexity 9.00, none has better)." in told


def test_a_better_one_that_is_slower_is_named() -> None:
    # Not a dense one, which would be what losses are counted from.
    sparse = changed(result(), {"dense-fp32": {"zeros": 0.5}})
    told = said(with_perplexity(sparse, "dense-fp32", 9.0, "candidate"), 0.0)
    assert told.startswith("Deploy dense-deepsparse (deepsparse, fp32): 4")
    assert "(perplexity 13.7, dense-fp32 (onnxruntime, fp32) has 9.00)." in told


def test_a_weak_baseline_does_not_excuse_a_loss() -> None:
    told = said(with_perplexity(result(), "dense-fp32", 9.0, "candidate"))
    assert told.startswith("Deploy dense-fp32 (onnxruntime, fp32): ")
    assert "(perplexity 9.00, none has better)" in told


def test_where_a_loss_is_nothing_and_where_it_may_be_chance() -> None:
    assert option("a", 1, 0.005).is_allowed(None)
    assert not option("a", 1, 0.0051).is_allowed(None)
    assert option("a", 1, 0.01, 0.01).is_allowed(None)
    assert not option("a", 1, 0.0101, 0.01).is_allowed(None)
    assert option("a", 1, 0.02, 0.01).may_be_chance
    assert not option("a", 1, 0.0201, 0.01).may_be_chance


def test_only_comparisons_of_the_first_metric_are_told() -> None:
    made = result()
    second = metrics_of(made.scenarios)[1].key
    other = made.comparisons[0].model_copy(update={"scenario": second})
    judged = decision.judge(made.model_copy(update={"comparisons": (other,)}))
    assert judged.comparisons == ()
