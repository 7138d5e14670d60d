"""The least that the outputs of a Linear err without some of its weights: LSA's measure of a layer.

Without the weights P of a row w the output errs by sum_ij over P of w_i w_j H_ij, with H = X^T X;
nothing makes up for them. LSA (ICLR 2026, openreview.net/forum?id=xq3lza5IjN, algorithm 1) chooses
them one at a time, a group of columns after another: the next one is that which adds least to the
error of those gone, and lower than nothing where two errors cancel.
"""

import torch


def least_error(
    weight: torch.Tensor, hessian: torch.Tensor, share: float = 0.5, width: int = 128
) -> float:
    """The sum over the rows of `weight` [out, in] of that error, in squares of the outputs.

    `hessian` [in, in]; of each `width` columns the `share` goes, whole numbers rounded down.
    """
    gone = torch.zeros_like(weight)
    total = 0.0
    for start in range(0, weight.shape[1], width):
        own = slice(start, start + width)
        # What those of earlier groups that are gone add to each one's own error.
        between = weight[:, own] * (gone[:, :start] @ hessian[:start, own])
        added = weight[:, own].square() * hessian.diagonal()[own] + 2 * between
        total += _remove(weight[:, own], hessian[own, own], added, gone[:, own], share)
    return total


def _remove(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    added: torch.Tensor,
    gone: torch.Tensor,
    share: float,
) -> float:
    """Let the `share` of one group's columns go, row by row, into `gone`; what that adds.

    `added` [out, width]: what each weight would add if it went next; spent.
    """
    total = weight.new_zeros((), dtype=torch.float64)
    for _ in range(int(share * weight.shape[1])):
        least, at = added.min(dim=1, keepdim=True)
        total += least.sum(dtype=torch.float64)
        chosen = weight.gather(1, at)
        gone.scatter_(1, at, chosen)
        added += 2 * chosen * weight * hessian[at.squeeze(1)]
        added.scatter_(1, at, torch.inf)
    return total.item()
