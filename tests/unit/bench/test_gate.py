import json
import math
from collections.abc import Callable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from owl_deploy.bench import BenchPlan, baseline, gate
from owl_deploy.bench.gate import Margins, Side
from owl_deploy.bench.run import run_gate
from owl_deploy.cli import app
from owl_deploy.errors import BadInput
from owl_deploy.export.targets import TARGETS
from owl_deploy.inference import EngineProcess, default_threads
from owl_deploy.models import digests
from owl_deploy.runtime import kernels
from owl_deploy.utils import artefact

pytestmark = pytest.mark.usefixtures("in_process")

Fake = Callable[..., Path]


def ratios(seed: int, rounds: int, change: float = 0.0, noise: float = 0.02) -> list[float]:
    """Log ratios of a candidate 1 + change slower than before, with process noise on both sides."""
    generator = np.random.default_rng(seed)
    sides = generator.normal(0, noise, (2, rounds))
    return (math.log1p(change) + sides[0] - sides[1]).tolist()


def gated(seed: int, change: float) -> gate.Word:
    """What a gate comes to: looks after 8, 16 and 24 rounds, against a saved 8."""
    saved, now = ratios(seed, 8), ratios(10_000 + seed, 24, change)
    for looked in (8, 16, 24):
        word = gate.judge_time("decode@512", saved, now[:looked], 0.05, seed=seed).word
        if word != "INCONCLUSIVE":
            break
    return word


def test_nothing_changed_is_seldom_a_regression() -> None:
    words = [gated(seed, 0.0) for seed in range(500)]
    assert words.count("REGRESSED") <= 5
    assert words.count("IMPROVED") <= 5
    assert words.count("OK") >= 400


def test_ten_per_cent_are_found() -> None:
    words = [gated(seed, 0.10) for seed in range(500)]
    assert words.count("REGRESSED") >= 400
    assert words.count("OK") <= 25


def test_a_speedup_is_an_improvement() -> None:
    assert [gated(seed, -0.15) for seed in range(20)].count("IMPROVED") >= 18


@pytest.mark.parametrize(("was", "now"), [(7, 24), (24, 7), (0, 8)])
def test_too_few_rounds_are_inconclusive(was: int, now: int) -> None:
    verdict = gate.judge_time("m", ratios(1, was), ratios(2, now, 0.5), 0.05)
    assert verdict == gate.Verdict("m", "INCONCLUSIVE", f"{min(was, now)} rounds, and 8 are needed")


def test_every_precision_has_its_margin() -> None:
    known = {name for target in TARGETS.values() for name in target.precisions}
    assert known == baseline.LOGITS_MARGIN.keys()


@pytest.mark.parametrize(("apart", "word"), [(0.074, "OK"), (0.14, "REGRESSED")])
def test_what_broken_rows_do_to_three_bits_is_seen_and_other_kernels_pass(
    apart: float, word: str
) -> None:
    """As SmolLM2 in int3 had them, of the largest logit."""
    moved = [[1.0, 2.0], [3.0, 4.0 + apart * SIDE.probe["scale"]]]
    now = replace(SIDE, probe={**SIDE.probe, "logits": moved})
    (verdict,) = gate.check_probe(SIDE, now, Margins(logits=baseline.LOGITS_MARGIN["int3"]))
    assert verdict.word == word


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_time_that_is_no_number_is_never_ok(bad: float) -> None:
    assert gate.judge_time("m", [0.0] * 8, [0.0] * 7 + [bad], 0.05).word == "INCOMPARABLE"
    assert gate.judge_time("m", [bad] * 8, [0.0] * 8, 0.05) == gate.Verdict(
        "m", "INCOMPARABLE", "a time is not a number"
    )


def test_a_noisy_machine_is_said_to_be_one() -> None:
    verdict = gate.judge_time("m", ratios(1, 8, noise=0.3), ratios(2, 24, noise=0.3), 0.05)
    assert verdict.word == "INCONCLUSIVE"
    assert "noisy" in verdict.why


SIDE = Side(
    setting={"engine": "deepsparse", "threads": 2},
    cpu="A",
    probe={"tokens": [3, 1], "scale": 20.0, "logits": [[1.0, 2.0], [3.0, 4.0]]},
    counters={"bytes": 1000, "nodes": {"MatMul": 4}, "nonzeros": {"w": 5000, "v": 100}},
    peak_bytes=100 * 2**20,
    ratios={"decode@512": [0.0] * 8},
)


