"""SparseGPT by its definition: one weight at a time, a new inverse for each column.

Row by row and column by column, as in optimal brain surgery with the columns taken in order: when a
weight goes, the later weights of its row move so as to make up for it, with the inverse of the
Hessian of the columns that are left.
"""

import torch

from tests.reference.owl import lowest


def damped(hessian: torch.Tensor, dampening: float) -> torch.Tensor:
    """As published, but for dead inputs, which get the mean of the others' squares and not 1."""
    hessian = hessian.double().clone()
    live = [float(one) for one in hessian.diagonal() if one != 0]
    for index in range(len(hessian)):
        if hessian[index, index] == 0:
            hessian[index, index] = sum(live) / len(live) if live else 1
    return hessian + torch.eye(len(hessian)) * dampening * hessian.diagonal().mean()


def prune(weight, hessian, sparsity, group, block_size, dampening=0.01, preserve=False):
    weight = weight.double().clone()
    gone_before = (weight == 0) & torch.tensor(preserve)
    dead = hessian.diagonal() == 0
    weight[:, dead] = 0
    hessian = damped(hessian, dampening)
    rows, columns = weight.shape
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])  # [H_{j:}^-1]_{00}
    if group:
        block_size = max(block_size - block_size % group[1], group[1])
    for start in range(0, columns, block_size):
        end = min(start + block_size, columns)
        removed = torch.zeros(rows, columns, dtype=torch.bool)
        if not group:
            scores = (weight[:, start:end] ** 2 / pivots[start:end]).masked_fill(
                gone_before[:, start:end], -1
            )
            count = round(sparsity * rows * end) - round(sparsity * rows * start)
            flat = torch.zeros(scores.numel(), dtype=torch.bool)
            flat[list(lowest(scores.float().flatten().tolist(), count))] = True
            removed[:, start:end] = flat.view_as(scores) | gone_before[:, start:end]
        for j in range(start, end):
            if group and (j - start) % group[1] == 0:
                part = slice(j, j + group[1])
                scores = (weight[:, part] ** 2 / pivots[part]).masked_fill(gone_before[:, part], -1)
                for row in range(rows):
                    for index in lowest(scores[row].float().tolist(), group[1] - group[0]):
                        removed[row, j + index] = True
                removed[:, part] |= gone_before[:, part]
            for row in range(rows):
                if removed[row, j]:
                    error = weight[row, j] / pivots[j]
                    weight[row, j:] -= error * inverses[j][0]
                    weight[row, j] = 0
    return weight
