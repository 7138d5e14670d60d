"""Rounding with compensation by its definition: one weight at a time, a new inverse a column.

As in `reference.sparsegpt`: whatever a weight loses, to a removal or to its grid, the later weights
of its row make up for, by the inverse of the Hessian of the columns that are left.
"""

import math

import torch

from tests.reference.owl import lowest
from tests.reference.sparsegpt import damped


def scales_of_form(bits):
    """All scales above zero that could matter here, ascending: 2^e (1 + m/16), or (1 + m/8)."""
    parts = 16 if bits == 8 else 8
    return [2.0**e * (1 + m / parts) for e in range(-40, 20) for m in range(parts)]


def limits(bits):
    return (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def nearest(value, scale, bits):
    low, high = limits(bits)
    return scale * min(max(round(value / scale), low), high)


def best_scale(values, costs, bits, least):
    """Of the scales down from the least that clips nothing, to 0.4 of it, that with least error.

    With fewer than 8 bits a scale may be below zero, too. None nearer to it than `least`; of equal
    ones the largest above zero.
    """
    low, high = limits(bits)
    known = scales_of_form(bits)
    tried = 20 if bits == 8 else 10
    if not any(values):
        return least
    best = None
    for sign in (1,) if bits == 8 else (1, -1):
        ends = [sign * value / high for value in values] + [sign * value / low for value in values]
        top = next(index for index, scale in enumerate(known) if scale >= max(ends))
        for scale in reversed(known[top - tried + 1 : top + 1]):
            scale = sign * max(scale, least)
            error = sum(
                cost * (nearest(value, scale, bits) - value) ** 2
                for value, cost in zip(values, costs, strict=True)
            )
            if best is None or error < best[0]:
                best = error, scale
    return best[1]


def least_scale(weight, bits):
    """The least of the 16 binades that end two above the scale of the largest weight."""
    largest = weight.abs().max().item() / limits(bits)[1]
    scale = next(scale for scale in scales_of_form(bits) if scale >= largest)
    return 2.0 ** (math.floor(math.log2(scale)) - 13)


def round_weight(weight, hessian, bits, width, removed, dampening=0.01):
    """`weight` on the grid, zero where `removed` says, and the scales [rows, groups].

    `removed`: a mask, or (values [rows, n], pivots [n], first column) -> the mask of n columns,
    asked for each group when its first column comes.
    """
    weight = weight.double().clone()
    hessian = damped(hessian, dampening)
    rows, columns = weight.shape
    least = least_scale(weight, bits)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    pivots = torch.stack([inverse[0, 0] for inverse in inverses])
    scales, gone = [], torch.zeros(rows, columns, dtype=torch.bool)
    for j in range(columns):
        if j % width == 0:
            part = slice(j, min(j + width, columns))
            chosen = removed(weight, pivots, j) if callable(removed) else removed
            gone[:, part] = chosen[:, part]
            scales.append([])
            for row in range(rows):
                kept = weight[row, part] * ~gone[row, part]
                costs = (1 / pivots[part]).tolist()
                scales[-1].append(best_scale(kept.tolist(), costs, bits, least))
        for row in range(rows):
            value = weight[row, j].item()
            stays = 0.0 if gone[row, j] else nearest(value, scales[-1][row], bits)
            weight[row, j:] -= (value - stays) / pivots[j] * inverses[j][0]
            weight[row, j] = stays
    return weight, torch.tensor(scales).T


def sparsegpt_choice(rows, columns, sparsity, group, block):
    """SparseGPT's choice, as `round_weight` asks for it: of a `block`, or of a part for N:M."""
    chosen = torch.zeros(rows, columns, dtype=torch.bool)

    def removed(weight, pivots, start):
        scores = (weight**2 / pivots).float()
        if group:
            for row in range(rows):
                for first in range(start, columns, group[1]):
                    part = scores[row, first : first + group[1]].tolist()
                    gone = lowest(part, group[1] - group[0])
                    chosen[row, first : first + group[1]] = torch.tensor(
                        [index in gone for index in range(len(part))]
                    )
        elif start % block == 0:
            end = min(start + block, columns)
            count = round(sparsity * rows * end) - round(sparsity * rows * start)
            part = scores[:, start:end]
            flat = torch.zeros(part.numel(), dtype=torch.bool)
            flat[list(lowest(part.flatten().tolist(), count))] = True
            chosen[:, start:end] = flat.view_as(part)
        return chosen

    return removed


def refine(weight, dense, hessian, scales, removed, bits, width, passes=2, dampening=0.01):
    """Each weight in turn becomes the best of its grid while all others stay."""
    weight, dense = weight.double().clone(), dense.double()
    hessian = damped(hessian, dampening)
    for _ in range(passes):
        for j in range(weight.shape[1]):
            for row in range(len(weight)):
                if not removed[row, j]:
                    wanted = weight[row, j] + (dense - weight)[row] @ hessian[j] / hessian[j, j]
                    scale = scales[row, j // width].item()
                    weight[row, j] = nearest(wanted.item(), scale, bits)
    return weight