@pytest.mark.parametrize(
    "setting", [{"engine": "owl", "threads": 2}, {"engine": "deepsparse"}, {**SIDE.setting, "x": 1}]
)
def test_another_setting_cannot_be_compared(setting: dict[str, Any]) -> None:
    words = {v.word for v in gate.check_setting(SIDE, replace(SIDE, setting=setting))}
    assert words == {"INCOMPARABLE"}
    assert gate.check_setting(SIDE, SIDE) == []


@pytest.mark.parametrize(
    ("probe", "word"),
    [
        ({}, "OK"),
        ({"logits": [[1.0, 2.0], [3.0, 4.1]]}, "REGRESSED"),
        ({"logits": [[1.01, 2.0], [3.0, 4.0]]}, "OK"),
        ({"logits": [[1.0, 2.0], [3.0, math.nan]]}, "REGRESSED"),
        ({"logits": [[1.0, 2.0]]}, "INCOMPARABLE"),
        ({"logits": []}, "INCOMPARABLE"),
        # A near tie broke the other way; what came after answers another question.
        ({"tokens": [9, 1], "logits": [[1.0, 2.0], [9.0, 9.0]]}, "OK"),
    ],
)
def test_logits(probe: dict[str, Any], word: str) -> None:
    now = replace(SIDE, probe={**SIDE.probe, **probe})
    assert [v.word for v in gate.check_probe(SIDE, now, Margins())] == [word]


@pytest.mark.parametrize(
    ("largest", "of_saved", "word"),
    [
        ([5.0, 6.0], [5.0, 6.0], "OK"),
        ([5.01, 6.0], [4.99, 6.0], "OK"),  # both near the top: a tie
        ([5.0, 6.0], [2.0, 6.0], "REGRESSED"),  # the token that was chosen is not
        ([7.0, 6.0], [5.0, 6.0], "REGRESSED"),  # another rose above it
        ([5.0, 6.0], [-math.inf, 6.0], "REGRESSED"),
        ([math.nan, 6.0], [5.0, 6.0], "REGRESSED"),
        ([5.0, 99.0], [5.0, 0.0], "OK"),  # after the first that differs
        (None, None, "INCOMPARABLE"),
    ],
)
def test_another_token_is_a_tie_only_where_both_are_near_the_top(
    largest: list[float] | None, of_saved: list[float] | None, word: str
) -> None:
    saved = replace(SIDE, probe={**SIDE.probe, "largest": [5.0, 6.0]})
    told = {"largest": largest, "of_saved": of_saved} if largest else {}
    now = replace(SIDE, probe={**SIDE.probe, "tokens": [9, 1], **told})
    assert [v.word for v in gate.check_probe(saved, now, Margins())] == [word]
    # A baseline of an earlier version is checked as it was.
    assert gate.check_probe(SIDE, now, Margins())[0].word == "OK"


