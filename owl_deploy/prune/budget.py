"""How much of each block goes: from a target and outlier ratios to one sparsity a block.

All functions are pure and in float64. Sparsity is the share of weights removed, in [0, 1]; the mean
over the blocks, weighted by their numbers of weights, is the target whatever the bounds do to it.
"""

from collections.abc import Iterable, Sequence

import torch


def outlier_ratio(scores: Iterable[torch.Tensor], multiple: float) -> float:
    """The layerwise outlier distribution of one block, in percent (OWL, arXiv 2310.05175, eq. 2).

    `scores`: Wanda's score of each Linear of the block. The ratio is the share, over all of them
    together, of scores above `multiple` times their mean.
    """
    tensors = list(scores)
    size = sum(tensor.numel() for tensor in tensors)
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in tensors) / size
    above = sum(int((tensor > multiple * mean).sum()) for tensor in tensors)
    return 100.0 * above / size


def uniform(sparsity: float, sizes: Sequence[int]) -> list[float]:
    """The same sparsity for every block."""
    return [sparsity] * len(sizes)


def owl(
    sparsity: float, sizes: Sequence[int], ratios: Sequence[float], spread: float
) -> list[float]:
    """Less sparsity for blocks with more outliers (OWL, section 3.2).

    The densities are the outlier ratios scaled to a range of 2 * `spread`, then moved so that the
    mean is kept. `sizes`: weights a block. Equal ratios give the uniform sparsity.
    """
    lowest, highest = min(ratios), max(ratios)
    if highest == lowest:
        return uniform(sparsity, sizes)
    scaled = [(ratio - lowest) / (highest - lowest) * 2 * spread for ratio in ratios]
    return hold_mean([-density for density in scaled], sizes, sparsity)


def hold_mean(wanted: Sequence[float], sizes: Sequence[int], target: float) -> list[float]:
    """Move all of `wanted` by one offset, within [0, 1], so that their weighted mean is `target`.

    Water-filling: a block at a bound stays there and the others move further, so that neither the
    mean nor the differences between the blocks inside the bounds are lost.
    """
    total = sum(sizes)

    def at(offset: float) -> list[float]:
        return [min(1.0, max(0.0, value + offset)) for value in wanted]

    # The mean grows with the offset, from 0 to 1 over this range: bisect.
    low, high = -max(wanted), 1.0 - min(wanted)
    for _ in range(100):
        middle = (low + high) / 2
        mean = sum(s * n for s, n in zip(at(middle), sizes, strict=True)) / total
        low, high = (middle, high) if mean < target else (low, middle)
    return at(high)
