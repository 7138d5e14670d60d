"""ALPS by its definition: dense solves in float64, the paper's dual, loops over rows.

And what no iteration can beat: the best values on a support, solved exactly row by row, and on
matrices of a few columns the best support, tried one by one.
"""

import itertools

import torch

from tests.reference.owl import lowest


def scaled(hessian, dampening):
    """The Hessian with a diagonal of 1 + dampening, and the norms that it was divided by: those of
    inputs fainter than a tenth of the median one are taken for that.
    """
    hessian = hessian.double().clone()
    scale = hessian.diagonal().sqrt().clone()
    if (scale > 0).any():
        least = 0.1 * float(scale[scale > 0].square().median().sqrt())
        scale[scale > 0] = scale[scale > 0].clamp(min=least)
    scale[scale == 0] = 1
    hessian /= torch.outer(scale, scale)
    for j in range(len(hessian)):
        hessian[j, j] = 1 + dampening
    return hessian, scale


def removed(scores, sparsity, group):
    """Marks of the lowest scores [out, in], as lists would be sorted."""
    gone = torch.zeros(scores.shape, dtype=torch.bool)
    if group is None:
        flat = gone.view(-1)
        for index in lowest(scores.flatten().tolist(), round(sparsity * scores.numel())):
            flat[index] = True
        return gone
    kept, size = group
    for row in range(len(scores)):
        for start in range(0, scores.shape[1], size):
            for index in lowest(scores[row, start : start + size].tolist(), size - kept):
                gone[row, start + index] = True
    return gone


def support(weight, hessian, sparsity, group, dampening=0.05, iterations=20):
    """Marks of the weights that ADMM removes: an inverse for each penalty, V its dual."""
    dead = hessian.diagonal() == 0
    hessian, scale = scaled(hessian, dampening)
    weight = weight.double() * scale
    weight[:, dead] = 0
    sparse = weight.masked_fill(removed(weight.abs(), sparsity, group), 0)
    dual = torch.zeros_like(weight)
    gone = removed(weight.abs(), sparsity, group)
    for step in range(iterations):
        penalty = 0.1 * 10 ** (step // 2 / max((iterations + 1) // 2 - 1, 1))
        inverse = torch.linalg.inv(hessian + penalty * torch.eye(len(hessian)))
        free = (weight @ hessian - dual + penalty * sparse) @ inverse
        candidate = free + dual / penalty
        gone = removed(candidate.abs(), sparsity, group)
        sparse = candidate.masked_fill(gone, 0)
        dual = dual + penalty * (free - sparse)
    return gone


def best_on(weight, hessian, kept, dampening=0.05):
    """The values on the support `kept` [out, in] with the least error: the normal equations."""
    weight = weight.masked_fill(hessian.diagonal() == 0, 0)
    hessian, scale = scaled(hessian, dampening)
    target = weight.double() * scale
    found = torch.zeros_like(target)
    for row, on in enumerate(kept):
        found[row, on] = torch.linalg.solve(hessian[on][:, on], (hessian @ target[row])[on])
    return found / scale


def error(weight, pruned, hessian, dampening=0.05):
    """What is minimised: the squared error of the outputs, and the ridge."""
    hessian, scale = scaled(hessian, dampening)
    change = (pruned.double() - weight.double()) * scale
    return float(torch.einsum("ri,ij,rj->", change, hessian, change))


def best_support(weight, hessian, count, dampening=0.05):
    """The least error of a row [1, in] with `count` weights left, over every choice of them."""
    columns = weight.shape[1]
    errors = []
    for chosen in itertools.combinations(range(columns), count):
        kept = torch.zeros(1, columns, dtype=torch.bool)
        kept[0, list(chosen)] = True
        pruned = best_on(weight, hessian, kept, dampening)
        errors.append(error(weight, pruned, hessian, dampening))
    return min(errors)
