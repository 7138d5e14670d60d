"""How sparsity is divided over the blocks: the table of allocations, and the rule of each.

All functions are pure and in float64. A rule maps (target sparsity, weights of each block, the
outlier ratio of each block, spread) to one sparsity a block. Sparsity is the share of weights
removed, in [0, 1]; the mean over the blocks, weighted by their numbers of weights, is the target
whatever the bounds do to it. `spread` is half the range of the sparsities, in every rule.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from owl_deploy.errors import BadInput

Rule = Callable[[float, Sequence[int], Sequence[float], float], list[float]]


@dataclass(frozen=True)
class Allocation:
    """One way to divide sparsity over the blocks, or over the Linears.

    `rule`: None where the sparsities are given one by one, or follow from a budget, or from losses.
    `spread`: the default, which its paper takes; 0 where nothing is spread. `counts_outliers`:
    whether the rule looks at the blocks' outlier ratios, and the outlier multiple (M) means
    anything to it. `losses`: whether it asks, in place of a rule, what each Linear's sparsity would
    cost the model's loss (`allocation/fisher.py`).
    """

    rule: Rule | None
    spread: float = 0.0
    counts_outliers: bool = False
    losses: bool = False

    @property
    def divides(self) -> bool:
        """Whether it divides a sparsity that is asked for."""
        return self.rule is not None or self.losses


def uniform(
    sparsity: float, sizes: Sequence[int], _values: Sequence[float], _spread: float
) -> list[float]:
    """The same sparsity for every block."""
    return [sparsity] * len(sizes)


def owl(
    sparsity: float, sizes: Sequence[int], ratios: Sequence[float], spread: float
) -> list[float]:
    """Less sparsity for blocks with more outliers (OWL, arXiv 2310.05175, section 3.2).

    The densities are the outlier ratios scaled to a range of 2 * `spread`, then moved so that the
    mean is kept. Equal ratios give the uniform sparsity.
    """
    return hold_mean([-density for density in _scaled(ratios, spread)], sizes, sparsity)


def linear(
    sparsity: float, sizes: Sequence[int], _values: Sequence[float], spread: float
) -> list[float]:
    """Sparsity that grows with depth by equal steps (ATP, arXiv 2502.14770); beta (L-1) = 2 spread.

    Errors of early blocks grow through all that follow.
    """
    return hold_mean(_scaled(range(len(sizes)), spread), sizes, sparsity)


def hold_mean(
    wanted: Sequence[float],
    sizes: Sequence[int],
    target: float,
    most: float | Sequence[float] = 1.0,
    least: float | Sequence[float] = 0.0,
) -> list[float]:
    """Move all of `wanted` by one offset, within [least, most]; their weighted mean is then
    `target`.

    The bounds are those of all, or one for each. Water-filling: a block at a bound stays there and
    the others move further, so that neither the mean nor the differences between the blocks inside
    the bounds are lost. Where the bounds leave the target out, the mean is as near as they allow.
    """
    lows, highs = (
        [bound] * len(sizes) if isinstance(bound, float | int) else list(bound)
        for bound in (least, most)
    )
    if min(wanted) == max(wanted) and max(lows) <= target <= min(highs):
        return [target] * len(sizes)
    total = sum(sizes)

    def at(offset: float) -> list[float]:
        bounded = zip(wanted, lows, highs, strict=True)
        return [min(upper, max(lower, value + offset)) for value, lower, upper in bounded]

    # The mean grows with the offset, from `least` to `most` over this range: bisect.
    low, high = min(lows) - max(wanted), max(highs) - min(wanted)
    for _ in range(100):
        middle = (low + high) / 2
        mean = sum(s * n for s, n in zip(at(middle), sizes, strict=True)) / total
        low, high = (middle, high) if mean < target else (low, middle)
    return at(high)


def most_removed(sparsity: float) -> float:
    """The share of a part that may go, so that none is emptied, which no recipe could say.

    Of what the whole model keeps, each part keeps a quarter at least.
    """
    return 1 - (1 - sparsity) / 4


def in_groups(sparsities: Sequence[float], sizes: Sequence[int], group: int) -> list[float]:
    """The nearest sparsities that N:`group` has; their weighted mean nearly stays."""
    return [1 - kept / group for kept in whole_kept(sparsities, sizes, group)]


def whole_kept(sparsities: Sequence[float], sizes: Sequence[int], group: int) -> list[int]:
    """The N of N:`group` for each part, whole numbers that nearly hold the weighted mean.

    Every N is one of the two whole numbers around (1 - sparsity) * `group`: those that lie highest
    above the lower one are rounded up, as long as that brings the mean nearer; of parts of one
    size no other choice comes nearer.
    """
    wanted = [(1 - sparsity) * group for sparsity in sparsities]
    kept = [math.floor(value + 1e-9) for value in wanted]
    short = sum((w - k) * n for w, k, n in zip(wanted, kept, sizes, strict=True))
    by_rest = sorted(range(len(kept)), key=lambda index: kept[index] - wanted[index])
    for index in by_rest:
        if kept[index] < wanted[index] - 1e-9 and abs(short - sizes[index]) < abs(short):
            kept[index] += 1
            short -= sizes[index]
    return kept


def _scaled(values: Sequence[float], spread: float) -> list[float]:
    """`values` moved and scaled to the range [0, 2 * spread]; all 0 when they are equal."""
    lowest, highest = min(values), max(values)
    if highest == lowest:
        return [0.0] * len(values)
    return [(value - lowest) / (highest - lowest) * 2 * spread for value in values]


DEFAULT = "fisher"  # what lost least, with every method and at every sparsity that was measured

# ATP searches its spread; OWL's is its lambda, at 70 %.
ALLOCATIONS: dict[str, Allocation] = {
    "owl": Allocation(owl, 0.08, counts_outliers=True),
    "linear": Allocation(linear, 0.15),
    "uniform": Allocation(uniform),
    "fisher": Allocation(None, losses=True),
    "list": Allocation(None),
    "budget": Allocation(None),
}

# What earlier versions had. Their recipes list layers, and so are read without these names.
GONE = ("lsa", "dlp", "owl-per-linear", "searched")


def check_not_gone(name: object) -> None:
    """Raise `BadInput` for an allocation that only earlier versions had."""
    if name in GONE:
        raise BadInput(
            f"--allocation {name} is gone.", f"Use {DEFAULT} (the default), owl or linear."
        )
