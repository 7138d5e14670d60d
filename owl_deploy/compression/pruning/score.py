"""How much each weight matters: pure functions of a weight [out, in] and its inputs' norms [in]."""

from collections.abc import Sequence

import torch


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """|W|, shape [out, in]; the inputs do not matter."""
    return weight.abs()


def wanda(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """|W_ij| * ||X_j||_2, shape [out, in] (Wanda, arXiv 2306.11695, equation 1).

    `input_norm` [in]: the L2 norm of each input feature over the calibration tokens; a common
    factor changes no comparison.
    """
    return weight.abs() * input_norm


def wanda_share(weight: torch.Tensor, input_norm: torch.Tensor) -> torch.Tensor:
    """The share of its row's score that goes with a weight and all lower ones of the row.

    Wanda's variant (arXiv 2306.11695, appendix; `--use_variant` in its code) searches one alpha
    such that removing from each row the lowest scores that sum to alpha times the row's total
    meets the target. That is to rank the weights of the whole matrix by this share, which needs no
    search and meets the target exactly. Shape [out, in], values in [0, 1].
    """
    scores = wanda(weight, input_norm)
    ordered, order = scores.sort(dim=1, stable=True)
    running = ordered.cumsum(dim=1, dtype=torch.float64)
    share = running / running[:, -1:].clamp(min=torch.finfo(torch.float64).tiny)
    return torch.empty_like(share).scatter_(1, order, share)


def outlier_ratio(scores: Sequence[torch.Tensor], multiple: float) -> float:
    """The layerwise outlier distribution of one block, in percent (OWL, arXiv 2310.05175, eq. 2).

    `scores`: Wanda's score of each Linear of the block. The ratio is the share,
    over all of them together, of scores above `multiple` times their mean.
    """
    size = sum(tensor.numel() for tensor in scores)
    mean = sum(float(tensor.sum(dtype=torch.float64)) for tensor in scores) / size
    return 100.0 * sum(int((tensor > multiple * mean).sum()) for tensor in scores) / size
