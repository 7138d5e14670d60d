"""ALPS: choose the support over the whole matrix by ADMM, then refit it (arXiv 2406.07831).

The layer's problem is to find the V with so many zeros and the least ||X (V - W)^T||^2. ADMM keeps
two copies of V, one that minimises the error and one that has the zeros, and a dual that draws them
together: unlike SparseGPT's, its choice of a weight may be taken back. Here the penalty rises by a
fixed schedule, where the paper's follows the changes of the support: on the Linears of SmolLM2 that
came to as low an error in fewer iterations.
"""

import torch

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.methods import ALPSOptions
from owl_deploy.compression.pruning import mask, refit
from owl_deploy.compression.pruning.by_score import Group

# The penalty at first and at last, in the unit of the scaled diagonal of X^T X. When it is 1, an
# iteration weighs what a weight gains by coming back (its gradient) as what one loses by going;
# below, the choice moves more freely.
_LOOSE, _TIGHT = 0.1, 1.0
# Iterations with one penalty, which share a factorisation: on text that was not calibrated on, 2
# leave 0.05 % more of the error than 1 in SmolLM2's Linears, 4 leave 0.4 %, 10 leave 7 %.
_STAGE = 2


def prune(
    weight: torch.Tensor, inputs: Inputs, sparsity: float, group: Group, options: ALPSOptions
) -> torch.Tensor:
    """The method, as the table of methods calls it (see `by_score`)."""
    gram = inputs.of_hessian(refit.gram, options.dampening)
    return solved(weight, gram, sparsity, group, options.iterations)


def solved(
    weight: torch.Tensor, gram: refit.Gram, sparsity: float, group: Group, iterations: int
) -> torch.Tensor:
    """The pruned weight [out, in], float32, of a dense one: support, then values on it.

    Unstructured (`group` None): round(sparsity * size) weights go, wherever in the matrix. With
    `group` (N, M): all but N in every M neighbours of a row. Those of inputs that are always zero
    go besides.
    """
    target = (weight.float() * gram.scale).masked_fill(gram.dead, 0)
    start = _admm(target, gram.matrix, sparsity, group, iterations).masked_fill(gram.dead, 0)
    return refit.on_support(target, start, start != 0, gram.matrix) / gram.scale


def _admm(
    target: torch.Tensor, matrix: torch.Tensor, sparsity: float, group: Group, iterations: int
) -> torch.Tensor:
    """The sparse copy [out, in] after `iterations`, in the scaled unit (algorithm 1).

    With the scaled dual u the sparse copy is d = kept(v + u), and the next dual is what was left
    out of it: what both become is one matrix, divided by the mask. The free copy v minimises
    tr (v - target) matrix (v - target)^T + penalty ||v - (d - u)||^2: it is the target and the
    penalty's share of what d - u lacks. That is solved with a Cholesky factor: of a matrix wider
    than it is high, one takes a sixtieth of the paper's eigendecomposition.
    """
    sparse = target.masked_fill(_removed(target, sparsity, group), 0)
    dual = torch.zeros_like(target)
    stages = range(0, iterations, _STAGE)
    growth = (_TIGHT / _LOOSE) ** (1 / max(len(stages) - 1, 1))
    penalty = _LOOSE
    for begun in stages:
        factor = _factor(matrix, penalty)
        for _ in range(begun, min(begun + _STAGE, iterations)):
            lacks = sparse.sub_(dual).sub_(target)
            free = torch.cholesky_solve(lacks.T, factor).T.mul_(penalty).add_(target)
            candidate = free.add_(dual)
            sparse = candidate.masked_fill(_removed(candidate, sparsity, group), 0)
            dual = candidate.sub_(sparse)
        dual.div_(growth)  # it counts in units of the penalty
        penalty *= growth
    return sparse


def _factor(matrix: torch.Tensor, penalty: float) -> torch.Tensor:
    """The Cholesky factor [in, in] of matrix + penalty.

    Linears that share an input make it anew: it takes less time than two of their products with
    the matrix, and one of each penalty would take much memory.
    """
    raised = matrix.clone()
    raised.diagonal().add_(penalty)
    factor: torch.Tensor = torch.linalg.cholesky(raised)
    return factor


def _removed(candidate: torch.Tensor, sparsity: float, group: Group) -> torch.Tensor:
    size = candidate.abs()
    if group:
        return mask.lowest_in_groups(size, *group)
    return mask.lowest_in_matrix(size, sparsity)
