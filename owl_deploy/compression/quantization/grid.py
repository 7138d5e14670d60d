"""The grids that weights are rounded to: integers of a few bits, times a scale a group of columns.

A scale is one that the engine stores in a byte (`runtime/pack.py`): 2^e * (1 + m/16) for 8 bits,
for fewer 2^e * (1 + m/8) or minus that. Integers reach one further below zero than above, and of a
few that is much: with a scale below zero they do so for the weights above it, as in llama.cpp's
Q4_0. A scale's *code* is the upper 13 bits of it as a float32: 16 * (e + 127) and its mantissa in
sixteenths, and `_BELOW_ZERO`.
"""

import math
from dataclasses import dataclass

import torch

from owl_deploy.models.rounded_grid import limits

_REACH = 20  # codes down from the scale that clips nothing, that are tried: to 0.4 of it
_BINADES_ABOVE = 3  # that making up for errors may need, beyond the weight's own largest scale
_BINADES = 16  # that a byte tells apart
_BELOW_ZERO = 1 << 12


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, zero among them; `group` columns of a row share a scale.

    `dtype`: of the numbers that are to hold integers times scales.
    """

    bits: int
    group: int
    dtype: torch.dtype = torch.float32

    @property
    def lowest(self) -> int:
        """The least integer."""
        return limits(self.bits)[0]

    @property
    def highest(self) -> int:
        """The largest integer."""
        return limits(self.bits)[1]

    def window(self, weight: torch.Tensor) -> tuple[int, int]:
        """The least and the largest code for the scales of `weight` [out, in], above zero.

        They end some binades above what the largest weight needs, and begin where the numbers
        stored are as fine as scales are: of float16 at 2^-20 for 8 bits, 2^-21 for fewer.
        """
        peak = weight.abs().amax().reshape(1, 1)
        top = int(self._clipping_nothing(peak)) // 16 + _BINADES_ABOVE
        told = torch.finfo(self.dtype)
        finest = round(math.log2(told.smallest_normal * told.eps)) + 127  # 2^(e - 127) is a number
        first = max(finest + (3 if self._signed else 4), 1)  # by a mantissa of so many bits
        last = min(max(top, first + _BINADES), 255)
        return 16 * (last - _BINADES), 16 * last - self._step

    def best_codes(
        self, values: torch.Tensor, weights: torch.Tensor, window: tuple[int, int]
    ) -> torch.Tensor:
        """The codes [out] with the least squared error over `values` [out, n], in the `window`.

        `weights` [n]: of the columns' errors. Of codes that are as good, the largest above zero.
        """
        best = self._clipping_nothing(values).clamp(*window)
        least = torch.full_like(values[:, 0], torch.inf)
        for sign in (0, _BELOW_ZERO) if self._signed else (0,):
            largest = self._clipping_nothing(-values if sign else values)
            for down in range(0, _REACH, self._step):
                codes = (largest - down).clamp(*window) + sign
                error = self.nearest(values, decode(codes).unsqueeze(1)).sub_(values).square_()
                found = error @ weights
                better = found < least
                best, least = torch.where(better, codes, best), torch.where(better, found, least)
        return best

    def nearest(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """The values of the grid that are nearest to `values`."""
        return (values / scale).round_().clamp_(self.lowest, self.highest).mul_(scale)

    def _clipping_nothing(self, values: torch.Tensor) -> torch.Tensor:
        """The least codes whose scales, above zero, reach all `values` [out, n], [out]."""
        reach = torch.maximum(values.amax(1) / self.highest, values.amin(1) / self.lowest)
        codes = (reach.contiguous().view(torch.int32) + ((self._step << 19) - 1)) >> 19
        return codes - codes % self._step

    @property
    def _signed(self) -> bool:
        return self.lowest != -self.highest

    @property
    def _step(self) -> int:
        """From one code to the next: a sign takes a bit of the mantissa."""
        return 2 if self._signed else 1


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The scales that `codes` stand for, float32."""
    return (codes << 19).view(torch.float32)