def test_other_answers_are_seen_beyond_the_columns_that_are_kept(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = BenchPlan(candidates=(fake("a", vocab=4000),), baselines=(fake("b"),))
    (tmp_path / "a" / "config.json").write_text(json.dumps({"vocab_size": 4000}))
    saved = baseline.still_side(plan)
    assert gate.check_probe(saved, baseline.still_side(plan, saved), Margins())[0].word == "OK"
    request = EngineProcess.request

    def astray(self: EngineProcess, op: str, **arguments: Any) -> dict[str, Any]:
        answer = request(self, op, **arguments)
        if op == "greedy":
            np.save(arguments["logits_file"], np.roll(np.load(arguments["logits_file"]), 1, axis=1))
            answer["tokens"] = [token + 1 for token in answer["tokens"]]
        return answer

    monkeypatch.setattr(EngineProcess, "request", astray)
    now = baseline.still_side(plan, saved)
    # None of the columns that are kept tells.
    assert now.probe["logits"][0] == saved.probe["logits"][0]
    (verdict,) = gate.check_probe(saved, now, Margins())
    assert verdict.word == "REGRESSED"
    assert verdict.why == "differ by 1.0e+00 of the largest logit, 0 of 16 tokens the same"
    small = BenchPlan(candidates=(fake("c"),), baselines=(tmp_path / "b",))  # 16 tokens
    assert -math.inf in baseline.still_side(small, saved).probe["of_saved"]


@pytest.mark.parametrize(
    ("counters", "word"),
    [
        ({}, "OK"),
        ({"bytes": 1100}, "REGRESSED"),
        ({"bytes": 900}, "IMPROVED"),
        ({"nodes": {"MatMul": 4, "Cast": 1}}, "REGRESSED"),
        ({"nodes": {}}, "IMPROVED"),
        ({"nodes": {"Fused": 1}}, "IMPROVED"),  # a kind that does what four did
        ({"nodes": {"MatMul": 3, "Gemm": 1}}, "OK"),
        ({"nonzeros": {"w": 10_000, "v": 100}}, "REGRESSED"),
        ({"nonzeros": {"w": 4000, "v": 100}}, "IMPROVED"),
        ({"nonzeros": {"w": 5000}}, "INCOMPARABLE"),
    ],
)
def test_counters(counters: dict[str, Any], word: str) -> None:
    now = replace(SIDE, counters={**SIDE.counters, **counters})
    assert gate.overall(gate.check_counters(SIDE, now, Margins())) == word


def test_the_change_is_of_now_over_before() -> None:
    was, is_now = [math.log(0.5)] * 8, [math.log(0.6)] * 8
    assert gate.difference(was, is_now) == pytest.approx((1.2, 1.2, 1.2))
    verdict = gate.judge_time("m", was, is_now, 0.05)
    assert verdict == gate.Verdict("m", "REGRESSED", "+20.0% time (+20.0% to +20.0%), margin 5%")
    assert gate.judge_time("m", is_now, was, 0.05).word == "IMPROVED"


def test_the_interval_counts_the_noise_of_both_sides() -> None:
    was, is_now = np.arange(0.0, 1.01, 0.01), np.arange(2.0, 3.01, 0.01)
    generator = np.random.default_rng(99)
    medians = [np.median(generator.choice(v, (20_000, 101)), axis=1) for v in (was, is_now)]
    _, low, high = gate.difference(was.tolist(), is_now.tolist())
    expected = np.quantile(medians[1] - medians[0], [0.05 / 3, 1 - 0.05 / 3])  # three looks
    assert [math.log(low), math.log(high)] == pytest.approx(expected.tolist(), abs=0.01)
    again, other = (gate.difference(was.tolist(), is_now.tolist(), seed=seed) for seed in (0, 7))
    assert again[1:] == (low, high) != other[1:]


def test_the_first_round_counts_like_any_other() -> None:
    _, low, high = gate.difference([0.0] * 8, [5.0, *[0.0] * 3, *[5.0] * 4])
    assert (low, high) == (1.0, pytest.approx(math.exp(5)))
    alone = [9.0, *[0.0] * 2]
    assert gate.difference([0.0] * 3, alone)[2] == pytest.approx(math.exp(9))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "not said"),
        (3, "3"),
        ("x" * 59, "x" * 59),
        ("x" * 60, "x" * 57 + "..."),
    ],
)
def test_a_setting_is_told_briefly(value: Any, text: str) -> None:
    saved, now = replace(SIDE, setting={"key": value}), replace(SIDE, setting={"key": "other"})
    assert gate.check_setting(saved, now) == [
        gate.Verdict("key", "INCOMPARABLE", f"was {text}, is other")
    ]
    assert gate.check_setting(now, saved)[0].why == f"was other, is {text}"


