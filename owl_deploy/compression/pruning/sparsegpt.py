"""SparseGPT: remove weights and let the others of their row make up for them (arXiv 2301.00774)."""

import torch

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.methods import SparseGPTOptions
from owl_deploy.compression.pruning import mask
from owl_deploy.compression.pruning.by_score import Group
from owl_deploy.compression.pruning.obs import Choose, Factor, Sweep, Swept, factorise
from owl_deploy.compression.quantization.grid import Grid


def prune(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: SparseGPTOptions
) -> torch.Tensor:
    """The method, as the table of methods calls it (see `by_score`)."""
    factor = inputs.of_hessian(factorise, options.dampening)
    return updated(weight, factor, sparsity, group, options).weight


def joint(
    weight: torch.Tensor,
    inputs: Inputs,
    sparsity: float,
    group: Group,
    options: SparseGPTOptions,
    grid: Grid,
) -> Swept:
    """The method, with what stays rounded to `grid` in the same pass.

    Dampened more than the options say where there is little text, as any rounding.
    """
    factor = inputs.of_hessian(factorise, inputs.dampening(options.dampening))
    return updated(weight, factor, sparsity, group, options, grid)


def updated(
    weight: torch.Tensor,
    factor: Factor,
    sparsity: float,
    group: Group,
    options: SparseGPTOptions,
    grid: Grid | None = None,
) -> Swept:
    """The pruned and updated weight [out, in], float32, from a dense one (algorithm 1).

    Unstructured (`group` None): of each block of columns the weights with the lowest
    w^2 / [H^-1]_jj over all rows go, so many that the blocks together meet `sparsity`. With `group`
    (N, M): all but N in every M neighbours of a row. With a `grid`: rounded to it, too.
    """
    weight = weight.float()
    keep_zero = weight == 0 if options.preserve_mask else None
    weight = weight.masked_fill(factor.dead, 0)
    width = max(group[1] if group else 1, grid.group if grid else 1)
    step = max(options.block_size - options.block_size % width, width)  # no group straddles two
    choose = _choose(len(weight), factor, sparsity, group, keep_zero)
    return Sweep(choose, group[1] if group else step, step, grid).over(weight, factor.upper)


def _choose(
    rows: int, factor: Factor, sparsity: float, group: Group, keep_zero: torch.Tensor | None
) -> Choose:
    """Which columns go, by the error that removing a weight makes."""
    pivots = factor.upper.diagonal()

    def choose(place: slice, columns: torch.Tensor) -> torch.Tensor:
        scores = (columns.T / pivots[place]) ** 2
        zero = None if keep_zero is None else keep_zero[:, place]
        if zero is not None:
            scores.masked_fill_(zero, -1)  # gone already
        if group:
            gone = mask.lowest_in_groups(scores, *group)
        else:
            # The count is what is due by the last column: rounding never adds up.
            due = round(sparsity * rows * place.stop) - round(sparsity * rows * place.start)
            gone = mask.lowest_in_matrix(scores, due / scores.numel())
        return gone if zero is None else gone | zero

    return choose
