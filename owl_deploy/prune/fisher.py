"""`--allocation fisher`: every Linear's sparsity by what removing weights costs the model's loss.

OWL and its successors guess that cost from statistics of the weights and inputs. It is measured
here: each Linear is pruned to three sparsities around the one asked for, by the method itself, and
one pass backward tells what each of the differences costs, by the Fisher information (see
`sensitivity`). Between them the logarithm of the loss is taken as linear in the sparsity. Then the
losses of all Linears together are made as small as can be, weight by weight (see `knapsack`), which
is how EvoPress (arXiv 2410.14649) states the problem that it searches.
"""

import math
from collections.abc import Sequence

from owl_deploy.allocation import hold_mean, most_removed, whole_kept
from owl_deploy.methods import METHODS
from owl_deploy.prune.formats import Format
from owl_deploy.prune.knapsack import Option, cheapest
from owl_deploy.prune.request import Request
from owl_deploy.prune.sensitivity import measure_losses
from owl_deploy.prune.store import Store
from owl_deploy.recipe import PruneSettings

# A method that takes many times another's time, and what is measured in its place.
_STAND_INS = {"alps": "sparsegpt"}
_NEIGHBOURS = 2  # of the N of N:M that are measured on either side
_NOTHING = 1e-12  # nats: a Linear whose inputs are dead costs less
_STEPS = 100  # of sparsity that a Linear may take, between none and all


def by_fisher(request: Request, store: Store) -> list[dict[str, float]]:
    """For each block, its pruned Linears' sparsities by name, of the mean that is asked for."""
    settings, shape = request.settings, request.shape
    sizes = [size for own in shape.linears for size in own.values()]
    if not settings.sparsity:
        return shape.by_block([0.0] * len(sizes))
    asked = levels(settings.sparsity, settings.group)
    ways = [Format(settings.bits, sparsity) for sparsity in asked]
    found = measure_losses(request, store, _quick(settings), ways, errors=False)
    losses = [[one.loss for one in own] for block in found for own in block.values()]
    return shape.by_block(divided(settings.sparsity, settings.group, sizes, asked, losses))


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
) -> list[float]:
    """The sparsities of Linears of these `sizes` that lose least, of the mean `sparsity`.

    `losses`: of each Linear at each of the sparsities `tried`, which are in order. With `group`
    (N, M) each is one of those; else any hundredth, of which `most_removed` of a Linear at most.
    """
    most = most_removed(sparsity)
    known = list(tried)
    if group is None:
        steps = [step / _STEPS for step in range(_STEPS)]
        known = sorted({one for one in (*steps, sparsity, most) if one <= most})
        losses = [[_between(one, tried, own) for one in known] for own in losses]
    options = [
        [Option(size * (1 - one), loss) for one, loss in zip(known, own, strict=True)]
        for size, own in zip(sizes, losses, strict=True)
    ]
    budget = (1 - sparsity) * sum(sizes) * (1 + 1e-9)  # all of them at the sparsity asked for fit
    found = [known[at] for at in cheapest(options, budget)]
    if group is None:
        return [round(one, 12) for one in hold_mean(found, sizes, sparsity, most)]
    return [1 - kept / group[1] for kept in whole_kept(found, sizes, group[1])]


def _between(sparsity: float, tried: Sequence[float], losses: Sequence[float]) -> float:
    """The loss at a `sparsity`, by those at the nearest two of the sparsities `tried`."""
    after = next((at for at, one in enumerate(tried) if one >= sparsity), len(tried))
    after = min(max(after, 1), len(tried) - 1)
    (one, loss), (other, more) = (
        (tried[at], math.log(max(losses[at], _NOTHING))) for at in (after - 1, after)
    )
    return math.exp(loss + (more - loss) * (sparsity - one) / (other - one))


def _quick(settings: PruneSettings) -> PruneSettings:
    """The settings to measure with: of those that refine what they leave, the method before."""
    method = _STAND_INS.get(settings.method, settings.method)
    options = settings.options if method == settings.method else METHODS[method].options()
    return settings.model_copy(update={"method": method, "options": options, "refit": False})