def test_verdicts_name_their_metric_and_say_why() -> None:
    more = {**SIDE.counters, "nonzeros": {"w": 10_000, "v": 100}, "nodes": {"MatMul": 4, "Cast": 1}}
    assert gate.check_counters(SIDE, replace(SIDE, counters=more), Margins())[1:] == [
        gate.Verdict("nodes", "REGRESSED", "4 before, 5 now (Cast 0 to 1)"),
        gate.Verdict("nonzeros: w", "REGRESSED", "5,000 before, 10,000 now"),
    ]
    fewer = replace(SIDE, counters={**SIDE.counters, "nodes": {}})
    why = gate.check_counters(SIDE, fewer, Margins())[1].why
    assert why == "4 before, 0 now (MatMul 4 to 0)"
    other = {**SIDE.counters, "nonzeros": {"w": 5000, "u": 1}}
    assert gate.check_counters(SIDE, replace(SIDE, counters=other), Margins())[1:] == [
        gate.Verdict("nonzeros", "INCOMPARABLE", "other tensors: ['u', 'v']")
    ]
    hungry = replace(SIDE, peak_bytes=150 * 2**20)
    assert gate.check_memory(SIDE, hungry, Margins()) == [
        gate.Verdict("peak memory, MiB", "REGRESSED", "100 before, 150 now")
    ]
    metrics = replace(SIDE, ratios={"decode@512": [0.0] * 8, "prefill@128": [0.0] * 8})
    assert gate.check_time(SIDE, metrics, Margins()) == [
        gate.Verdict("time", "INCOMPARABLE", "other metrics: prefill@128")
    ]
    assert gate.check_time(SIDE, SIDE, Margins()) == [
        gate.Verdict("decode@512", "OK", "+0.0% time (+0.0% to +0.0%), margin 5%")
    ]


def test_probes_that_cannot_be_compared_say_why() -> None:
    def verdict(saved: list[list[float]], now: list[list[float]]) -> gate.Verdict:
        sides = [replace(SIDE, probe={**SIDE.probe, "logits": one}) for one in (saved, now)]
        return gate.check_probe(*sides, Margins())[0]

    assert verdict([[1.0]], [[1.0, 2.0]]) == gate.Verdict(
        "logits", "INCOMPARABLE", "shapes (1, 1) and (1, 2)"
    )
    assert verdict([[1.0]], [[math.nan]]) == gate.Verdict(
        "logits", "REGRESSED", "not all are finite numbers"
    )
    assert verdict([[1.0]], [[1.0]]).word == "OK"  # a single logit is something to compare


def test_a_difference_is_told_by_the_saved_scale() -> None:
    probe = {"tokens": [3], "scale": 0.5, "logits": [[1.0]]}
    saved, now = (replace(SIDE, probe={**probe, "logits": [[x]]}) for x in (1.0, 1.25))
    assert gate.check_probe(saved, now, Margins())[0].why.startswith("differ by 5.0e-01 of")
    longer = replace(now, probe={**now.probe, "tokens": [3, 4]})
    assert "1 of 1 tokens the same" in gate.check_probe(saved, longer, Margins())[0].why


def test_what_is_just_within_the_margin_is_no_change() -> None:
    probe = {"tokens": [3], "scale": 1.0, "logits": [[0.0]]}
    saved, now = (replace(SIDE, probe={**probe, "logits": [[x]]}) for x in (0.0, 0.25))
    assert gate.check_probe(saved, now, Margins(logits=0.25))[0].word == "OK"
    # exp(log(1.5)) is 1.5 to the last bit, so that the interval ends on the margin itself
    assert gate.judge_time("m", [0.0] * 8, [math.log(1.5)] * 8, 0.5).word == "OK"
    assert gate.judge_time("m", [0.0] * 8, [math.log(0.5)] * 8, 0.5).word == "OK"


def test_memory_is_only_compared_on_the_same_processor() -> None:
    hungry = replace(SIDE, peak_bytes=150 * 2**20)
    assert [v.word for v in gate.check_memory(SIDE, hungry, Margins())] == ["REGRESSED"]
    assert gate.check_memory(SIDE, replace(hungry, cpu="B"), Margins()) == []


def test_missing_metrics_are_never_ok() -> None:
    assert gate.check_time(SIDE, replace(SIDE, ratios={}), Margins())[0].word == "INCOMPARABLE"
    assert gate.overall([]) == "INCOMPARABLE"


@pytest.mark.parametrize(
    ("word", "plain", "strict"),
    [
        ("OK", 0, 0),
        ("IMPROVED", 0, 0),
        ("REGRESSED", 1, 1),
        ("INCONCLUSIVE", 3, 1),
        ("INCOMPARABLE", 3, 1),
    ],
)
def test_exit_codes(word: gate.Word, plain: int, strict: int) -> None:
    assert (gate.exit_code(word), gate.exit_code(word, strict=True)) == (plain, strict)


