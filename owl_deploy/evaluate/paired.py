"""Two models by the same documents, or the same windows of a text: what differs, and if by chance.

Much of what makes one window harder than another it does to both models: paired, a difference shows
that two perplexities with their own errors would hide.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Pairs:
    """A model beside a reference: documents that it `lost` or `won`, of all that both were asked.

    `p_value`: how often chance alone would split those at least so unevenly, each to either side
    alike: the exact form of McNemar's test (McNemar 1947, Psychometrika 12:153), two-sided.
    """

    documents: int
    lost: int
    won: int

    @property
    def p_value(self) -> float:
        """1.0 where nothing differs."""
        differ = self.lost + self.won
        tail = sum(math.comb(differ, few) for few in range(min(self.lost, self.won) + 1))
        return min(1.0, 2 * tail / (1 << differ))


# Student's t that 97.5 % lie below, for 1 to 10 degrees of freedom.
_T = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def _t(freedom: int) -> float:
    """Beyond the table near enough: 1.98 for 100, where it is 1.984."""
    return _T[freedom - 1] if freedom <= len(_T) else 1.96 + 2.6 / freedom


@dataclass(frozen=True)
class LossPairs:
    """A model's loss beside a reference's, in nats a token.

    `difference`: the mean over `windows`; `stderr`: of that mean, by what the windows differ in
    among themselves.
    """

    windows: int
    difference: float
    stderr: float

    @property
    def may_be_chance(self) -> bool:
        """Whether so large a difference comes more than once in twenty times where there is none:
        by Student's t, since few windows do not tell well what they differ in.
        """
        return abs(self.difference) < _t(self.windows - 1) * self.stderr


def losses_beside(reference: Sequence[float], losses: Sequence[float]) -> LossPairs | None:
    """What `losses`, of each window of a text, differ by from those of `reference`; None of one."""
    if len(losses) < 2:
        return None
    each = [now - before for before, now in zip(reference, losses, strict=True)]
    return LossPairs(
        len(each), statistics.fmean(each), statistics.stdev(each) / math.sqrt(len(each))
    )


def beside(reference: Mapping[str, bool], right: Mapping[str, bool]) -> Pairs | None:
    """What `right`, by document, differs in from `reference`; None of other documents, or none."""
    if not right or right.keys() != reference.keys():
        return None
    lost = sum(reference[one] and not now for one, now in right.items())
    won = sum(now and not reference[one] for one, now in right.items())
    return Pairs(len(right), lost, won)
