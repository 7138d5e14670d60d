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
