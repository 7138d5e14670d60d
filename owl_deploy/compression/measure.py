"""The pass over the dense model: what enters each block's Linears, and what allocations ask."""

import pkgutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from owl_deploy.compression.allocation.rules import ALLOCATIONS, Allocation
from owl_deploy.compression.allocation.sparsities import BlockStatistics
from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.compression.partition import divide
from owl_deploy.compression.pruning import score
from owl_deploy.compression.request import Request
from owl_deploy.models.blocks import Activations
from owl_deploy.utils.progress import Advance, bar

LayerNorms = Mapping[str, torch.Tensor]  # the norm of each pruned Linear's inputs, by its name

VALUES = "v_proj"  # the Linear that attention averages, in every family that does not fuse it


@dataclass(frozen=True)
class Measured:
    """What one dense pass gives: each block's statistics.

    `first`: the first block's inputs, which are those of the pruning pass, too; no later block's
    are. None where they are spent.
    """

    statistics: list[BlockStatistics]
    first: InputStatistics | None


@torch.no_grad()
def measure(request: Request, scratch: Path) -> Measured:
    """Each block's statistics under the dense model's own activations.

    `scratch` is a folder for states that memory does not hold.
    """
    skeleton, shape = request.skeleton, request.shape
    asked = ALLOCATIONS[request.settings.allocation].statistic
    by_hessian = asked.measure if asked is not None and asked.hessian else None
    hidden = skeleton.embed(request.own_windows, request.batch, scratch)
    norms: list[LayerNorms] = []
    statistics: dict[int, BlockStatistics] = {}
    of_hessians: list[list[float]] = []
    first = None
    with bar("Measuring outliers", len(shape.names) * request.steps) as advance:
        for index, name in enumerate(shape.names):
            with skeleton.loaded(name) as block:
                inputs = gather(
                    request,
                    block,
                    index,
                    hidden,
                    advance,
                    keep=index + 1 < len(shape.names),
                    hessian=bool(by_hessian)
                    or (index == 0 and request.settings.needs == "hessian"),
                )
                norms.append(inputs.norms(request.ranks))
                if request.ranks.size == 1:  # the block is at hand
                    statistics[index] = _statistics(request, index, norms[index])
                if by_hessian:
                    of_hessians.append(_of_hessians(request, index, inputs, by_hessian))
            first = first or inputs
    if request.ranks.size > 1:
        statistics = _divided(request, norms)
    found = [statistics[index] for index in range(len(norms))]
    if by_hessian:
        found = [
            replace(one, values=values) for one, values in zip(found, of_hessians, strict=True)
        ]
    return Measured(found, None if by_hessian else first)


def _of_hessians(
    request: Request, index: int, inputs: InputStatistics, measure: str
) -> list[float]:
    """What `measure` finds of block `index`, which is loaded, or of its Linears; spends `inputs`.

    Of several processes each measures its Linears.
    """
    ranks, linears = request.ranks, request.skeleton.linears(index)
    owner = divide(inputs, linears, ranks, hessian=True)
    value = pkgutil.resolve_name(measure)
    own = {
        key: torch.tensor(
            [value(linears[key].weight.float(), inputs.hessian(key))],
            dtype=torch.float64,
        )
        for key in request.shape.linears[index]
        if owner[key] == ranks.rank
    }
    found = ranks.merged(own, request.skeleton.device)
    values = [found[key].item() for key in request.shape.linears[index]]
    if not values or ALLOCATIONS[request.settings.allocation].per == "Linear":
        return values
    return [sum(values) / len(values)]


def _statistics(request: Request, index: int, norms: LayerNorms) -> BlockStatistics:
    """Those of block `index`, which is loaded, by the norms of its inputs."""
    linears = request.skeleton.linears(index)
    scores = [score.wanda(linears[key].weight.float(), norm) for key, norm in norms.items()]
    settings = request.settings
    return block_statistics(scores, settings.outlier_multiple, ALLOCATIONS[settings.allocation])


def _divided(request: Request, norms: Sequence[LayerNorms]) -> dict[int, BlockStatistics]:
    """The statistics of all blocks; the ranks take turns at them, none waiting for another."""
    skeleton, ranks = request.skeleton, request.ranks
    found: dict[int, BlockStatistics] = {}
    for index in range(ranks.rank, len(norms), ranks.size):
        with skeleton.loaded(skeleton.names[index]):
            found[index] = _statistics(request, index, norms[index])
    for part in ranks.gathered(found):
        found |= part
    return found


def gather(
    request: Request,
    block: nn.Module,
    index: int,
    hidden: Activations,
    advance: Advance,
    *,
    keep: bool,
    hessian: bool,
) -> InputStatistics:
    """What enters the pruned Linears of block `index`; with `keep` its outputs replace `hidden`."""
    pruned = request.shape.linears[index]
    inputs = empty_statistics(request, index, pruned, hessian=hessian)
    with inputs.gathering(inputs_only=not keep):
        hidden.through(block, index, advance, keep=keep)
    return inputs


def empty_statistics(
    request: Request, index: int, names: Collection[str], *, hessian: bool
) -> InputStatistics:
    """Those of the Linears `names` of block `index`, nothing gathered yet.

    The inputs of a v_proj that is rounded count by their running means as well, for attention
    averages its outputs.
    """
    linears = request.skeleton.linears(index)
    rounded = hessian and request.settings.rounds
    return InputStatistics(
        {key: linears[key] for key in names},
        request.samples,
        hessian=hessian,
        read=[key for key in names if rounded and key.endswith(VALUES)],
    )


def gather_head(
    request: Request, hidden: Activations, advance: Advance, *, hessian: bool
) -> InputStatistics:
    """What enters the head, by `hidden`, what left the last block for this process's windows."""
    skeleton, name = request.skeleton, request.skeleton.family.head
    statistics = InputStatistics({name: skeleton.head}, request.samples, hessian=hessian)
    with statistics.gathering():
        skeleton.enter_head(request.own_windows, hidden, advance)
    statistics.reduce(request.ranks, {name: 0})
    return statistics


def block_statistics(
    scores: Sequence[torch.Tensor], multiple: float, allocation: Allocation
) -> BlockStatistics:
    """The statistics of one block by Wanda's scores of its pruned Linears, each [out, in].

    `multiple`: of their mean, from which scores are outliers.
    """
    a_block = allocation.per == "block"
    if not scores:  # every Linear of the block is skipped
        return BlockStatistics(None, [])
    ratio = score.outlier_ratio(scores, multiple)
    if allocation.statistic is None or allocation.statistic.hessian:  # found apart, if anything
        return BlockStatistics(ratio, [])
    value = pkgutil.resolve_name(allocation.statistic.measure)
    if a_block and value is score.outlier_ratio:
        return BlockStatistics(ratio, [ratio])
    parts = [scores] if a_block else [[one] for one in scores]
    return BlockStatistics(ratio, [value(part, multiple) for part in parts])
