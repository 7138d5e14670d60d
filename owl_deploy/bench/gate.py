"""Is it still as fast, and as right, as it was? A verdict on a deployment against a baseline file.

Asked in this order, each only when the one before has nothing against it: are the two runs
comparable; are the logits the same; are the counters (bytes, nodes, non-zeros) no worse; is the
time, as a ratio to the reference deployment run in the same session, no worse. Everything here is
a pure function of what was measured. It never fails open: what is missing is INCOMPARABLE, what is
not certain INCONCLUSIVE.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from owl_deploy.bench import stats

Word = Literal["OK", "IMPROVED", "REGRESSED", "INCONCLUSIVE", "INCOMPARABLE"]
EXIT_CODES: dict[Word, int] = {
    "OK": 0,
    "IMPROVED": 0,
    "REGRESSED": 1,
    "INCONCLUSIVE": 3,
    "INCOMPARABLE": 3,
}
# From the worst to the best: the worst of a run's verdicts is the run's.
_ORDER: tuple[Word, ...] = ("REGRESSED", "INCOMPARABLE", "INCONCLUSIVE", "IMPROVED", "OK")
MIN_ROUNDS = 8
# Of the setting; baselines of earlier versions lack them.
REFERENCE_ENGINE, REFERENCE_MODEL = "reference engine", "reference model"
LOOKS = 3  # 8 rounds, 16 and at most 24, until there is an answer
_RESAMPLES = 4000


@dataclass(frozen=True)
class Verdict:
    """One answer: on which `metric`, the `word`, and why in a sentence."""

    metric: str
    word: Word
    why: str


@dataclass(frozen=True)
class Side:
    """What one run says of a deployment, saved or just measured.

    `setting` must be equal on both sides; `cpu` may differ. `probe`: some of the logits of a few
    greedy steps [steps, columns] as lists, `tokens` chosen, `largest`, the logits of those, and
    `scale`, the largest of all; of a run that is checked also `of_saved`, its logits of the tokens
    that the saved one chose. `ratios`: for each metric one log ratio a round, of the candidate's
    time over the reference's.
    """

    setting: Mapping[str, Any]
    cpu: str
    probe: Mapping[str, Any]
    counters: Mapping[str, Any]
    peak_bytes: int
    ratios: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Margins:
    """How much worse is allowed, as shares; `logits` over the largest logit."""

    time: float = 0.05
    memory: float = 0.10
    bytes: float = 0.01
    nonzeros: float = 0.001
    logits: float = 1e-3


def overall(verdicts: Sequence[Verdict]) -> Word:
    """The verdict of a run: the worst; of nothing at all, INCOMPARABLE."""
    words = [verdict.word for verdict in verdicts]
    return next((word for word in _ORDER if word in words), "INCOMPARABLE")


def exit_code(word: Word, strict: bool = False) -> int:
    """The exit code of a verdict; `strict` makes what is not known a failure."""
    code = EXIT_CODES[word]
    return 1 if strict and code == 3 else code


def check_setting(saved: Side, now: Side) -> list[Verdict]:
    """Whether the runs can be compared: nothing when they can."""
    found = []
    for key in sorted({*saved.setting, *now.setting}):
        was, is_now = saved.setting.get(key), now.setting.get(key)
        if key in (REFERENCE_ENGINE, REFERENCE_MODEL) and was is None:
            continue
        if was != is_now:
            found.append(Verdict(key, "INCOMPARABLE", f"was {_short(was)}, is {_short(is_now)}"))
    return found


def _short(value: Any) -> str:  # noqa: ANN401 - any JSON value
    text = "not said" if value is None else str(value)
    return text if len(text) < 60 else text[:57] + "..."


def check_probe(saved: Side, now: Side, margins: Margins) -> list[Verdict]:
    """Whether the deployment computes what it did, over a few greedy tokens."""
    was, is_now = np.asarray(saved.probe["logits"]), np.asarray(now.probe["logits"])
    if was.shape != is_now.shape or was.size == 0:
        return [Verdict("logits", "INCOMPARABLE", f"shapes {was.shape} and {is_now.shape}")]
    if not np.isfinite(is_now).all():
        return [Verdict("logits", "REGRESSED", "not all are finite numbers")]
    # After the first token that differs, the two runs answer different questions.
    same = _common_prefix(saved.probe["tokens"], now.probe["tokens"])
    compared = min(same + 1, len(was))
    apart = np.abs(was[:compared] - is_now[:compared]).max()
    if "largest" in saved.probe:  # baselines of earlier versions hold nothing to tell a tie by
        if not {"largest", "of_saved"} <= now.probe.keys():
            return [Verdict("logits", "INCOMPARABLE", "the logits of the saved tokens are missing")]
        # Where the tokens differ, both are near the top on both sides, or it is no tie.
        of_now = np.asarray([now.probe["largest"], now.probe["of_saved"]])[:, :compared]
        tops = np.asarray(saved.probe["largest"])[:compared]
        apart = np.maximum(apart, np.abs(of_now - tops).max())
    share = float(apart) / max(abs(float(saved.probe["scale"])), 1e-30)
    text = f"differ by {share:.1e} of the largest logit, {same} of {len(was)} tokens the same"
    return [Verdict("logits", "OK" if share <= margins.logits else "REGRESSED", text)]


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = list(zip(one, other, strict=False))
    return next((index for index, (a, b) in enumerate(pairs) if a != b), len(pairs))


def check_counters(saved: Side, now: Side, margins: Margins) -> list[Verdict]:
    """Whether the model is no larger, in bytes, nodes, and non-zeros."""
    was, is_now = saved.counters, now.counters
    found = [_counted("bytes", was["bytes"], is_now["bytes"], margins.bytes)]
    found += _check_nodes(was["nodes"], is_now["nodes"])
    if was["nonzeros"].keys() != is_now["nonzeros"].keys():
        names = sorted(was["nonzeros"].keys() ^ is_now["nonzeros"].keys())
        found.append(Verdict("nonzeros", "INCOMPARABLE", f"other tensors: {_short(names)}"))
    else:
        for name, count in was["nonzeros"].items():
            verdict = _counted(
                f"nonzeros: {name}", count, is_now["nonzeros"][name], margins.nonzeros
            )
            if verdict.word != "OK":
                found.append(verdict)
    return found


def _check_nodes(was: Mapping[str, int], is_now: Mapping[str, int]) -> list[Verdict]:
    """The verdict on all nodes together: one of a new kind may do the work of several others."""
    changed = [
        f"{kind} {was.get(kind, 0)} to {is_now.get(kind, 0)}"
        for kind in sorted({*was, *is_now})
        if was.get(kind, 0) != is_now.get(kind, 0)
    ]
    if not changed:
        return []
    verdict = _counted("nodes", sum(was.values()), sum(is_now.values()), 0.0)
    return [replace(verdict, why=f"{verdict.why} ({', '.join(changed)})")]


def _counted(metric: str, was: float, is_now: float, margin: float) -> Verdict:
    text = f"{was:,} before, {is_now:,} now"
    if is_now > was * (1 + margin):
        return Verdict(metric, "REGRESSED", text)
    return Verdict(metric, "IMPROVED" if is_now < was * (1 - margin) else "OK", text)


def check_memory(saved: Side, now: Side, margins: Margins) -> list[Verdict]:
    """Whether peak memory is no higher; only asked of the same processor model."""
    if saved.cpu != now.cpu:
        return []
    mib = [round(side.peak_bytes / 2**20) for side in (saved, now)]
    return [_counted("peak memory, MiB", mib[0], mib[1], margins.memory)]


def check_time(saved: Side, now: Side, margins: Margins, looks: int = LOOKS) -> list[Verdict]:
    """Whether each metric's ratio to the reference is no worse than it was.

    `looks`: how often that may be asked at most, of growing samples.
    """
    if saved.ratios.keys() != now.ratios.keys():
        names = sorted(saved.ratios.keys() ^ now.ratios.keys())
        return [Verdict("time", "INCOMPARABLE", f"other metrics: {', '.join(names)}")]
    return [
        judge_time(metric, saved.ratios[metric], now.ratios[metric], margins.time, looks)
        for metric in saved.ratios
    ]


def judge_time(
    metric: str,
    was: Sequence[float],
    is_now: Sequence[float],
    margin: float,
    looks: int = LOOKS,
    seed: int = 0,
) -> Verdict:
    """One metric: the whole 90 % interval of the change must lie beyond the margin to be a change.

    `was` and `is_now` are log ratios of the candidate's time over the reference's, one a round.
    """
    for ratios in (was, is_now):
        if not all(math.isfinite(value) for value in ratios):
            return Verdict(metric, "INCOMPARABLE", "a time is not a number")
    rounds = min(len(was), len(is_now))
    if rounds < MIN_ROUNDS:
        return Verdict(metric, "INCONCLUSIVE", f"{rounds} rounds, and {MIN_ROUNDS} are needed")
    change, low, high = difference(was, is_now, looks, seed)
    text = f"{change - 1:+.1%} time ({low - 1:+.1%} to {high - 1:+.1%}), margin {margin:.0%}"
    if low > 1 + margin:
        return Verdict(metric, "REGRESSED", text)
    if high < 1 - margin:
        return Verdict(metric, "IMPROVED", text)
    if high <= 1 + margin:
        return Verdict(metric, "OK", text)
    return Verdict(metric, "INCONCLUSIVE", text + ": the machine is too noisy to tell")


def difference(
    was: Sequence[float], is_now: Sequence[float], looks: int = LOOKS, seed: int = 0
) -> tuple[float, float, float]:
    """How many times the time of before is needed now, and its interval.

    Both sides' rounds are resampled: the saved ratio is no more certain than the new one. At 90 %
    over all `looks`.
    """
    generator = np.random.default_rng(seed)

    def medians(values: Sequence[float]) -> np.ndarray:
        picks = generator.integers(0, len(values), (_RESAMPLES, len(values)))
        result: np.ndarray = np.median(np.asarray(values)[picks], axis=1)
        return result

    tail = (1 - stats.confidence(looks)) / 2
    low, high = np.quantile(medians(is_now) - medians(was), [tail, 1 - tail])
    centre = float(np.median(is_now) - np.median(was))
    return math.exp(centre), math.exp(float(low)), math.exp(float(high))
