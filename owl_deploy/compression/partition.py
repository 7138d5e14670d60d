"""Which process prunes which Linear of a block, so that all are done at about the same time."""

from collections.abc import Mapping, Sequence

from torch import nn

from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.utils.ranks import Ranks

# What the loop over columns costs besides its products with later columns, in such products: by the
# times of SparseGPT on SmolLM2's four kinds of Linears, on a core of a Sapphire Rapids.
_A_WEIGHT, _A_COLUMN = 850, 650_000


def owners(
    groups: Sequence[Sequence[str]],
    linears: Mapping[str, nn.Linear],
    size: int,
    *,
    hessian: bool,
) -> dict[str, int]:
    """The rank, below `size`, that prunes each Linear; those of a group go to the same one.

    By cost, the largest first, to the rank that has the least to do by then (Graham's LPT rule, at
    most 4/3 of the best); of equals the first. `hessian`: whether the method factorises X^T X,
    which the Linears of a group share.
    """
    costs = {tuple(group): _cost([linears[name] for name in group], hessian) for group in groups}
    busy = [0.0] * size
    found: dict[str, int] = {}
    for group in sorted(costs, key=lambda one: -costs[one]):
        rank = busy.index(min(busy))
        busy[rank] += costs[group]
        found |= dict.fromkeys(group, rank)
    return found


def divide(
    statistics: InputStatistics, linears: Mapping[str, nn.Linear], ranks: Ranks, *, hessian: bool
) -> dict[str, int]:
    """Together: add up what the `ranks` have seen of each Linear on its owner; the `owners`."""
    found = owners(statistics.groups(), linears, ranks.size, hessian=hessian)
    statistics.reduce(ranks, found)
    return found


def _cost(linears: Sequence[nn.Linear], hessian: bool) -> float:
    """About how long a group takes, in products; comparable within a method only."""
    width = linears[0].in_features
    rows = sum(linear.out_features for linear in linears)
    if hessian:  # factorised and inverted once, then one loop over the columns of all rows
        loop = rows * width * (width / 2 + _A_WEIGHT) + len(linears) * width * _A_COLUMN
        return width**3 / 3 + loop
    return rows * width
