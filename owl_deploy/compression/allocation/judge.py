"""What divisions of the sparsity cost: how far models that are pruned by them are from the dense.

Many are judged at once, block by block, so that one block at a time is on the device. The models
are put together of Linears that one pass has made (`tried`), by the method itself, at a few levels
of sparsity (EvoPress, arXiv 2410.14649): what a division loses by Wanda's choice says little of
what it loses by SparseGPT's. A sparsity between two levels has some rows as at the one and the
others as at the other. Kept is a byte a weight and level.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from owl_deploy.compression.allocation.interpolate import mixed, of_linear
from owl_deploy.compression.allocation.sparsities import Shape
from owl_deploy.models.blocks import Activations, Skeleton
from owl_deploy.utils.progress import bar

Division = tuple[float, ...]  # the sparsities of all pruned Linears, in model order
# Of a block, by its name: see `tried.Trial`.
Made = Callable[[str], Mapping[str, torch.Tensor]]

_PARTS = 250  # of sparsity that are told apart where no N:M does


@dataclass
class _Branch:
    """Models that are pruned alike so far: the numbers of their divisions, and their states."""

    members: list[int]
    states: Activations


class Judge:
    """Tells the divergence of the model, pruned by one division or another, on `windows`.

    `made` tells of the Linears of a block at each of the sparsities `tried`, which are in order.
    `group`: N and M of a structure N:M, in which sparsities are whole numbers of M. `scratch`: a
    folder for what memory does not hold.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        shape: Shape,
        tried: Sequence[float],
        made: Made,
        windows: torch.Tensor,
        scratch: Path,
        group: tuple[int, int] | None,
    ) -> None:
        self.skeleton, self.shape, self.windows = skeleton, shape, windows
        self.tried, self.made, self.scratch = tried, made, scratch
        self.parts = _PARTS if group is None else group[1]
        self.start = skeleton.embed(windows, len(windows), scratch)
        self.dense = self.start.copy(scratch)
        with bar("Reading held-out text", len(shape.names) * len(windows)) as advance:
            for index, name in enumerate(shape.names):
                with skeleton.loaded(name) as block:
                    self.dense.through(block, index, advance, keep=True)

    @torch.no_grad()
    def divergences(self, divisions: Sequence[Division], places: Sequence[int]) -> list[float]:
        """That of each of the `divisions` on the windows at `places`, in nats a token.

        Models that are pruned alike up to some block are run as one up to there.
        """
        if not divisions:  # more ranks than divisions
            return []
        # In whole parts: what rounds to the same is the same model.
        by_block = [
            self.shape.by_block(round(sparsity * self.parts) for sparsity in division)
            for division in divisions
        ]
        branches = [_Branch(list(range(len(divisions))), self._at(self.start, places))]
        for index, name in enumerate(self.shape.names):
            with self.skeleton.loaded(name) as block:
                asked = [one[index] for one in by_block]
                branches = [part for one in branches for part in _parted(one, asked, self.scratch)]
                self._run(block, index, branches, asked)
        states = [branch.states for branch in branches]
        found = self.skeleton.divergences(
            self.windows[list(places)], self._at(self.dense, places), states
        )
        by_member = {
            member: divergence
            for branch, divergence in zip(branches, found, strict=True)
            for member in branch.members
        }
        return [by_member[number] for number in range(len(divisions))]

    def _run(
        self,
        block: nn.Module,
        index: int,
        branches: Sequence[_Branch],
        asked: Sequence[Mapping[str, int]],
    ) -> None:
        """Run block `index` once for each branch; from one to the next few Linears change."""
        linears, made = self.skeleton.linears(index), self.made(self.shape.names[index])
        dense = {
            name: linears[name].weight.to(torch.float32, copy=True)
            for name in self.shape.linears[index]
        }
        there: dict[str, int] = {}
        for branch in branches:
            for name, parts in asked[branch.members[0]].items():
                if there.get(name) != parts:
                    difference, step = of_linear(made, name)
                    left = mixed(dense[name], difference, step, self.tried, parts / self.parts)
                    linears[name].weight.copy_(left)
                    there[name] = parts
            branch.states.through(block, index, _silent, keep=True)

    @staticmethod
    def _at(states: Activations, places: Sequence[int]) -> Activations:
        """Those of the windows at `places`, to be changed."""
        hidden = states.hidden[list(places)]
        return Activations(hidden, states.arguments, states.batch, states.device)


def _parted(branch: _Branch, asked: Sequence[Mapping[str, int]], scratch: Path) -> list[_Branch]:
    """The branch, parted into those that ask the same of the next block; all but one are copies."""
    parts: list[list[int]] = []
    for member in branch.members:
        alike = [part for part in parts if asked[part[0]] == asked[member]]
        if alike:
            alike[0].append(member)
        else:
            parts.append([member])
    first, *others = parts
    return [
        _Branch(first, branch.states),
        *(_Branch(one, branch.states.copy(scratch)) for one in others),
    ]


def _silent(_units: float) -> None:
    """Progress is told of generations."""
