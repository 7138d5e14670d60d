"""Methods that remove the weights with the lowest scores, and leave the others as they are.

Of every method: it maps (weight [out, in] float32, inputs, sparsity, group, options) to the pruned
weight, where `group` is (N, M) of N:M, or None, and `sparsity` the share that goes without one.
"""

from collections.abc import Callable

import torch

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.methods import Options
from owl_deploy.compression.pruning import mask, score

Group = tuple[int, int] | None
Prune = Callable[[torch.Tensor, Inputs, float, Group, Options], torch.Tensor]


def _by_score(
    scores: Callable[[torch.Tensor, Inputs], torch.Tensor],
    lowest: Callable[[torch.Tensor, float], torch.Tensor],
) -> Prune:
    """Remove the lowest `scores`: by `lowest`, or within groups of N:M."""

    def prune(
        weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: Options
    ) -> torch.Tensor:
        values = scores(weight, inputs)
        removed = mask.lowest_in_groups(values, *group) if group else lowest(values, sparsity)
        return weight.masked_fill(removed, 0)

    return prune


def none(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: Options
) -> torch.Tensor:
    """Remove nothing: for who only wants to round."""
    return weight


magnitude = _by_score(lambda weight, _: score.magnitude(weight), mask.lowest_in_matrix)
wanda = _by_score(lambda weight, x: score.wanda(weight, x.norm()), mask.lowest_in_rows)
wanda_variant = _by_score(
    lambda weight, x: score.wanda_share(weight, x.norm()), mask.lowest_in_matrix
)
