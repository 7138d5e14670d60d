"""The divergence of a pruned model from the dense one, a naive way: whole models, in float64."""

import copy

import torch


def divergence(model, weights, windows):
    """Mean of KL(dense || pruned) over all places, in nats; `weights`: by the Linears' names."""
    pruned = copy.deepcopy(model)
    for name, weight in weights.items():
        pruned.get_submodule(name).weight.data.copy_(weight)
    total, places = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            dense, sparse = (
                one(ids[None]).logits[0].double().softmax(dim=-1) for one in (model, pruned)
            )
            total += float((dense * (dense / sparse).log()).sum())
            places += len(ids)
    return total / places


def lowest_removed(weight, norms, sparsity):
    """`weight` [out, in] without the lowest of each row by |w| x norm, the same number in each."""
    left = weight.clone()
    for row in left:
        order = sorted(
            range(len(row)), key=lambda place: abs(float(row[place])) * float(norms[place])
        )
        for place in order[: round(sparsity * len(row))]:
            row[place] = 0.0
    return left


def rows_mixed(weight, levels, sparsity):
    """Rows of `weight` [out, in] as at the two levels nearest to `sparsity`, for that mean.

    `levels`: by their sparsities, the whole of it at each, besides which it may stay.
    """
    levels = {0.0: weight, **levels}
    sparsity = min(sparsity, max(levels))
    below = max(one for one in levels if one < sparsity or one == 0.0)
    above = min(one for one in levels if one >= sparsity and one > 0.0)
    share = (sparsity - below) / (above - below)
    rows = [
        levels[above if (0.5 + number * 0.6180339887498949) % 1 < share else below][number]
        for number in range(len(weight))
    ]
    return torch.stack(rows)