@pytest.fixture
def saved(fake: Fake, tmp_path: Path) -> Path:
    """A baseline file for `candidate` beside `reference`."""
    file = tmp_path / "baseline.json"
    answer = bench(fake("candidate"), fake("reference"), "--save-baseline", file)
    assert answer.exit_code == 0, answer.output
    return file


def bench(candidate: Path, reference: Path, *arguments: Any) -> Any:
    line = ["bench", str(candidate), "-b", str(reference), *map(str, arguments)]
    return CliRunner().invoke(app, line)


@pytest.mark.parametrize(("decode_ms", "code"), [(11.5, 1), (10, 0), (8, 0)])
def test_fifteen_per_cent_fail_the_check_and_nothing_does_not(
    fake: Fake, saved: Path, tmp_path: Path, decode_ms: float, code: int
) -> None:
    before = saved.read_bytes()
    now = fake("candidate", decode_ms=decode_ms)
    summary = tmp_path / "summary.md"
    answer = bench(now, tmp_path / "reference", "--check", saved, "--summary", summary)
    assert answer.exit_code == code, answer.output
    assert saved.read_bytes() == before
    word = {11.5: "REGRESSED", 10: "OK", 8: "IMPROVED"}[decode_ms]
    assert f"Overall: {word}" in answer.stdout
    assert f"owl bench: {word}" in summary.read_text()


def test_noise_is_looked_at_three_times_and_then_said(
    fake: Fake, saved: Path, tmp_path: Path
) -> None:
    now = fake("candidate", noise=0.5)
    answer = bench(now, tmp_path / "reference", "--check", saved, "--json")
    found = json.loads(answer.stdout)
    assert (found["verdict"], found["pairs"]) == ("INCONCLUSIVE", 24)
    assert answer.exit_code == 3
    other = ("--threads", default_threads() + 1)
    strict = bench(now, tmp_path / "reference", "--check", saved, "--strict", *other)
    assert strict.exit_code == 1
    assert "INCOMPARABLE" in strict.stdout


@pytest.mark.parametrize(("given", "looks"), [({}, gate.LOOKS), ({"looks": 2}, 2)])
def test_a_check_from_python_looks_as_often(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, looks: int
) -> None:
    asked: list[int] = []

    def look(_: Path, plan: BenchPlan, *rest: object) -> tuple[list[gate.Verdict], None]:
        asked.append(plan.most_looks)
        return [gate.Verdict("time", "OK", "as before")], None

    monkeypatch.setattr(baseline, "check", look)
    both = {"candidates": (tmp_path / "candidate",), "baselines": (tmp_path / "reference",)}
    run_gate(BenchPlan.model_validate(both | given), check=saved)
    assert asked == [looks]
    assert BenchPlan.model_validate(both).most_looks == 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"pairs": 2}, "3 looks of 2 rounds can tell nothing: .* --pairs 3"),
        ({"pairs": 7, "looks": 1}, "1 look of 7 rounds can tell nothing: .* --pairs 8"),
    ],
)
def test_rounds_that_can_never_be_enough_are_refused(
    saved: Path, tmp_path: Path, given: Any, words: str
) -> None:
    both = {"candidates": (tmp_path / "candidate",), "baselines": (tmp_path / "reference",)}
    with pytest.raises(BadInput, match=words):
        run_gate(BenchPlan.model_validate(both | given), check=saved)


def test_more_looks_make_each_less_certain() -> None:
    was, now = ratios(1, 8), ratios(2, 8)
    _, low, high = gate.difference(was, now, looks=3)
    _, lower, higher = gate.difference(was, now, looks=20)
    assert lower < low
    assert high < higher


