"""The refit: the values that suit the weights that are left best, whatever chose them.

Given a mask, each row of a Linear is a least-squares problem: of its inputs X, the dense w and the
kept positions S, the v on S with the least ||X (v - w)||^2. Conjugate gradients come close in a few
products with X^T X for all rows at once, where solving exactly takes a factorisation a row (ALPS,
arXiv 2406.07831, section 3.3).
"""

from dataclasses import dataclass

import torch

from owl_deploy.compression.input_statistics import Inputs

DAMPENING = 0.05  # of a method that brings none: what loses least on other text, see `Gram`
_FAINT = 0.01  # of the median input's square: a smaller one counts as this, see `raised`
_STEPS = 10


@dataclass(frozen=True)
class Gram:
    """X^T X in the unit in which every input is as large: what both ALPS and the refit work in.

    `matrix` [in, in]: X^T X with rows and columns divided by `scale` [in], the inputs' norms, and a
    dampening added to its diagonal of ones. That is a ridge, which holds the weights near the dense
    ones where the calibration text says little. The norms are `raised`, and the diagonal is of ones
    all the same, a ridge for faint inputs. `dead` [in]: those that are always zero, of scale 1.
    """

    matrix: torch.Tensor
    scale: torch.Tensor
    dead: torch.Tensor


def gram(hessian: torch.Tensor, dampening: float) -> Gram:
    """From X^T X [in, in] (any scale); `dampening` is a share of the scaled diagonal."""
    scale = raised(hessian.diagonal()).sqrt()
    dead = scale == 0
    scale = scale.masked_fill(dead, 1)
    matrix = hessian / scale / scale.unsqueeze(1)
    matrix.diagonal().fill_(1 + dampening)
    return Gram(matrix, scale, dead)


def raised(squares: torch.Tensor) -> torch.Tensor:
    """The diagonal of X^T X [in] to solve by: no input is fainter than a tenth of the median one.

    A weight that makes up for others grows as its input is fainter, in which a rounding on other
    text counts as little; but a grid's group, and 16 bits, have to hold it beside the others: with
    one such column in a group of 32, of the size of a thousand, the others were rounded to nothing.
    What is zero stays so.
    """
    there = squares[squares > 0]
    if not len(there):
        return squares
    return squares.clamp(min=_FAINT * float(there.median())).masked_fill(squares == 0, 0)


def refit(weight: torch.Tensor, pruned: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """`pruned` [out, in] with better values where it is not zero; `weight` is the dense one."""
    found = inputs.of_hessian(gram, DAMPENING)
    start = pruned * found.scale
    return on_support(weight * found.scale, start, pruned != 0, found.matrix) / found.scale


def on_support(
    target: torch.Tensor, start: torch.Tensor, kept: torch.Tensor, matrix: torch.Tensor
) -> torch.Tensor:
    """Near the V [out, in] with tr (V - target) `matrix` (V - target)^T least, zero beyond `kept`.

    Some steps of conjugate gradients from `start`, which is zero there, too; each row has its own
    step length. The scaled diagonal is constant, so that Jacobi's preconditioner is built in.
    """
    found = start.clone()
    residual = ((target - start) @ matrix).mul_(kept)
    direction = residual.clone()
    size = residual.square().sum(1, keepdim=True)  # [out, 1]
    tiny = torch.finfo(size.dtype).tiny  # where a row has nothing left to gain, 0 / tiny = 0
    for _ in range(_STEPS):
        image = (direction @ matrix).mul_(kept)
        step = size / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        found.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        before, size = size, residual.square().sum(1, keepdim=True)
        direction.mul_(size / before.clamp(min=tiny)).add_(residual)
    return found
