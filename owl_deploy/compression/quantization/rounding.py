"""Round what a method leaves of a weight to a grid, with compensation (`owl prune --bits`).

A column that is rounded early has more of the others to make up for it, so that those with the
largest inputs come first (GPTQ's "act order"). The columns of a group stay together, for they share
a scale: groups by their mean square, and within each its columns (group-aware reordering, arXiv
2505.14638). Where they lie does not change.
"""

import torch

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.pruning.obs import (
    Factor,
    Settle,
    Sweep,
    Swept,
    damped,
    factorise,
    settled,
)
from owl_deploy.compression.quantization.grid import Grid, decode

_DAMPENING = 0.01  # share of the mean diagonal, at least: GPTQ's
_STEP = 128  # columns whose updates are delayed together
_PASSES = 2  # of refinement: the first takes off 10 to 20 % of the output's error, a third 1 %


def round_pruned(
    dense: torch.Tensor, pruned: torch.Tensor, removed: torch.Tensor, inputs: Inputs, grid: Grid
) -> Swept:
    """The float32 `pruned` [out, in], which a method made of `dense`, on the `grid`.

    What is `removed` [out, in] stays zero.
    """
    factor, order = inputs.of_hessian(_in_order, inputs.dampening(_DAMPENING), grid.group)
    swept = rounded(beginning(dense, pruned)[:, order], removed[:, order], factor, grid)
    assert swept.codes is not None
    back = order.argsort()
    groups = order[:: grid.group].div(grid.group, rounding_mode="floor").argsort()
    return Swept(swept.weight[:, back], removed, swept.codes[:, groups])


def _in_order(hessian: torch.Tensor, dampening: float, group: int) -> tuple[Factor, torch.Tensor]:
    """The factor of X^T X [in, in] with its columns in the order [in] in which they are rounded."""
    order = by_size(hessian.diagonal(), group)
    return factorise(hessian[order][:, order], dampening), order


def by_size(squares: torch.Tensor, group: int) -> torch.Tensor:
    """The order [in] of columns whose inputs have these `squares` [in], the largest first.

    Each `group` of neighbours stays together; a last one that is smaller stays last.
    """
    whole = squares[: len(squares) - len(squares) % group].view(-1, group)
    inside = whole.argsort(dim=1, descending=True, stable=True)
    inside += group * torch.arange(len(whole), device=squares.device).unsqueeze(1)
    first = inside[whole.mean(dim=1).argsort(descending=True, stable=True)].flatten()
    rest = squares[whole.numel() :].argsort(descending=True, stable=True) + whole.numel()
    return torch.cat((first, rest))


def finished(
    swept: Swept, dense: torch.Tensor, inputs: Inputs, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """A rounded weight, refined, and its scales: bfloat16 [out, groups], which holds them exactly.

    What is zero because it was removed stays so.
    """
    assert swept.codes is not None
    hessian = inputs.of_hessian(damped, inputs.dampening(_DAMPENING))
    weight = refined(swept, dense, hessian, grid)
    return weight, decode(swept.codes).bfloat16()


def beginning(dense: torch.Tensor, pruned: torch.Tensor) -> torch.Tensor:
    """The weight to begin to round with, where `pruned` is what a method made of `dense`.

    A method that only removes leaves it to the rounding to make up for that too: then it is the
    dense one, whose removed columns hand on all that they held.
    """
    only_removed = torch.equal(pruned, dense.masked_fill(pruned == 0, 0))
    return dense if only_removed else pruned


def rounded(start: torch.Tensor, removed: torch.Tensor, factor: Factor, grid: Grid) -> Swept:
    """`start` [out, in] on the grid, zero where `removed`.

    Later columns make up for what a column loses, a removed one for what has drifted into it.
    """
    return Sweep(lambda place, _: removed[:, place], _STEP, _STEP, grid).over(start, factor.upper)


def refined(swept: Swept, dense: torch.Tensor, hessian: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The weight of `swept`, on the grid already, nearer to the outputs of `dense` [out, in].

    Coordinate descent on (dense - w) H (dense - w)^T for the `hessian` H [in, in], damped: each
    weight in turn becomes the best of the grid while all others stay, so that the error never grows
    (QuantEase, arXiv 2309.01885). What was removed, and the scales, stay as they are.
    """
    weight = swept.weight.clone()
    for _ in range(_PASSES):
        gradient = (dense - weight) @ hessian
        for start in range(0, weight.shape[1], _STEP):
            block = slice(start, min(start + _STEP, weight.shape[1]))
            before = weight[:, block].T
            columns = before + (gradient[:, block] / hessian.diagonal()[block]).T
            gained = _refine_block(columns, before, swept, block, hessian[block, block], grid)
            weight[:, block] = columns.T
            gradient[:, block.stop :] -= gained.T @ hessian[block, block.stop :]
    return weight


def _refine_block(
    columns: torch.Tensor,
    before: torch.Tensor,
    swept: Swept,
    block: slice,
    hessian: torch.Tensor,
    grid: Grid,
) -> torch.Tensor:
    """Settle the `columns` [b, out] of `block`; returns what they gain over `before`.

    They begin as what each would best be while all others stay.
    """
    assert swept.codes is not None
    gone = swept.removed[:, block].T.contiguous()
    scales = decode(swept.codes).T.contiguous()[block.start // grid.group :]

    def begin(part: slice) -> Settle:
        scale = scales[part.start // grid.group]

        def settle(place: int, column: torch.Tensor) -> torch.Tensor:
            column.copy_(grid.nearest(column, scale).masked_fill_(gone[place], 0))
            return column - before[place]

        return settle

    return settled(columns, hessian / hessian.diagonal(), grid.group, begin)