def test_other_logits_fail_before_anything_is_timed(
    fake: Fake, saved: Path, tmp_path: Path
) -> None:
    now = fake("candidate", logits_off=0.5)
    answer = bench(now, tmp_path / "reference", "--check", saved, "--json")
    found = json.loads(answer.stdout)
    assert (answer.exit_code, found["verdict"]) == (1, "REGRESSED")
    assert "subjects" not in found


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text[: len(text) // 2], "not a baseline file"),
        (lambda text: text.replace('"time": 0.05', '"time": 0.5'), "was edited or damaged"),
        (lambda text: "[]", "not a baseline file"),
        (lambda text: "", "not a baseline file"),
        (lambda text: "{}", "not a baseline file"),
        (lambda text: "[" * 10**5, "not a baseline file"),
    ],
)
def test_a_damaged_file_is_refused(
    fake: Fake, saved: Path, tmp_path: Path, damage: Callable[[str], str], words: str
) -> None:
    saved.write_text(damage(saved.read_text()))
    answer = bench(tmp_path / "candidate", tmp_path / "reference", "--check", saved)
    assert getattr(answer.exception, "exit_code", None) == 2
    assert words in str(answer.exception)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--save-baseline", "x", "--check", "y"], "exclude each other"),
        (["--save-baseline", "x", "--margin", "1.5"], "not between 0 and 1"),
        (["--check", "x", "--margin", "0.05"], "--margin is for --save-baseline"),
        (["--margin", "0.1"], "--margin is for --save-baseline"),
        (["--save-baseline", "x", "--pairs", "4"], "--pairs 8"),
        (["--save-baseline", "/nowhere/x"], "does not exist"),
        (["--save-baseline", "x", "-o", "x"], "--save-baseline and -o are one path"),
        (["--check", "x", "--summary", "./x"], "--check and --summary are one path"),
        (["--check", "/nowhere/x"], "cannot be read"),
    ],
)
def test_gates_that_cannot_be(fake: Fake, arguments: list[str], words: str) -> None:
    answer = bench(fake("a"), fake("b"), *arguments)
    assert getattr(answer.exception, "exit_code", None) == 2
    assert words in str(answer.exception)


def test_a_baseline_is_not_saved_into_what_is_measured(fake: Fake) -> None:
    measured = fake("a")
    (file,) = measured.glob("*.json")
    before = file.read_bytes()
    answer = bench(measured, fake("b"), "--save-baseline", file, "--force")
    assert "lies inside the input" in str(answer.exception)
    assert file.read_bytes() == before


def test_a_gate_needs_a_reference(fake: Fake, tmp_path: Path) -> None:
    line = ["bench", str(fake("a")), "--save-baseline", str(tmp_path / "x")]
    answer = CliRunner().invoke(app, line)
    assert "one deployment against one reference" in str(answer.exception)


def test_an_engine_that_fails_writes_no_baseline(fake: Fake, tmp_path: Path) -> None:
    bad = fake("bad", fail={"op": "next", "how": "raise"})
    file = tmp_path / "x.json"
    answer = bench(bad, fake("b"), "--save-baseline", file)
    assert getattr(answer.exception, "exit_code", None) == 4
    assert not file.exists()


def test_an_engine_that_fails_the_check_has_regressed(
    fake: Fake, tmp_path: Path, loads: list[Any]
) -> None:
    file = tmp_path / "baseline.json"
    good = fake("candidate", fail={"op": "none", "how": "raise"})  # as many bytes
    assert bench(good, fake("reference"), "--save-baseline", file).exit_code == 0
    loads.clear()
    bad = fake("candidate", fail={"op": "next", "how": "raise"})
    answer = bench(bad, tmp_path / "reference", "--check", file)
    assert answer.exit_code == 1, answer.output
    assert "Overall: REGRESSED" in answer.stdout
    assert len(loads) == 1 + 1 + 8  # its logits, the sample that fails, the reference in one look


