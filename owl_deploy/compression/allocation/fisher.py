"""`--allocation fisher`: every Linear's sparsity by what removing weights costs the model's loss.

OWL and its successors guess that cost from statistics of the weights and inputs. It is measured
here: each Linear is pruned to three sparsities around the one asked for, by the method itself, and
one pass backward tells what each of the differences costs, by the Fisher information (see
`sensitivity`). Between them the logarithm of the loss is taken as linear in the sparsity. What was
zero before costs nothing, and does not tell what more would. Then the losses of all Linears
together are made as small as can be, weight by weight (see `knapsack`), which is how EvoPress
(arXiv 2410.14649) states the problem that it searches.
"""

import math
from collections.abc import Iterable, Sequence

from owl_deploy.compression.allocation.rules import hold_mean, in_groups, most_removed
from owl_deploy.compression.allocation.sensitivity import measure_losses
from owl_deploy.compression.methods import METHODS
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.quantization.knapsack import Option, cheapest
from owl_deploy.compression.request import Request
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store

# A method that takes many times another's time, and what is measured in its place.
_STAND_INS = {"alps": "sparsegpt"}
_NEIGHBOURS = 2  # of the N of N:M that are measured on either side
_NOTHING = 1e-12  # nats: a Linear whose inputs are dead costs less
_MISSED = 0.01  # of sparsity, with N:M
_STEPS = 100  # of sparsity that a Linear may take, between none and all


def by_fisher(request: Request, store: Store) -> list[dict[str, float]]:
    """For each block, its pruned Linears' sparsities by name, of the mean that is asked for."""
    settings, shape = request.settings, request.shape
    sizes = shape.linear_sizes
    if not settings.sparsity:
        return shape.by_block([0.0] * len(sizes))
    asked = levels(settings.sparsity, settings.group)
    ways = [Format(settings.bits, sparsity) for sparsity in asked]
    found = measure_losses(request, store, quick(settings), ways)
    linears = [own for block in found for own in block.values()]
    losses = [[one.loss for one in own] for own in linears]
    gone = [own[0].gone for own in linears]
    return shape.by_block(divided(settings.sparsity, settings.group, sizes, asked, losses, gone))


def levels(sparsity: float, group: tuple[int, int] | None) -> list[float]:
    """The sparsities that each Linear is tried at, in order, that asked for among them."""
    if group is not None:
        near = range(group[0] + _NEIGHBOURS, group[0] - _NEIGHBOURS - 1, -1)
        return [1 - kept / group[1] for kept in near if 0 < kept < group[1]]
    kept = 1 - sparsity
    return [1 - min(1.4 * kept, (1 + kept) / 2), sparsity, 1 - 0.6 * kept]


def divided(
    sparsity: float,
    group: tuple[int, int] | None,
    sizes: Sequence[int],
    tried: Sequence[float],
    losses: Sequence[Sequence[float]],
    gone: Sequence[float] = (),
) -> list[float]:
    """The sparsities of Linears of these `sizes` that lose least, of the mean `sparsity`.

    `losses`: of each Linear at each of the sparsities `tried`, which are in order; `gone`: of each
    what was zero before (nothing, if empty), which stays so. With `group` (N, M) each sparsity is
    one of those tried; else any hundredth, of which `most_removed` of a Linear at most. Where more
    was zero before than `sparsity`, that is their mean.
    """
    most = most_removed(sparsity)
    # A few zeros are in any weights; where next to all are, a recipe still has to say a sparsity.
    gone = [min(one, most) if one * _STEPS >= 1 else 0.0 for one in gone] or [0.0] * len(sizes)
    known: list[list[float]] = [list(tried)] * len(sizes)
    if group is None:
        steps = {step / _STEPS for step in range(_STEPS)} | {sparsity, most}
        curves = [_Curve(tried, own, zeros) for own, zeros in zip(losses, gone, strict=True)]
        known = [curve.reachable([one for one in steps if one <= most]) for curve in curves]
        losses = [[curve.at(s) for s in own] for curve, own in zip(curves, known, strict=True)]
    options = [
        [Option(size * (1 - one), loss) for one, loss in zip(own, costs, strict=True)]
        for size, own, costs in zip(sizes, known, losses, strict=True)
    ]
    budget = (1 - sparsity) * sum(sizes) * (1 + 1e-9)  # all of them at the sparsity asked for fit
    found = [own[at] for own, at in zip(known, cheapest(options, budget), strict=True)]
    if group is None:
        # What stays as it was before does so whatever the others move by.
        limits = [one if 0 < one <= zeros else most for one, zeros in zip(found, gone, strict=True)]
        return [round(one, 12) for one in hold_mean(found, sizes, sparsity, limits, gone)]
    found = in_groups(found, sizes, group[1])
    removed = sum(size * one for size, one in zip(sizes, found, strict=True)) / sum(sizes)
    # A few large Linears, of which each step is a large part of all, cannot be divided.
    return found if abs(removed - sparsity) <= _MISSED else [sparsity] * len(sizes)


class _Curve:
    """A Linear's loss at any sparsity, by its `losses` at those `tried`.

    `gone`: what was zero before. What was tried below that removed nothing, and its loss is that of
    rounding alone, if anything; above it the loss rises at once, for the least weights went before.
    (So little that it is less than half of all that was tried changes nothing of that curve.)
    """

    def __init__(self, tried: Sequence[float], losses: Sequence[float], gone: float) -> None:
        near = gone + min(gone / 20, (1 - gone) / 10)  # so little more tells nothing either
        below = sum(one <= near for one in tried)
        self._gone, self._begins = gone, 0.0 if 2 * gone > tried[0] else None
        if below:
            self._begins = losses[below - 1]
        self._tried, self._losses = tried[below:], losses[below:]

    def reachable(self, steps: Iterable[float]) -> list[float]:
        """The sparsities that the `steps` ask for, in order, as far as the loss is known."""
        most = 1.0 if len(self._tried) > 1 else [self._gone, *self._tried][-1]
        return sorted({max(one, self._gone) for one in steps if one <= most})

    def at(self, sparsity: float) -> float:
        """The loss at a `sparsity` that can be reached."""
        if self._begins is None:
            return _between(sparsity, self._tried, self._losses)
        if sparsity <= self._gone:
            return self._begins
        first, loss = self._tried[0], self._losses[0]
        if sparsity <= first:
            share = (sparsity - self._gone) / (first - self._gone)
            return self._begins + share * (loss - self._begins)
        return _between(sparsity, self._tried, self._losses)


def _between(sparsity: float, tried: Sequence[float], losses: Sequence[float]) -> float:
    """The loss at a `sparsity`, by those at the nearest two of the sparsities `tried`."""
    after = next((at for at, one in enumerate(tried) if one >= sparsity), len(tried))
    after = min(max(after, 1), len(tried) - 1)
    (one, loss), (other, more) = (
        (tried[at], math.log(max(losses[at], _NOTHING))) for at in (after - 1, after)
    )
    return math.exp(loss + (more - loss) * (sparsity - one) / (other - one))


def quick(settings: PruneSettings) -> PruneSettings:
    """The settings to measure with: of those that refine what they leave, the method before."""
    method = _STAND_INS.get(settings.method, settings.method)
    options = settings.options if method == settings.method else METHODS[method].options()
    return settings.model_copy(update={"method": method, "options": options, "refit": False})
