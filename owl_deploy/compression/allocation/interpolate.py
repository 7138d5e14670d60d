"""What is kept of a Linear that was made in several ways, and Linears between two sparsities."""

import bisect
from collections.abc import Mapping, Sequence

import torch

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly however many there are


def in_steps(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A `difference` [out, in] as int8, in steps [out] of a 127th of each row's largest."""
    step = difference.abs().amax(dim=1) / 127
    return (difference / step.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8), step


def of_linear(found: Mapping[str, torch.Tensor], key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The difference and its step of a Linear, of all that was `found` of its block."""
    return found[f"{key}.difference"], found[f"{key}.step"]


def mixed(
    dense: torch.Tensor,
    difference: torch.Tensor,
    step: torch.Tensor,
    tried: Sequence[float],
    sparsity: float,
) -> torch.Tensor:
    """A Linear of that `sparsity`, float32 [out, in]; see `Trial` for the other tensors.

    Its rows are as at the two nearest of no sparsity and those `tried`, so many of each that this
    is their mean; of more than all of these as at the last.
    """
    known = [0.0, *tried]
    sparsity = min(sparsity, known[-1])
    at = max(1, bisect.bisect_left(known, sparsity))
    share = (sparsity - known[at - 1]) / (known[at] - known[at - 1])
    later = (0.5 + _GOLDEN * torch.arange(len(dense), dtype=torch.float64)) % 1 < share
    found = dense.clone()
    for rows, level in ((~later, at - 2), (later, at - 1)):  # of those tried
        if level >= 0:
            change = difference[level][rows].to(dense.device).float()
            found[rows] += change.mul_(step[level][rows, None].to(dense.device))
    return found