def test_a_reference_that_fails_leaves_nothing_to_judge(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "baseline.json"
    good = fake("reference", fail={"op": "none", "how": "raise"})  # as many bytes
    assert bench(fake("candidate"), good, "--save-baseline", file).exit_code == 0
    bad = fake("reference", fail={"op": "next", "how": "raise"})
    answer = bench(tmp_path / "candidate", bad, "--check", file, "--json")
    assert answer.exit_code == 3, answer.output
    found = json.loads(answer.stdout)
    assert found["verdict"] == "INCOMPARABLE"
    (failed,) = (one for one in found["verdicts"] if one["word"] == "INCOMPARABLE")
    assert failed["metric"] == "reference"
    assert failed["why"].startswith("reference, which it is timed by, failed: The engine 'fake'")
    # Where both fail, the one that is judged has regressed all the same.
    worse = fake("candidate", fail={"op": "prompt", "how": "raise"})
    result = baseline.run_bench(BenchPlan(candidates=(worse,), baselines=(bad,), pairs=1))
    assert [one.word for one in baseline._failed(result)] == ["REGRESSED", "INCOMPARABLE"]


def test_another_engine_beneath_the_reference_cannot_be_compared(
    fake: Fake, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, reference = fake("candidate"), tmp_path / "reference"
    older = tmp_path / "older.json"
    content = json.loads(saved.read_text())
    assert ", onnxruntime " in content["side"]["setting"].pop("reference engine")
    del content["digest"]
    artefact.write_json(older, {**content, "digest": digests.of_json(content)})
    assert bench(now, reference, "--check", older).exit_code == 0

    software = baseline.software
    monkeypatch.setattr(baseline, "software", lambda name: {**software(name), "version": "99"})
    answer = bench(now, reference, "--check", saved, "--json")
    (verdict,) = json.loads(answer.stdout)["verdicts"]
    assert (verdict["metric"], verdict["word"]) == ("reference engine", "INCOMPARABLE")
    assert ", is 99" in verdict["why"]
    assert bench(now, reference, "--check", older).exit_code == 0  # which does not say


@pytest.mark.parametrize("force", [False, True])
def test_a_file_of_another_kind_is_no_baseline_to_replace(
    fake: Fake, tmp_path: Path, force: bool
) -> None:
    file = tmp_path / "precious"
    file.write_text("precious")
    options = ["--force"] if force else []
    answer = bench(fake("a"), fake("b"), "--save-baseline", file, *options)
    assert (answer.exit_code == 0) is force
    assert (file.read_text() == "precious") is not force
    if not force:
        assert "is there, and is no baseline" in str(answer.exception)
    else:  # one baseline replaces another
        assert bench(fake("a"), fake("b"), "--save-baseline", file).exit_code == 0


def test_what_cannot_be_written_is_said_before_anything_is_timed(
    fake: Fake, saved: Path, tmp_path: Path, loads: list[Any]
) -> None:
    now = fake("candidate")
    loads.clear()
    folder = bench(now, tmp_path / "reference", "--save-baseline", tmp_path)
    assert "is no file" in str(folder.exception)
    nowhere = tmp_path / "no" / "summary.md"
    answer = bench(now, tmp_path / "reference", "--check", saved, "--summary", nowhere)
    assert "cannot be written" in str(answer.exception)
    assert loads == []


def test_other_prompts_cannot_be_compared(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    plan = BenchPlan(
        candidates=(fake("candidate"),),
        baselines=(fake("reference"),),
        scenarios=("answers",),
        prompts=file,
    )
    told = []
    for prompt in ("one", "two"):
        file.write_text(json.dumps({"prompt": prompt}))
        told.append(baseline._told(plan, "fake"))
    assert told[0] != told[1]
    assert baseline._told(plan, "owl")["kernels"] == kernels()
    assert baseline._told(plan, "owl")["onnxruntime version"] == metadata.version("onnxruntime")


def test_logits_that_are_no_numbers_make_no_baseline(fake: Fake, tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    answer = bench(fake("bad", logits_off=float("inf")), fake("b"), "--save-baseline", file)
    assert getattr(answer.exception, "exit_code", None) == 4
    assert "infinite, or no numbers" in str(answer.exception)
    assert not file.exists()


def test_another_reference_of_the_same_size_is_another(fake: Fake, tmp_path: Path) -> None:
    saved, now = ({**SIDE.setting, gate.REFERENCE_MODEL: digest} for digest in ("a", "b"))
    (found,) = gate.check_setting(replace(SIDE, setting=saved), replace(SIDE, setting=now))
    assert (found.metric, found.word) == ("reference model", "INCOMPARABLE")
    assert gate.check_setting(SIDE, replace(SIDE, setting=now)) == []  # a file of before


@pytest.mark.parametrize("references", [["a"], ["b", "c"]])
def test_a_gate_has_one_reference_and_that_is_another(
    fake: Fake, tmp_path: Path, references: list[str]
) -> None:
    folders = {name: fake(name) for name in "abc"}
    line = ["bench", str(folders["a"]), "--save-baseline", str(tmp_path / "x")]
    for name in references:
        line += ["-b", str(tmp_path / "." / name)]
    answer = CliRunner().invoke(app, line)
    assert "one deployment against one reference" in str(answer.exception)
