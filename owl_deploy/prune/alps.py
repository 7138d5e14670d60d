"""ALPS: choose the support over the whole matrix by ADMM, then refit it (arXiv 2406.07831).

The layer's problem is to find the V with so many zeros and the least ||X (V - W)^T||^2. ADMM keeps
two copies of V, one that minimises the error and one that has the zeros, and a dual that draws them
together: unlike SparseGPT's, its choice of a weight may be taken back. Here the penalty rises by a
fixed schedule, where the paper's follows the changes of the support: on the Linears of SmolLM2 that
came to as low an error in fewer iterations.
"""

from dataclasses import dataclass

import torch

from owl_deploy.errors import BadInput
from owl_deploy.methods import ALPSOptions
from owl_deploy.prune import mask, refit
from owl_deploy.prune.by_score import Group
from owl_deploy.prune.calibrate import Inputs

# The penalty at first and at last, in the unit of the scaled diagonal of X^T X. When it is 1, an
# iteration weighs what a weight gains by coming back (its gradient) as what one loses by going;
# below, the choice moves more freely.
_LOOSE, _TIGHT = 0.1, 1.0


@dataclass(frozen=True)
class Basis:
    """What ALPS needs of a Linear's inputs; Linears with the same input share one.

    `values` [in], `vectors` [in, in]: of the eigendecomposition of `gram`'s matrix, by which
    (matrix + penalty)^-1 is two products for any penalty.
    """

    gram: refit.Gram
    values: torch.Tensor
    vectors: torch.Tensor


def decompose(hessian: torch.Tensor, dampening: float) -> Basis:
    """From X^T X [in, in] (any scale); `dampening` as in `refit.gram`.

    Raises `BadInput` when it has values that are no numbers.
    """
    found = refit.gram(hessian, dampening)
    try:
        values, vectors = torch.linalg.eigh(found.matrix)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # not re-exported
        raise BadInput(
            "The inputs of a layer are infinite or no numbers.",
            "Compute in another --dtype, or look for what is wrong with the weights.",
        ) from error
    return Basis(found, values, vectors)


def prune(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: ALPSOptions
) -> torch.Tensor:
    """The method, as the table of methods calls it (see `by_score`)."""
    basis = inputs.of_hessian(decompose, options.dampening)
    return solved(weight, basis, sparsity, group, options.iterations)


def solved(
    weight: torch.Tensor, basis: Basis, sparsity: float, group: Group, iterations: int
) -> torch.Tensor:
    """The pruned weight [out, in], float32, of a dense one: support, then values on it.

    Unstructured (`group` None): round(sparsity * size) weights go, wherever in the matrix. With
    `group` (N, M): all but N in every M neighbours of a row. Those of inputs that are always zero
    go besides.
    """
    scale, dead = basis.gram.scale, basis.gram.dead
    target = (weight.float() * scale).masked_fill(dead, 0)
    start = _admm(target, basis, sparsity, group, iterations).masked_fill(dead, 0)
    return refit.on_support(target, start, start != 0, basis.gram.matrix) / scale


def _admm(
    target: torch.Tensor, basis: Basis, sparsity: float, group: Group, iterations: int
) -> torch.Tensor:
    """The sparse copy [out, in] after `iterations`, in the scaled unit (algorithm 1).

    With the scaled dual u the sparse copy is d = kept(v + u), and the next dual is what was left
    out of it: what both become is one matrix, divided by the mask.
    """
    pulled = (target @ basis.vectors).mul_(basis.values)  # target @ matrix, in the eigenbasis
    growth = (_TIGHT / _LOOSE) ** (1 / max(iterations - 1, 1))
    sparse = target.masked_fill(_removed(target, sparsity, group), 0)
    dual = torch.zeros_like(target)
    penalty = _LOOSE
    for _ in range(iterations):
        drawn = (sparse - dual) @ basis.vectors
        drawn.mul_(penalty).add_(pulled).div_(basis.values + penalty)
        candidate = torch.addmm(dual, drawn, basis.vectors.T)
        sparse = candidate.masked_fill(_removed(candidate, sparsity, group), 0)
        dual = (candidate - sparse).div_(growth)  # it counts in units of the penalty
        penalty *= growth
    return sparse


def _removed(candidate: torch.Tensor, sparsity: float, group: Group) -> torch.Tensor:
    size = candidate.abs()
    if group:
        return mask.lowest_in_groups(size, *group)
    return mask.lowest_in_matrix(size, sparsity)
