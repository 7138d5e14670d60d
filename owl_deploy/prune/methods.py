"""The table of pruning methods: each takes a dense weight and gives a pruned one."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, Protocol

import torch

from owl_deploy.prune import mask, score, sparsegpt

Group = tuple[int, int] | None  # (N, M) of N:M, or None for unstructured


class Inputs(Protocol):
    """What a method may ask about the inputs of the Linear it prunes."""

    def norm(self) -> torch.Tensor:
        """The L2 norm of each input feature, [in]."""

    def factor(self) -> sparsegpt.Factor:
        """SparseGPT's factor of the inputs' Hessian."""


Prune = Callable[[torch.Tensor, Inputs, float, Group], torch.Tensor]


@dataclass(frozen=True)
class Method:
    """`prune` maps (weight [out, in] float32, inputs, sparsity, group) to the pruned weight.

    `needs`: the statistic of the inputs that it asks for.
    """

    needs: Literal["nothing", "norms", "hessian"]
    prune: Prune


def _by_score(
    scores: Callable[[torch.Tensor, Inputs], torch.Tensor],
    lowest: Callable[[torch.Tensor, float], torch.Tensor],
) -> Prune:
    """Remove the lowest scores, by `lowest` or within groups of N:M; the others stay."""

    def prune(weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group) -> torch.Tensor:
        values = scores(weight, inputs)
        removed = mask.lowest_in_groups(values, *group) if group else lowest(values, sparsity)
        return weight.masked_fill(removed, 0)

    return prune


def methods(options: sparsegpt.Options) -> Mapping[str, Method]:
    """The table, with the options of those that have any."""
    return MappingProxyType(
        {
            "magnitude": Method(
                "nothing",
                _by_score(lambda weight, _: score.magnitude(weight), mask.lowest_in_matrix),
            ),
            "wanda": Method(
                "norms",
                _by_score(lambda weight, x: score.wanda(weight, x.norm()), mask.lowest_in_rows),
            ),
            "wanda-variant": Method(
                "norms",
                _by_score(
                    lambda weight, x: score.wanda_share(weight, x.norm()), mask.lowest_in_matrix
                ),
            ),
            "sparsegpt": Method(
                "hessian",
                lambda weight, x, sparsity, group: sparsegpt.prune(
                    weight, x.factor(), sparsity, group, options
                ),
            ),
        }
    )
