"""Which weights go: from scores [out, in] to a boolean mask of the weights that are *removed*.

Masks are by rank, never by threshold: exactly as many weights go as were asked for, and among equal
scores those with the smaller index go first, as in a stable sort.
"""

import torch


def lowest_in_matrix(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Remove the round(sparsity * size) lowest scores of the whole matrix (magnitude's group)."""
    count = torch.tensor([round(sparsity * scores.numel())], device=scores.device)
    return _lowest(scores.reshape(1, -1), count).view_as(scores)


def lowest_in_rows(scores: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Remove the lowest scores within each output row (Wanda's group).

    round(sparsity * size) weights go in all; rows give the same number, plus or minus one, so that
    a row of a few hundred weights does not round the target away.
    """
    rows = scores.shape[0]
    total = round(sparsity * scores.numel())
    shares = torch.arange(rows + 1, device=scores.device) * total // rows
    return _lowest(scores, shares.diff())


def lowest_in_groups(scores: torch.Tensor, kept: int, group: int) -> torch.Tensor:
    """Keep the `kept` highest scores of every `group` neighbours in a row (N:M, N = kept).

    `in` must be a multiple of `group`.
    """
    groups = scores.reshape(-1, group)
    count = torch.full((len(groups),), group - kept, device=scores.device)
    return _lowest(groups, count).view_as(scores)


def _lowest(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mark the counts[r] lowest of each row r of `scores` [rows, n], ties by index.

    What a stable sort gives, in linear time. Rows that give as many are done together: the counts
    differ by one at most.
    """
    removed = torch.zeros_like(scores, dtype=torch.bool)
    sizes = {int(counts.min()), int(counts.max())}
    for count in sizes - {0}:
        rows = slice(None) if len(sizes) == 1 else counts == count
        removed[rows] = _so_many(scores[rows], count)
    return removed


def _so_many(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Mark the `count` lowest of each row: those below a threshold, and the first that equal it."""
    threshold = scores.kthvalue(count, dim=1, keepdim=True).values
    below, equal = scores < threshold, scores == threshold
    missing = count - below.sum(1, keepdim=True)
    if bool((equal.sum(1, keepdim=True) > missing).any()):
        equal &= equal.cumsum(1) <= missing
    return below | equal
