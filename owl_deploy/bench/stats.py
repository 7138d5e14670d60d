"""The statistics of a benchmark: pure functions of its samples.

The unit is the process, not the latency: latencies in one process share its memory layout and its
neighbours, so a thousand of them are worth little more than one. A process is summed up by its
median. Two deployments are compared by the median, over rounds, of the log of the ratio of their
processes' medians, which one bad round cannot move. Its interval is that of the sign test: from one
of the rounds in their order to another, whatever the noise is like (Conover 1999, section 3.2).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

MIN_PAIRS = 4  # fewer give no interval: with 4, the range of the pairs covers the median at 87 %
CONFIDENCE = 0.90  # at least: of 8 rounds the second to the seventh cover it at 93 %
_COVERING = 5  # rounds whose range has that confidence: 94 %; that of fewer covers it less often
NO_SPEEDUP = 1.05  # "no speed-up" is claimed when all of the interval is below this ratio
NOISY_SPREAD = 0.10

Verdict = Literal["faster", "slower", "no speed-up", "inconclusive"]


@dataclass(frozen=True)
class Summary:
    """What a deployment's latencies in one scenario come to, in ms.

    `median` is over the processes' medians, `spread` their interquartile range over it, which one
    bad process hardly moves; p90 and p99 are over all latencies together.
    """

    median: float
    spread: float
    p90: float
    p99: float
    processes: int


@dataclass(frozen=True)
class Ratio:
    """How many times faster, baseline over candidate, with its interval."""

    ratio: float
    low: float
    high: float
    pairs: int

    @property
    def verdict(self) -> Verdict:
        """What the interval allows to say."""
        if self.pairs < MIN_PAIRS:
            return "inconclusive"
        if self.low > 1:
            return "faster"
        if self.high < 1:
            return "slower"
        return "no speed-up" if self.high < NO_SPEEDUP else "inconclusive"


def checked(latencies: Sequence[float]) -> list[float]:
    """`latencies` if there are any and all are positive numbers; else raises `ValueError`."""
    if not latencies:
        raise ValueError("no latencies")
    if not all(math.isfinite(value) and value > 0 for value in latencies):
        raise ValueError("a latency is not a positive number")
    return list(latencies)


def process_median(latencies: Sequence[float]) -> float:
    """The one figure of a process."""
    return float(np.median(checked(latencies)))


def summarize(processes: Sequence[Sequence[float]]) -> Summary:
    """The summary of latencies by process; raises `ValueError` as `checked` does."""
    medians = [process_median(latencies) for latencies in processes]
    if not medians:
        raise ValueError("no processes")
    pooled = np.concatenate([np.asarray(latencies) for latencies in processes])
    median = float(np.median(medians))
    quarter, three_quarters = np.percentile(medians, [25, 75])
    p90, p99 = np.percentile(pooled, [90, 99])
    return Summary(
        median, float((three_quarters - quarter) / median), float(p90), float(p99), len(medians)
    )


def apart(processes: Sequence[Sequence[float]]) -> float:
    """How much longer the slowest process took than the fastest, as a share of the fastest."""
    medians = [process_median(latencies) for latencies in processes]
    return max(medians) / min(medians) - 1


def interval_words(pairs: Iterable[int]) -> str:
    """What to call the intervals of comparisons over so many rounds each.

    Of few rounds it is no more than their range, and covers less than `CONFIDENCE` says.
    """
    counts = set(pairs)
    few = sorted(count for count in counts if count < _COVERING)
    words = [] if few and len(few) == len(counts) else [f"{100 * CONFIDENCE:.0f} % interval"]
    if few:
        rounds = "round" if few == [1] else "rounds"
        words.append(f"range of {' or '.join(map(str, few))} {rounds}")
    return ", or ".join(words)


def confidence(looks: int) -> float:
    """The confidence of each of so many looks at growing samples, so that all hold at 90 %.

    Bonferroni's: whoever goes on until an interval says something has as many chances to be misled.
    """
    return 1 - (1 - CONFIDENCE) / looks


def compare(
    candidate: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE
) -> Ratio:
    """The ratio baseline / candidate of two series of process medians, paired by round.

    Raises `ValueError` for series of unequal length, or as `checked` does.
    """
    if len(candidate) != len(baseline):
        raise ValueError(f"unequal counts: {len(candidate)} and {len(baseline)}")
    logs = np.log(checked(baseline)) - np.log(checked(candidate))
    low, high = _interval(logs, confidence)
    return Ratio(math.exp(float(np.median(logs))), math.exp(low), math.exp(high), len(logs))


def _interval(values: np.ndarray, confidence: float) -> tuple[float, float]:
    """The interval of the median of `values` [n]; of too few for the confidence, their range."""
    count, left_out, tail = len(values), 0, 0.0  # on either side
    for lowest in range(count // 2):
        tail += math.comb(count, lowest) / 2**count  # at most so many lie below the true median
        if 2 * tail > 1 - confidence:
            break
        left_out = lowest
    ordered = np.sort(values)
    return float(ordered[left_out]), float(ordered[count - 1 - left_out])


def describe(ratio: Ratio) -> str:
    """A ratio in words: "1.43x (1.38 to 1.47)", "no speed-up (0.98 to 1.02)", ..."""
    interval = f"({ratio.low:.2f} to {ratio.high:.2f})"
    if ratio.verdict == "faster":
        return f"{ratio.ratio:.2f}x {interval}"
    if ratio.verdict == "slower":
        return f"slower: {ratio.ratio:.2f}x {interval}"
    if ratio.verdict == "no speed-up":
        return f"no speed-up {interval}"
    why = "too few pairs" if ratio.pairs < MIN_PAIRS else "noisy machine"
    return f"inconclusive ({why}): {ratio.ratio:.2f}x {interval}"
