"""What divisions of the sparsity cost: how far models that are pruned by them are from the dense.

Many are judged at once, block by block, so that one block at a time is on the device. Weights go in
the order of Wanda's scores under the dense model's own inputs, whatever the method is: that order
is found once, and a byte a weight tells how early each goes. (EvoPress, arXiv 2410.14649, keeps
every Linear pruned to every level by the method itself: for 7B a hundred gigabytes.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from owl_deploy.blocks import Activations, Skeleton, room_for
from owl_deploy.progress import bar
from owl_deploy.prune import score
from owl_deploy.prune.sparsities import Shape

Division = tuple[float, ...]  # the sparsities of all pruned Linears, in model order
LayerNorms = Mapping[str, torch.Tensor]  # the norm of each pruned Linear's inputs, by its name

LEVELS = 250  # of sparsity that are told apart where no N:M does; a byte holds them


@dataclass
class _Branch:
    """Models that are pruned alike so far: the numbers of their divisions, and their states."""

    members: list[int]
    states: Activations


class Judge:
    """Tells the divergence of the model, pruned by one division or another, on `windows`.

    `norms`: for each block, the dense model's input norms. `group`: N and M of a structure N:M, in
    which sparsities are whole numbers of M. `scratch`: a folder for what memory does not hold.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        shape: Shape,
        norms: Sequence[LayerNorms],
        windows: torch.Tensor,
        scratch: Path,
        group: tuple[int, int] | None,
    ) -> None:
        self.skeleton, self.shape, self.windows = skeleton, shape, windows
        self.group, self.scratch = group, scratch
        self.levels = LEVELS if group is None else group[1]
        self.start = skeleton.embed(windows, len(windows), scratch)
        self.dense = self.start.copy(scratch)
        self.orders: list[dict[str, torch.Tensor]] = []
        self._order(norms)

    @torch.no_grad()
    def divergences(self, divisions: Sequence[Division], places: Sequence[int]) -> list[float]:
        """That of each of the `divisions` on the windows at `places`, in nats a token.

        Models that are pruned alike up to some block are run as one up to there.
        """
        if not divisions:  # more ranks than divisions
            return []
        # In whole levels: what rounds to the same is the same model.
        by_block = [
            self.shape.by_block(round(sparsity * self.levels) for sparsity in division)
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
        linears = self.skeleton.linears(index)
        dense = {name: linears[name].weight.clone() for name in self.shape.linears[index]}
        there: dict[str, int] = {}
        for branch in branches:
            for name, level in asked[branch.members[0]].items():
                if there.get(name) != level:
                    stays = self.orders[index][name].to(dense[name].device) >= level
                    torch.mul(dense[name], stays, out=linears[name].weight)
                    there[name] = level
            branch.states.through(block, index, _silent, keep=True)

    @torch.no_grad()
    def _order(self, norms: Sequence[LayerNorms]) -> None:
        """Find for every weight the first level at which it goes, less one; run the dense model."""
        names, sizes = self.shape.names, self.shape.linear_sizes
        # In one piece: half of what is free is asked of all of them, and not of each again.
        whole = room_for((sum(sizes),), torch.uint8, self.skeleton.device, self.scratch)
        rooms = iter(torch.split(whole, sizes))
        with bar("Ordering weights", len(names) * len(self.windows)) as advance:
            for index, name in enumerate(names):
                with self.skeleton.loaded(name) as block:
                    linears = self.skeleton.linears(index)
                    self.orders.append({})
                    for key in self.shape.linears[index]:
                        scores = score.wanda(linears[key].weight.float(), norms[index][key])
                        order = next(rooms).view_as(scores)
                        self.orders[index][key] = order.copy_(levels(scores, self.group))
                    self.dense.through(block, index, advance, keep=True)

    @staticmethod
    def _at(states: Activations, places: Sequence[int]) -> Activations:
        """Those of the windows at `places`, to be changed."""
        hidden = states.hidden[list(places)]
        return Activations(hidden, states.arguments, states.batch, states.device)


def levels(scores: torch.Tensor, group: tuple[int, int] | None) -> torch.Tensor:
    """For each weight of `scores` [out, in] how many levels of sparsity it stays for, uint8.

    It goes where the sparsity is more than that many of M parts, or of `LEVELS` in a whole row.
    """
    size = scores.shape[1] if group is None else group[1]
    places = scores.reshape(-1, size).argsort(dim=1, stable=True).argsort(dim=1)
    if group is None:
        places = places * LEVELS // size
    return places.to(torch.uint8).view_as(scores)


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
