"""The grids that weights are rounded to: integers of a few bits, times a scale a group of columns.

A scale is 2^e * (1 + m/16), which the engine stores in a byte (`runtime/pack.py`). Its *code* is
16 * (e + 127) + m, the upper bits of it as a float32: neighbouring codes are neighbouring scales.
"""

from dataclasses import dataclass

import torch

from owl_deploy.grid import limits

_CANDIDATES = 20  # codes down from the scale that clips nothing: to 0.4 of it
_BINADES_ABOVE = 3  # that making up for errors may need, beyond the weight's own largest scale
_CODES = 256  # that a byte tells apart


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, zero among them; `group` columns of a row share a scale."""

    bits: int
    group: int

    @property
    def lowest(self) -> int:
        """The least integer."""
        return limits(self.bits)[0]

    @property
    def highest(self) -> int:
        """The largest integer."""
        return limits(self.bits)[1]

    def window(self, weight: torch.Tensor) -> tuple[int, int]:
        """The least and the largest code for the scales of `weight` [out, in]: 256 of them.

        They end some binades above what the largest weight needs.
        """
        peak = weight.abs().amax().reshape(1, 1)
        top = int(self._clipping_nothing(peak)) // 16 + _BINADES_ABOVE
        last = min(max(16 * top, _CODES + 16), 16 * 255)  # normal numbers only
        return last - _CODES, last - 1

    def best_codes(
        self, values: torch.Tensor, weights: torch.Tensor, window: tuple[int, int]
    ) -> torch.Tensor:
        """The codes [out] with the least squared error over `values` [out, n], in the `window`.

        `weights` [n]: of the columns' errors. Of codes that are as good, the largest.
        """
        largest = self._clipping_nothing(values)
        best = largest.clamp(*window)
        least = torch.full_like(values[:, 0], torch.inf)
        for down in range(_CANDIDATES):
            codes = (largest - down).clamp(*window)
            error = self.nearest(values, decode(codes).unsqueeze(1)).sub_(values).square_()
            found = error @ weights
            better = found < least
            best, least = torch.where(better, codes, best), torch.where(better, found, least)
        return best

    def nearest(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values of the grid that are nearest to `values`."""
        return (values / scale).round_().clamp_(self.lowest, self.highest).mul_(scale)

    def _clipping_nothing(self, values: torch.Tensor) -> torch.Tensor:
        """The least codes whose scales reach all `values` [out, n], [out]."""
        reach = torch.maximum(values.amax(1) / self.highest, values.amin(1) / self.lowest)
        return (reach.contiguous().view(torch.int32) + ((1 << 19) - 1)) >> 19


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The scales that `codes` stand for, float32."""
    return (codes << 19).view(torch.float32)
