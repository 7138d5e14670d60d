import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from owl_deploy.bench import gate
from owl_deploy.bench.gate import Margins, Side
from owl_deploy.cli import app
from owl_deploy.engines import default_threads

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
        word = gate.judge_time("decode@512", saved, now[:looked], 0.05, seed).word
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
    assert verdict.word == "INCONCLUSIVE"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_time_that_is_no_number_is_never_ok(bad: float) -> None:
    assert gate.judge_time("m", [0.0] * 8, [0.0] * 7 + [bad], 0.05).word == "INCOMPARABLE"
    assert gate.judge_time("m", [bad] * 8, [0.0] * 8, 0.05).word == "INCOMPARABLE"


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
    ("counters", "word"),
    [
        ({}, "OK"),
        ({"bytes": 1100}, "REGRESSED"),
        ({"bytes": 900}, "IMPROVED"),
        ({"nodes": {"MatMul": 4, "Cast": 1}}, "REGRESSED"),
        ({"nodes": {}}, "IMPROVED"),
        ({"nonzeros": {"w": 10_000, "v": 100}}, "REGRESSED"),
        ({"nonzeros": {"w": 4000, "v": 100}}, "IMPROVED"),
        ({"nonzeros": {"w": 5000}}, "INCOMPARABLE"),
    ],
)
def test_counters(counters: dict[str, Any], word: str) -> None:
    now = replace(SIDE, counters={**SIDE.counters, **counters})
    assert gate.overall(gate.check_counters(SIDE, now, Margins())) == word


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
    if found["verdict"] == "INCONCLUSIVE":
        assert answer.exit_code == 3
        assert found["pairs"] == 24
    other = ("--threads", default_threads() + 1)
    strict = bench(now, tmp_path / "reference", "--check", saved, "--strict", *other)
    assert strict.exit_code == 1
    assert "INCOMPARABLE" in strict.stdout


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
        (["--save-baseline", "x", "--pairs", "4"], "--pairs 8"),
        (["--save-baseline", "/nowhere/x"], "does not exist"),
        (["--check", "/nowhere/x"], "cannot be read"),
    ],
)
def test_gates_that_cannot_be(fake: Fake, arguments: list[str], words: str) -> None:
    answer = bench(fake("a"), fake("b"), *arguments)
    assert getattr(answer.exception, "exit_code", None) == 2
    assert words in str(answer.exception)


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
