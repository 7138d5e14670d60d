"""`--tune`: find an allocation's parameters on held-out calibration text.

Every candidate of a small grid is judged by the loss of a model pruned with it, cheaply: the dense
pass that measures outliers also gives every layer's input norms, so that one pass over a little
held-out text prunes and runs all candidates, block by block. The values that were asked for, by
default the paper's, are a candidate too, so the result is never worse than they on that text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from owl_deploy.allocation import ALLOCATIONS
from owl_deploy.blocks import Activations, Skeleton
from owl_deploy.errors import BadInput
from owl_deploy.progress import Advance, bar
from owl_deploy.prune import mask, score
from owl_deploy.prune.sparsities import Shape, Statistics, linear_sparsities
from owl_deploy.ranks import ALONE, Ranks
from owl_deploy.recipe import PruneSettings, kept

HELD_OUT_WINDOWS = 4
MULTIPLES = (3.0, 5.0, 7.0, 10.0)
_SPREADS = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2)
_GROUP_WEIGHTS = (0.5, 1.0, 1.5, 2.0)  # half the range of N:M, in weights of a group

LayerNorms = Mapping[str, torch.Tensor]  # the norm of each pruned Linear's inputs, by its name


@dataclass(frozen=True)
class Trial:
    """One candidate and the loss, in nats a token, of the model pruned with it."""

    outlier_multiple: float
    spread: float
    loss: float


def candidates(settings: PruneSettings) -> list[PruneSettings]:
    """What was asked for, then the grid of its allocation.

    Raises `BadInput` for an allocation that has nothing to tune.
    """
    allocation = ALLOCATIONS[settings.allocation]
    if not allocation.tunable:
        tunable = ", ".join(name for name, row in ALLOCATIONS.items() if row.tunable)
        raise BadInput(
            f"The allocation {settings.allocation!r} has nothing to tune.",
            f"Use --tune with one of: {tunable}.",
        )
    spreads: tuple[float, ...] = _SPREADS
    if settings.group is not None:
        spreads = tuple(min(0.5, weights / settings.group[1]) for weights in _GROUP_WEIGHTS)
    multiples = MULTIPLES if allocation.counts_outliers else (settings.outlier_multiple,)
    asked = (settings.outlier_multiple, settings.spread)
    pairs = dict.fromkeys([asked, *((m, s) for m in multiples for s in spreads)])
    return [_with(settings, multiple, spread) for multiple, spread in pairs]


def best(settings: PruneSettings, trials: Sequence[Trial]) -> PruneSettings:
    """`settings` with the values of the trial with the lowest loss; of equals, the first."""
    chosen = min(trials, key=lambda trial: trial.loss)
    return _with(settings, chosen.outlier_multiple, chosen.spread)


def _with(settings: PruneSettings, multiple: float, spread: float) -> PruneSettings:
    return settings.model_copy(update={"outlier_multiple": multiple, "spread": spread})


class Judge:
    """Prunes a model in many ways at once and tells the loss of each on `windows` [n, length].

    `norms`: for each block, the dense model's input norms. Weights are chosen by Wanda's score
    whatever the method is: the order of the candidates hardly depends on it, and it is fast. The
    `ranks` share the candidates.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        shape: Shape,
        norms: Sequence[LayerNorms],
        windows: torch.Tensor,
        scratch: Path,
        ranks: Ranks = ALONE,
    ) -> None:
        self.skeleton, self.shape, self.norms = skeleton, shape, norms
        self.windows, self.scratch, self.ranks = windows, scratch, ranks

    @torch.no_grad()
    def trials(self, settings: Sequence[PruneSettings], statistics: Statistics) -> list[Trial]:
        """One trial for each of `settings`."""
        own = settings[self.ranks.rank :: self.ranks.size]
        losses = [0.0] * len(settings)
        for rank, part in enumerate(self.ranks.gathered(self._losses(own, statistics))):
            losses[rank :: self.ranks.size] = part
        return [
            Trial(one.outlier_multiple, one.spread, loss)
            for one, loss in zip(settings, losses, strict=True)
        ]

    def _losses(self, settings: Sequence[PruneSettings], statistics: Statistics) -> list[float]:
        if not settings:  # more ranks than candidates
            return []
        found = [linear_sparsities(one, self.shape, statistics) for one in settings]
        start = self.skeleton.embed(self.windows, len(self.windows), self.scratch)
        states = [start.copy() for _ in settings]
        total = len(self.shape.names) * len(settings) * len(self.windows)
        with bar("Trying allocations", total) as advance:
            for index in range(len(self.shape.names)):
                asked = [blocks[index] for blocks in found]
                self._run_block(index, asked, settings[0].group, states, advance)
        return self.skeleton.losses(self.windows, states)

    def _run_block(
        self,
        index: int,
        asked: Sequence[Mapping[str, float]],
        group: tuple[int, int] | None,
        states: Sequence[Activations],
        advance: Advance,
    ) -> None:
        """Run block `index` once for each state, its Linears pruned to what that state asks."""
        with self.skeleton.loaded(self.shape.names[index]) as block:
            linears = self.skeleton.linears(index)
            dense = {name: linears[name].weight.clone() for name in self.shape.linears[index]}
            scores = {
                name: score.wanda(weight.float(), self.norms[index][name])
                for name, weight in dense.items()
            }
            for state, wanted in zip(states, asked, strict=True):
                for name, weight in dense.items():
                    removed = _removed(scores[name], wanted[name], group)
                    linears[name].weight.copy_(weight.masked_fill(removed, 0))
                state.through(block, index, advance, keep=True)


def _removed(scores: torch.Tensor, sparsity: float, group: tuple[int, int] | None) -> torch.Tensor:
    if group is None:
        return mask.lowest_in_rows(scores, sparsity)
    return mask.lowest_in_groups(scores, kept(sparsity, group[1]), group[1])
