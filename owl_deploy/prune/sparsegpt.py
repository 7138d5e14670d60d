"""SparseGPT: remove weights and let the others of their row make up for them (arXiv 2301.00774)."""

from dataclasses import dataclass

import torch

from owl_deploy.errors import BadInput
from owl_deploy.methods import SparseGPTOptions
from owl_deploy.prune import mask
from owl_deploy.prune.by_score import Group
from owl_deploy.prune.calibrate import Inputs
from owl_deploy.prune.triangular import invert_lower


@dataclass(frozen=True)
class Factor:
    """What SparseGPT needs of a Linear's inputs; Linears with the same input share one.

    `upper` [in, in]: the upper Cholesky factor of the inverse of the dampened Hessian; `dead` [in]:
    the inputs that are always zero.
    """

    upper: torch.Tensor
    dead: torch.Tensor


def factorise(hessian: torch.Tensor, dampening: float) -> Factor:
    """Factorise X^T X [in, in] (any scale), with `dampening` times its mean diagonal added.

    Raises `BadInput` when it is not positive definite even so.
    """
    damped = hessian.float().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    diagonal += dampening * diagonal.mean()
    try:
        # With the columns in reverse, H = L L^T gives H^-1 = U^T U for the upper U = L^-1 turned
        # back: one factorisation, where inverting and factorising again would take two and more.
        inverse = torch.linalg.cholesky(damped.flip(0, 1))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # not re-exported
        raise BadInput(
            "The inputs of a layer depend on each other too much for SparseGPT.",
            "Give more --samples, or a larger --dampening.",
        ) from error
    invert_lower(inverse)
    return Factor(inverse.flip(0, 1).contiguous(), dead)


def prune(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: SparseGPTOptions
) -> torch.Tensor:
    """The method, as the table of methods calls it (see `by_score`)."""
    factor = inputs.of_hessian(factorise, options.dampening)
    return updated(weight, factor, sparsity, group, options)


def updated(
    weight: torch.Tensor, factor: Factor, sparsity: float, group: Group, options: SparseGPTOptions
) -> torch.Tensor:
    """The pruned and updated weight [out, in], float32, from a dense one (algorithm 1).

    Unstructured (`group` None): of each block of columns the weights with the lowest
    w^2 / [H^-1]_jj over all rows go, so many that the blocks together meet `sparsity`. With `group`
    (N, M): all but N in every M neighbours of a row.
    """
    weight = weight.float().clone()
    keep_zero = weight == 0 if options.preserve_mask else None
    weight[:, factor.dead] = 0
    rows, columns = weight.shape
    step = options.block_size
    if group:  # a group must not straddle two blocks
        step = max(step - step % group[1], group[1])
    for start in range(0, columns, step):
        end = min(start + step, columns)
        # The count for this block is what is due by its end: rounding never adds up.
        due = round(sparsity * rows * end) - round(sparsity * rows * start)
        block = weight[:, start:end]
        upper = factor.upper[start:end, start:end]
        zero = None if keep_zero is None else keep_zero[:, start:end]
        errors = _prune_block(block, upper, due / block.numel(), group, zero)
        weight[:, end:] -= errors @ factor.upper[start:end, end:]
    return weight


def _prune_block(
    block: torch.Tensor,
    upper: torch.Tensor,
    sparsity: float,
    group: Group,
    keep_zero: torch.Tensor | None,
) -> torch.Tensor:
    """Prune `block` [out, b] in place; the errors [out, b] that the later columns make up for.

    A column takes the errors of those before it when its turn comes, in one product, and lies
    contiguous: algorithm 1 updates all later columns at once, to the same end.
    """
    diagonal = upper.diagonal()
    width = block.shape[1] if group is None else group[1]
    columns = block.T.contiguous()  # [b, out]
    errors = torch.empty_like(columns)
    removed = torch.empty_like(block, dtype=torch.bool)
    for start in range(0, block.shape[1], width):
        part = slice(start, start + width)
        if start:
            columns[part].addmm_(upper[:start, part].T, errors[:start], alpha=-1)
        zero = None if keep_zero is None else keep_zero[:, part]
        scores = _scores(columns[part].T, diagonal[part], zero)
        if group is None:
            gone = mask.lowest_in_matrix(scores, sparsity)
        else:
            gone = mask.lowest_in_groups(scores, *group)
        removed[:, part] = gone if zero is None else gone | zero
        share = removed[:, part].T / diagonal[part].unsqueeze(1)  # [width, out]: 0 where it stays
        for offset in range(share.shape[0]):
            column = start + offset
            before = slice(start, column)
            if offset:
                columns[column].addmv_(errors[before].T, upper[before, column], alpha=-1)
            torch.mul(columns[column], share[offset], out=errors[column])
    block.copy_(columns.T.masked_fill(removed, 0))
    return errors.T


def _scores(
    block: torch.Tensor, diagonal: torch.Tensor, keep_zero: torch.Tensor | None
) -> torch.Tensor:
    """The error that removing each weight makes; negative for those that are gone already."""
    scores = (block / diagonal) ** 2
    return scores if keep_zero is None else scores.masked_fill(keep_zero, -1)
