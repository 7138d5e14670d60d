"""How much each weight matters: pure functions of a weight [out, in] and its inputs' norms [in]."""

import torch


def magnitude(weight: torch.Tensor, input_norm: torch.Tensor | None = None) -> torch.Tensor:
    """|W|, shape [out, in]; the inputs do not matter."""
    return weight.abs()


def wanda(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2, shape [out, in] (Wanda, arXiv 2306.11695, equation 1).

    `input_norm` [in]: the L2 norm of each input feature over the calibration tokens; a common
    factor changes no comparison.
    """
    return weight.abs() * input_norm
