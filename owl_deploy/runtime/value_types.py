"""The types of values that weights are packed in, and how a weight is rounded to each.

Integers have a scale for each row and 32, 64 or 128 columns. It is a byte: 4 bits of exponent, 4 of
mantissa, and one exponent more that all scales of a weight have in common; of fewer than 8 bits a
sign, and 3 bits of mantissa (pack.py says how both lie in a file).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Values = Literal["fp32", "bf16", "int8", "int4", "int3"]

SCALE_COLUMNS = 32
SHARED_COLUMNS = (32, 64, 128)  # that may share a scale
# Of a scale's byte as a signed integer, so far to the left, these bits are those of a float32.
_CODED = {False: (19, 0x07F80000), True: (20, 0x87F00000)}  # without and with signs
_SIGN = 1 << 12  # of the upper 13 bits of a scale


@dataclass(frozen=True)
class ValueTraits:
    """What tells a type of values from the others: its row of `TRAITS`, and of csrc/format.h."""

    code: int
    stored_bits: int  # of a value in the block
    dtype: type[np.generic]  # of a value's bits in a cell
    encode: Callable[[NDArray[np.float32]], NDArray[np.generic]]  # bits; of integers: see `rounded`
    decode: Callable[[NDArray[Any]], NDArray[np.float32]]  # without scales
    levels: tuple[int, int] | None = None  # the least and the largest integer; None: no scales
    counts: int = 1  # an integer stands for so many of its scale
    planes: bool = False  # whether they may lie in planes
    # Above this share of non-zeros a weight is best packed whole: the mask costs more than it
    # saves.
    max_density: float = 1.0

    @property
    def signed_scales(self) -> bool:
        """Whether its scales may be below zero: its integers reach further on one side."""
        return self.levels is not None and self.levels[0] != -self.levels[1]

    def pays(self, density: float) -> bool:
        """Whether a weight with this share of non-zeros is best packed sparse."""
        return density <= self.max_density

    @property
    def pack(self) -> int:
        """Columns in a cell."""
        return 4 // self.dtype().itemsize

    def cells(self, cols: int) -> int:
        """Cells in a row of so many columns, in whole fours."""
        return -(-cols // (4 * self.pack)) * 4


# What rounds to zero is zero: it costs nothing then. -0.0 is stored as nothing.


def _encode_fp32(weight: NDArray[np.float32]) -> NDArray[np.generic]:
    return np.where(weight == 0, np.float32(0), weight).view(np.uint32)


def _encode_bf16(weight: NDArray[np.float32]) -> NDArray[np.generic]:
    """Round to nearest, ties to even; NaN stays NaN, denormals become zero."""
    bits = weight.view(np.uint32)
    sums = bits >> 16
    sums &= 1
    sums += 0x7FFF
    sums += bits  # only a NaN's can overflow
    sums >>= 16
    rounded = sums.astype(np.uint16)
    rounded[np.isnan(weight)] = 0x7FC0
    rounded[(rounded & 0x7F80) == 0] = 0
    return rounded


def _encode_integers(weight: NDArray[np.float32]) -> NDArray[np.generic]:
    return weight.astype(np.int8).view(np.uint8)


def _integers(
    code: int, bits: int, levels: tuple[int, int], max_density: float, *, planes: bool = False
) -> ValueTraits:
    """Integers of so many bits; kernels expand them into the upper ones of a byte."""
    counts = 2 ** (8 - bits)
    return ValueTraits(
        code=code,
        stored_bits=bits,
        dtype=np.uint8,
        encode=_encode_integers,
        decode=lambda encoded: encoded.view(np.int8) * np.float32(counts),
        levels=levels,
        counts=counts,
        planes=planes,
        max_density=max_density,
    )


TRAITS: dict[Values, ValueTraits] = {
    "fp32": ValueTraits(
        code=1,
        stored_bits=32,
        dtype=np.uint32,
        encode=_encode_fp32,
        decode=lambda bits: bits.view(np.float32),
        max_density=0.9,
    ),
    "bf16": ValueTraits(
        code=2,
        stored_bits=16,
        dtype=np.uint16,
        encode=_encode_bf16,
        decode=lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
        max_density=0.85,
    ),
    "int8": _integers(3, 8, (-127, 127), 0.8, planes=True),
    "int4": _integers(4, 4, (-8, 7), 0.7),
    # Rounding alone leaves a third of zeros and more, in some Linears.
    "int3": _integers(5, 3, (-4, 3), 0.6),
}

# The types whose values are integers, by their bits.
INTEGERS: dict[int, Values] = {one.stored_bits: name for name, one in TRAITS.items() if one.levels}


class Rounded(NamedTuple):
    """A weight in integers: their bits [rows, cols], and of its scales what a file holds.

    `codes` [rows, blocks]: a byte of each; `exponent`: what they have in common; `signed`: whether
    any is below zero.
    """

    encoded: NDArray[np.generic]
    codes: NDArray[np.uint8]
    exponent: int
    signed: bool


def rounded(
    weight: NDArray[np.float32],
    traits: ValueTraits,
    levels: tuple[int, int],
    scales: NDArray[np.float32] | None,
    shared: int,
) -> Rounded:
    """`weight` [rows, cols] in integers from `levels[0]` to `levels[1]`.

    `scales` [rows, ceil(cols / shared)]: the grid that it lies on; None: they are chosen. Raises
    `ValueError` for a weight that is not finite, or off its grid, and for scales that no byte has.
    """
    grid = _scale_bits(weight, traits, levels, scales, shared)
    exponent = max(0, (int(_magnitude(grid).max()) - 240) // 16)
    signed = bool((grid & _SIGN).any())
    codes = _scale_codes(grid, exponent, signed)
    decoded = decode_scales(codes, exponent, signed) * np.float32(traits.counts)
    held = _magnitude(grid) >= 16 * exponent  # which scales are not too small to be held
    exact = held if scales is not None else None
    return Rounded(
        _quantize(weight, decoded, traits, levels, shared, exact), codes, exponent, signed
    )


_NOT_FINITE = "a weight with infinities or NaN cannot be stored in integers"
# Weights that are quantized at a time: few enough for the second-level cache.
_PART = 1 << 17


def _parts(weight: NDArray[np.float32]) -> Iterator[slice]:
    rows = max(1, _PART // weight.shape[1])
    return (slice(at, at + rows) for at in range(0, len(weight), rows))


def _scale_bits(
    weight: NDArray[np.float32],
    traits: ValueTraits,
    levels: tuple[int, int],
    scales: NDArray[np.float32] | None,
    shared: int,
) -> NDArray[np.int32]:
    """The upper 13 bits of the scales as fp32, [rows, ceil(cols / shared)]: all that they have."""
    if shared not in SHARED_COLUMNS:
        raise ValueError(f"32, 64 or 128 columns share a scale, not {shared}")
    rows, cols = weight.shape
    blocks = -(-cols // shared)
    if scales is not None:
        if not traits.signed_scales:  # the values have the sign then: no bit goes to it
            scales = np.abs(scales)
        return _grid_bits(scales, (rows, blocks), traits.counts)
    bits = np.empty((rows, blocks), dtype=np.int32)
    for part in _parts(weight):
        tiles = np.zeros((len(weight[part]), blocks * shared), dtype=np.float32)
        tiles[:, :cols] = weight[part]
        # A column of its own for each block: loops are as long as there are blocks.
        columns = np.ascontiguousarray(tiles.reshape(-1, shared).T)
        ends = columns.min(axis=0), columns.max(axis=0)
        if not np.isfinite(ends).all():
            raise ValueError(_NOT_FINITE)
        if traits.signed_scales:
            found = _least_squares(columns, *ends, traits)
        else:
            found = _fitting(*ends, levels)
        bits[part] = found.reshape(-1, blocks)
    octaves = traits.counts.bit_length() - 1
    magnitude: NDArray[np.int32] = np.maximum(_magnitude(bits) - 16 * octaves, 0)
    return magnitude | bits & _SIGN


def _magnitude(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """The upper 13 bits of scales without their signs: neighbours are neighbouring scales."""
    return bits & ~_SIGN


def _fitting(
    least: NDArray[np.float32],
    most: NDArray[np.float32],
    levels: tuple[int, int],
    signed: bool = False,
) -> NDArray[np.int32]:
    """The upper bits of the least scales above zero at which values from `least` to `most` fit."""
    reach = np.maximum(least / np.float32(levels[0]), most / np.float32(levels[1]))
    dropped = 19 + signed
    bits: NDArray[np.int32] = (reach + np.float32(0)).view(np.int32)  # -0 has bits, too
    return (bits + (1 << dropped) - 1) >> dropped << (dropped - 19)


def _grid_bits(
    scales: NDArray[np.float32], shape: tuple[int, int], counts: int
) -> NDArray[np.int32]:
    if scales.shape != shape:
        raise ValueError(f"the grid has scales {scales.shape}, its weight asks for {shape}")
    held = np.asarray(scales, dtype=np.float32) / np.float32(counts)
    bits = held.view(np.int32)
    # With signs there is a bit less for the mantissa.
    spare = 0xFFFFF if (held < 0).any() else 0x7FFFF
    if (bits & spare).any() or not np.isfinite(held).all():
        raise ValueError("a scale of the grid is not a power of two times sixteenths or eighths")
    return (bits >> 19) & (2 * _SIGN - 1)


# To cut the largest value off may cost less than to round all others to a coarser grid: candidates
# lie so many sixteenths of an octave below the scale at which it fits.
_CANDIDATES = {4: range(0, 8, 2), 3: range(0, 14, 2)}  # by the bits


def _least_squares(
    columns: NDArray[np.float32],
    least: NDArray[np.float32],
    most: NDArray[np.float32],
    traits: ValueTraits,
) -> NDArray[np.int32]:
    """The scales with signs of the least squared error, their upper 13 bits, [blocks].

    `columns`: [columns that share a scale, blocks], whose values lie from `least` to `most`.
    """
    levels = traits.levels
    assert levels is not None
    above = _fitting(least, most, levels, signed=True)
    below = _fitting(-most, -least, levels, signed=True)
    best, error = above, np.full_like(least, np.inf)
    for fitting, sign in ((above, 0), (below, _SIGN)):
        for down in _CANDIDATES[traits.stored_bits]:
            candidate = np.maximum(fitting - down, 0) | sign
            found = _squared_error(columns, candidate, levels)
            best = np.where(found < error, candidate, best)
            error = np.minimum(found, error)
    return best


def _squared_error(
    columns: NDArray[np.float32], bits: NDArray[np.int32], levels: tuple[int, int]
) -> NDArray[np.float32]:
    scale = (bits << 19).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):  # then no other scale is found better
        found = columns * np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
        np.rint(found, out=found)
        np.clip(found, *map(np.float32, levels), out=found)
        found *= scale
        found -= columns
        found *= found
        error: NDArray[np.float32] = found.sum(axis=0)
    return error


# A weight of a grid differs from its place there by what bf16 rounds, or half of it rounded twice.
_GRID_TOLERANCE = 2**-8
# Or, where fp16 has no smaller numbers, by half the space between those, and what a quotient in
# float32 is off; its integer is certain.
_FP16_TOLERANCE, _CERTAIN = np.float32(1.001 * 2**-25), 0.25


def _quantize(
    weight: NDArray[np.float32],
    scales: NDArray[np.float32],
    traits: ValueTraits,
    levels: tuple[int, int],
    shared: int,
    exact: NDArray[np.bool_] | None,
) -> NDArray[np.generic]:
    """The integers nearest to weight / scale, as bits.

    `exact`: the scales [rows, blocks] with which each must be near; ValueError if one is not.
    """
    encoded = np.empty(weight.shape, dtype=traits.dtype)
    scales = np.where(scales == 0, np.float32(1), scales)
    for part in _parts(weight):
        steps = scales[part].repeat(shared, axis=1)[:, : weight.shape[1]]
        quotient = weight[part] / steps
        rounded = np.rint(quotient)
        if exact is not None:
            if not np.isfinite(quotient).all():
                raise ValueError(_NOT_FINITE)
            quotient -= rounded
            off = np.abs(quotient) > _GRID_TOLERANCE * np.maximum(np.abs(rounded), 1)
            if off.any():
                off &= np.abs(quotient) > np.minimum(_FP16_TOLERANCE / np.abs(steps), _CERTAIN)
            off |= (rounded < levels[0]) | (rounded > levels[1])
            if off.any():
                # Scales that are too small for this weight's exponent were changed themselves.
                off &= exact[part].repeat(shared, axis=1)[:, : weight.shape[1]]
            if off.any():
                raise ValueError("a weight does not lie on its grid")
        encoded[part] = traits.encode(np.clip(rounded, *map(np.float32, levels), out=rounded))
    return encoded


def _scale_codes(grid: NDArray[np.int32], exponent: int, signed: bool) -> NDArray[np.uint8]:
    codes = np.maximum(_magnitude(grid) - 16 * exponent, 0)
    if signed:
        codes = codes >> 1 | (grid & _SIGN) >> 5
    return codes.astype(np.uint8)


def decode_scales(codes: NDArray[np.uint8], exponent: int, signed: bool) -> NDArray[np.float32]:
    """The scales that `codes` stand for, in their shape: see `Rounded`."""
    shift, mask = _CODED[signed]
    bits = codes.view(np.int8).astype(np.int32).view(np.uint32) << np.uint32(shift)
    return ((bits & np.uint32(mask)) + np.uint32(exponent << 23)).view(np.float32)
