import math

import numpy as np
import pytest

from owl_deploy.bench import stats


def processes(seed: int, count: int, factor: float = 1.0, noise: float = 0.02) -> list[float]:
    generator = np.random.default_rng(seed)
    return (factor * 20 * np.exp(generator.normal(0, noise, count))).tolist()


def test_a_process_is_summed_up_by_its_median() -> None:
    summary = stats.summarize([[1, 2, 900], [4, 4, 4], [3, 3, 3], [3, 3, 3]])
    assert summary.median == 3
    assert summary.processes == 4
    assert summary.p99 > 800
    assert summary.spread == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("bad", [[], [math.nan], [1.0, math.inf], [0.0], [-1.0]])
def test_what_is_no_latency_is_refused(bad: list[float]) -> None:
    with pytest.raises(ValueError, match="latenc"):
        stats.process_median(bad)
    with pytest.raises(ValueError, match=r"latenc|unequal"):
        stats.compare(bad, [1.0] * max(1, len(bad)))


def test_unequal_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="unequal counts: 2 and 1"):
        stats.compare([1.0, 1.0], [1.0])


def test_the_ratio_is_the_median_of_paired_rounds() -> None:
    drift = [1, 2, 3, 4, 5, 6, 7, 8]  # the machine slows down, for both alike
    ratio = stats.compare([10.0 * d for d in drift], [15.0 * d for d in drift])
    assert ratio.ratio == pytest.approx(1.5)
    assert ratio.low == pytest.approx(1.5)
    assert ratio.high == pytest.approx(1.5)
    assert stats.describe(ratio) == "1.50x (1.50 to 1.50)"


def test_one_bad_round_moves_nothing() -> None:
    baseline = [15.0] * 8
    baseline[3] = 400.0
    assert stats.compare([10.0] * 8, baseline).ratio == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("factor", "noise", "pairs", "words"),
    [
        (1 / 1.43, 0.01, 8, "1.4"),
        (1.3, 0.01, 8, "slower: 0.7"),
        (1.0, 0.005, 8, "no speed-up ("),
        (1.0, 0.4, 8, "inconclusive (noisy machine)"),
        (0.5, 0.01, 3, "inconclusive (too few pairs)"),
    ],
)
def test_verdicts_in_words(factor: float, noise: float, pairs: int, words: str) -> None:
    ratio = stats.compare(
        processes(1, pairs, factor, noise=noise), processes(2, pairs, noise=noise)
    )
    assert stats.describe(ratio).startswith(words)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    for pairs, least in ((4, 0.84), (5, 0.9), (8, 0.9), (9, 0.9), (16, 0.9)):
        covered = 0
        for seed in range(400):
            ratio = stats.compare(processes(seed, pairs), processes(1000 + seed, pairs, 1.2))
            covered += ratio.low <= 1.2 <= ratio.high
        assert covered / 400 >= least - 0.02


# The tables of the sign test: of so many rounds this many are left out on either side.
@pytest.mark.parametrize(
    ("pairs", "confidence", "left_out"),
    [
        *((pairs, 0.9, 0) for pairs in range(1, 8)),
        *((8, 0.9, 1), (9, 0.9, 1), (10, 0.9, 1), (11, 0.9, 2), (16, 0.9, 4), (24, 0.9, 7)),
        *((8, 0.95, 0), (9, 0.95, 1), (25, 0.95, 7)),
    ],
)
def test_intervals_go_from_one_round_to_another(
    pairs: int, confidence: float, left_out: int
) -> None:
    baseline = [10.0 + place for place in range(pairs)][::-1]
    ratio = stats.compare([10.0] * pairs, baseline, confidence)
    assert ratio.low == pytest.approx(1 + left_out / 10)
    assert ratio.high == pytest.approx(1 + (pairs - 1 - left_out) / 10)


def test_who_looks_again_is_misled_no_more_often() -> None:
    confidence, misled = stats.confidence(3), 0
    for seed in range(400):
        one, other = processes(seed, 24), processes(1000 + seed, 24)
        looked = [stats.compare(one[:n], other[:n], confidence).verdict for n in (8, 16, 24)]
        said = next((word for word in looked if word != "inconclusive"), "inconclusive")
        misled += said in ("faster", "slower")
    assert 0.01 <= misled / 400 <= 0.1


def test_nothing_is_seldom_taken_for_a_speedup() -> None:
    said = [
        stats.compare(processes(seed, 8), processes(1000 + seed, 8)).verdict for seed in range(300)
    ]
    assert said.count("faster") <= 0.08 * 300
    assert said.count("slower") <= 0.08 * 300


def test_percentiles_are_of_all_latencies_together() -> None:
    summary = stats.summarize([list(range(1, 51)), list(range(51, 102))])  # 1 to 101
    assert (summary.p90, summary.p99) == (pytest.approx(91), pytest.approx(100))


def test_as_many_pairs_as_are_needed_are_not_too_few() -> None:
    noisy = stats.Ratio(1.0, 0.5, 2.0, stats.MIN_PAIRS)
    assert stats.describe(noisy) == "inconclusive (noisy machine): 1.00x (0.50 to 2.00)"


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([8, 5, 24], "90 % interval"),
        ([], "90 % interval"),
        ([4, 4], "range of 4 rounds"),
        ([1], "range of 1 round"),
        ([4, 2], "range of 2 or 4 rounds"),
        ([8, 3], "90 % interval, or range of 3 rounds"),
    ],
)
def test_an_interval_is_called_what_it_is(pairs: list[int], words: str) -> None:
    assert stats.interval_words(pairs) == words


def test_processes_are_apart_by_their_slowest_over_their_fastest() -> None:
    assert stats.apart([[10, 10, 900], [12, 12], [11]]) == pytest.approx(0.2)
