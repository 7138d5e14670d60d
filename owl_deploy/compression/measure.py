"""The pass over the dense model: what enters each block's Linears, and the outlier ratios."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.compression.pruning import score
from owl_deploy.compression.request import Request
from owl_deploy.models.blocks import Activations
from owl_deploy.utils.progress import Advance, bar

LayerNorms = Mapping[str, torch.Tensor]  # the norm of each pruned Linear's inputs, by its name

VALUES = "v_proj"  # the Linear that attention averages, in every family that does not fuse it


@dataclass(frozen=True)
class Measured:
    """What one dense pass gives: each block's outlier ratio, in percent; None where all is skipped.

    `first`: the first block's inputs, which are those of the pruning pass, too; no later block's
    are. None where they are spent.
    """

    outlier_ratios: list[float | None]
    first: InputStatistics | None


@torch.no_grad()
def measure(request: Request, scratch: Path) -> Measured:
    """Each block's outlier ratio under the dense model's own activations.

    `scratch` is a folder for states that memory does not hold.
    """
    skeleton, shape = request.skeleton, request.shape
    hidden = skeleton.embed(request.own_windows, request.batch, scratch)
    norms: list[LayerNorms] = []
    ratios: dict[int, float | None] = {}
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
                    hessian=index == 0 and request.settings.needs == "hessian",
                )
                norms.append(inputs.norms(request.ranks))
                if request.ranks.size == 1:  # the block is at hand
                    ratios[index] = _outlier_ratio(request, index, norms[index])
            first = first or inputs
    if request.ranks.size > 1:
        ratios = _divided(request, norms)
    return Measured([ratios[index] for index in range(len(norms))], first)


def _outlier_ratio(request: Request, index: int, norms: LayerNorms) -> float | None:
    """That of block `index`, which is loaded, by the norms of its inputs."""
    linears = request.skeleton.linears(index)
    scores = [score.wanda(linears[key].weight.float(), norm) for key, norm in norms.items()]
    return score.outlier_ratio(scores, request.settings.outlier_multiple) if scores else None


def _divided(request: Request, norms: Sequence[LayerNorms]) -> dict[int, float | None]:
    """The outlier ratios of all blocks; the ranks take turns at them, none waiting for another."""
    skeleton, ranks = request.skeleton, request.ranks
    ratios: dict[int, float | None] = {}
    for index in range(ranks.rank, len(norms), ranks.size):
        with skeleton.loaded(skeleton.names[index]):
            ratios[index] = _outlier_ratio(request, index, norms[index])
    for part in ranks.gathered(ratios):
        ratios |= part
    return ratios


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
