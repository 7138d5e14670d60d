"""Methods that remove the weights with the lowest scores, and leave the others as they are.

Of every method: it maps (weight [out, in] float32, inputs, sparsity, group, options) to the pruned
weight, where `group` is (N, M) of N:M, or None, and `sparsity` the share that goes without one.
"""

from collections.abc import Callable

import torch

from owl_deploy.methods import Options
from owl_deploy.prune import mask, score
from owl_deploy.prune.calibrate import Inputs

Group = tuple[int, int] | None
Lowest = Callable[[torch.Tensor, float], torch.Tensor]


def magnitude(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: Options
) -> torch.Tensor:
    """Remove the smallest weights of the whole matrix."""
    return _pruned(weight, score.magnitude(weight), sparsity, group, mask.lowest_in_matrix)


def wanda(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: Options
) -> torch.Tensor:
    """Remove the lowest of Wanda's scores of each row."""
    scores = score.wanda(weight, inputs.norm())
    return _pruned(weight, scores, sparsity, group, mask.lowest_in_rows)


def wanda_variant(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: Options
) -> torch.Tensor:
    """Remove the weights with the lowest shares of their rows' scores."""
    scores = score.wanda_share(weight, inputs.norm())
    return _pruned(weight, scores, sparsity, group, mask.lowest_in_matrix)


def _pruned(
    weight: torch.Tensor, scores: torch.Tensor, sparsity: float, group: Group, lowest: Lowest
) -> torch.Tensor:
    removed = mask.lowest_in_groups(scores, *group) if group else lowest(scores, sparsity)
    return weight.masked_fill(removed, 0)
