"""Two models by the same documents: which one answered that the other did not, and if by chance."""

import math
from collections.abc import Mapping
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


def beside(reference: Mapping[str, bool], right: Mapping[str, bool]) -> Pairs | None:
    """What `right`, by document, differs in from `reference`; None of other documents, or none."""
    if not right or right.keys() != reference.keys():
        return None
    lost = sum(reference[one] and not now for one, now in right.items())
    won = sum(now and not reference[one] for one, now in right.items())
    return Pairs(len(right), lost, won)
