"""The packed weight format that the kernels read, version 4.

A weight `[rows, cols]` (rows are outputs) becomes one block of bytes, little-endian, that a kernel uses
as it lies in the file. Every region starts on a multiple of 64 bytes.

Rows are taken in *groups* of 16, the last one padded with zeros. A group is a sequence of *cells*; a
cell is 16 rows x `pack` consecutive columns, where `pack` is 1 for fp32, 2 for bf16 and 4 for int8, int4
and int3, so that a cell, once expanded, is always 64 bytes. Inside a cell values lie row by row: value `row * pack + column`. As a
vector register, each of its 32-bit lanes thus belongs to one output row, and a matrix-vector product
ends with 16 outputs in one register and never adds across lanes. Columns are padded with zeros to a
multiple of `4 * pack`.

| region | bytes | holds |
|---|---|---|
| header | 128 | below |
| masks | groups x cells x 2 x pack | only if sparse: bit i of a cell's mask is set if its value i is stored |
| index | (groups + 1) x 4 | only if sparse: uint32, where a group's values start in the values, in units of 64 bytes |
| scales | groups x ceil(cells x pack / shared) x 16 | only integers: one byte for each row and the 32, 64 or 128 columns that share one; weight = scale x value, for int4 scale x 16 x value, for int3 scale x 32 x value |
| values | | sparse: each group's set values one after the other, padded to 64; dense: every cell in full; int4, int3, planes: below |
| tail | 64 | zeros, so that a kernel may load a whole register at the last value |

Header: `OWLPACK\\0`, then uint32 version, value type (1 fp32, 2 bf16, 3 int8, 4 int4, 5 int3), flags
(0 dense, 1 sparse, 2 planes) and rows in a group (16), then uint64 rows, cols, cells in a group, non-zeros,
offsets of masks, index, scales and values (0 where absent), and the block's length; uint32 scale exponent,
columns that share a scale (32, 64 or 128; 0 without scales), and 1 if scales have signs; 20 bytes reserved.
Versions 2 and 3 are still read: in neither do scales have signs, and 2 has no int4 and no int3, and 32
columns share a scale.

int8 values lie in [-127, 127]; kernels rely on -128 not being there only for accuracy, never for safety.
A scale's byte holds 4 bits of exponent and 4 of mantissa: as fp32 its bits are `byte << 19` plus the
header's scale exponent `<< 23`. With signs it holds one in its upper bit, and 3 bits of mantissa: its lower
7 bits `<< 20` plus that, and the sign. A scale below zero has the integers reach one further above zero than
below: of 4 bits and fewer that takes a tenth and more off the squared error.

int4 values lie in [-8, 7] and are stored plus 8, in 4 bits. Dense: each two cells of a group as one, 64
bytes whose lower halves are the first cell. Sparse: each cell's set values begin on a byte, the first of
two values in the byte's upper half; the last lower half may be unused. Kernels take such a value as the
int8 value 16 times as large: hence the 16 above.

int3 values lie in [-4, 3] and are stored plus 4. Dense: each four cells of a group are 96 bytes: first
64, of which byte i holds the lower two bits of value i of each, the first cell's lowest; then for each cell
8 bytes, whose bit i is the upper bit of its value i. Sparse: bits 3 x i to 3 x i + 2 of a group's values,
counted from the lowest of the first byte, are its i-th set value, whichever cell that is of. Kernels take
such a value as the int8 value 32 times as large.

Planes are for a dense int8 weight most of whose outputs matter little, as a head's do. A value in
[-119, 119] is `16 x high + low`, both in [-8, 7] and stored plus 8, in 4 bits. The high plane comes first:
each two cells of a group as one, 64 bytes whose lower halves are the first cell. The low plane follows
row by row, `16 x groups` of them: 64 bytes for 128 columns, whose lower halves are the first 64 columns.
32 columns share a scale.
"""  # noqa: E501 - a table

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.runtime.value_types import (
    SCALE_COLUMNS,
    SHARED_COLUMNS,
    TRAITS,
    Values,
    ValueTraits,
    decode_scales,
    rounded,
)

Block = NDArray[np.uint8]

MAGIC = b"OWLPACK\0"
VERSION, WITHOUT_SIGNS, OLDEST = 4, 3, 2
GROUP_ROWS = 16
ALIGNMENT = 64
LOW_COLUMNS = 128  # of the low plane, in 64 bytes
_DENSE, _SPARSE, _PLANES = range(3)
_HEADER = struct.Struct("<8s4I9Q3I20x")
_MAX_SCALE_EXPONENT = 254 - 15


@dataclass(frozen=True)
class PackedInfo:
    """What a block's header says, checked: shape, value type and the places of its regions."""

    values: Values
    sparse: bool
    planes: bool
    rows: int
    cols: int
    cells: int
    nonzeros: int
    mask_offset: int
    index_offset: int
    scale_offset: int
    value_offset: int
    size_bytes: int
    scale_exponent: int
    scale_columns: int
    signed_scales: bool

    @property
    def traits(self) -> ValueTraits:
        """What is known of its type of values."""
        return TRAITS[self.values]

    @property
    def groups(self) -> int:
        """How many groups of 16 rows there are."""
        return -(-self.rows // GROUP_ROWS)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, if there are any."""
        columns, shared = self.cells * self.traits.pack, self.scale_columns
        return self.groups * -(-columns // shared) * GROUP_ROWS if shared else 0

    @property
    def mask_bytes(self) -> int:
        """Bytes of the masks of a sparse weight."""
        return self.groups * self.cells * 2 * self.traits.pack

    @property
    def index_bytes(self) -> int:
        """Bytes of the index of a sparse weight."""
        return (self.groups + 1) * 4

    @property
    def dense_bytes(self) -> int:
        """Bytes of the values of a weight that is neither sparse nor in planes."""
        values = self.groups * self.cells * GROUP_ROWS * self.traits.pack
        return values * self.traits.stored_bits // 8

    @property
    def high_bytes(self) -> int:
        """Bytes of the high plane."""
        return self.groups * self.cells // 2 * 64

    @property
    def low_bytes(self) -> int:
        """Bytes of the low plane."""
        return self.groups * GROUP_ROWS * -(-self.cols // LOW_COLUMNS) * 64


def pack(
    weight: NDArray[np.floating],
    values: Values = "bf16",
    sparse: bool = True,
    *,
    planes: bool = False,
    scales: NDArray[np.float32] | None = None,
    scale_columns: int = SCALE_COLUMNS,
) -> Block:
    """Pack `weight` [rows, cols]; with `sparse` only its non-zeros. Returns the block of bytes.

    `planes`: int8 whose upper and lower bits lie apart; not with `sparse`. `scales` [rows,
    ceil(cols / scale_columns)], for integers: the grid that the weight lies on, to within what
    bf16 rounds; each scale 0, or a power of two times (1 + m / 16) with a whole m, which for fewer
    than 8 bits is even if any is below zero, and one that is less than 2^-15 of the largest is
    rounded to that. Without them they are chosen: int8's so that the largest value fits, those of
    fewer bits for the least squared error. ValueError for what does not fit.
    """
    if weight.ndim != 2 or 0 in weight.shape:
        raise ValueError(f"a weight has two dimensions and no empty one, not {weight.shape}")
    if values not in TRAITS:
        raise ValueError(f"values must be one of {', '.join(TRAITS)}, not {values!r}")
    traits = TRAITS[values]
    if planes and (sparse or not traits.planes or scale_columns != SCALE_COLUMNS):
        raise ValueError("only a dense int8 weight comes in planes")
    rows, cols = weight.shape
    weight = np.asarray(weight, dtype=np.float32)
    regions: list[tuple[str, NDArray[np.generic]]] = []
    exponent, signed = 0, False
    if traits.levels is None:
        encoded, scale_columns = traits.encode(weight), 0
    else:
        levels = (-119, 119) if planes else traits.levels
        found = rounded(weight, traits, levels, scales, scale_columns)
        encoded, exponent, signed = found.encoded, found.exponent, found.signed
        regions.append(("scale", _by_group(found.codes)))
    cells = _to_cells(encoded, traits)  # [groups, cells, 16 * pack]
    nonzeros = int(np.count_nonzero(encoded))
    if sparse:
        mask = cells != 0
        packed, index = _compress(cells, mask, traits)
        regions.append(("mask", np.packbits(mask, axis=-1, bitorder="little")))
        regions.append(("index", index.astype("<u4")))
    elif planes:
        packed = _to_planes(cells.view(np.int8), cols)
    else:
        join = _JOIN.get(traits.stored_bits)
        packed = join(cells.view(np.int8)) if join else cells
    regions.append(("value", packed))
    flags = _SPARSE if sparse else _PLANES if planes else _DENSE
    kind = (traits.code, flags)
    extents = (rows, cols, cells.shape[1], nonzeros)
    return _assemble(kind, extents, (exponent, scale_columns, int(signed)), regions)


def stored_bytes(
    shape: tuple[int, int],
    values: Values,
    sparsity: float | None = None,
    *,
    planes: bool = False,
    scale_columns: int = SCALE_COLUMNS,
) -> int:
    """The bytes that `pack` needs for a weight of this `shape`, before there is one.

    `sparsity`: the share of zeros of a weight that is packed sparse, None for a dense one. Exact
    where it is dense; where it is sparse, what is expected of zeros that lie anywhere.
    """
    rows, cols = shape
    traits = TRAITS[values]
    cells = traits.cells(cols)
    shared = scale_columns if traits.levels else 0
    nowhere = (0,) * 7
    form = (values, sparsity is not None, planes)
    info = PackedInfo(*form, rows, cols, cells, *nowhere, shared, signed_scales=False)
    regions = [info.scale_bytes]
    if sparsity is None:
        regions.append(info.high_bytes + info.low_bytes if planes else info.dense_bytes)
    else:
        regions += [info.mask_bytes, info.index_bytes, _expected_bytes(info, 1 - sparsity)]
    return _HEADER.size + sum(-(-one // ALIGNMENT) * ALIGNMENT for one in regions) + ALIGNMENT


def _expected_bytes(info: PackedInfo, density: float) -> int:
    """The values' bytes of a sparse weight whose non-zeros lie anywhere."""
    bits = info.rows * info.cols * density * info.traits.stored_bits
    if info.traits.stored_bits == 4:
        # A cell with an odd number of values leaves half a byte: the parity of a binomial.
        size = GROUP_ROWS * info.traits.pack
        bits += 4 * info.groups * info.cells * (1 - (1 - 2 * density) ** size) / 2
    return round(bits / 8 + info.groups * ALIGNMENT / 2)  # half of a group's padding is used


def unpack(block: Block) -> NDArray[np.float32]:
    """The weight [rows, cols] that `block` stands for, as fp32."""
    info = inspect(block)
    traits = info.traits
    cells = np.zeros((info.groups, info.cells, GROUP_ROWS * traits.pack), dtype=traits.dtype)
    raw = block[info.value_offset :]
    if info.sparse:
        masks = _masks(block, info)
        index = _index(block, info)
        for group in range(info.groups):
            stored = raw[int(index[group]) * ALIGNMENT :]
            if split_sparse := _SPLIT_SPARSE.get(traits.stored_bits):
                stored = split_sparse(stored, masks[group].sum(axis=1))
            values = stored[: int(masks[group].sum()) * cells.itemsize].view(cells.dtype)
            cells[group][masks[group]] = values
    elif info.planes:
        high, low = planes(block)
        matrix = (16 * high + low).view(np.uint8)
        return _decode(matrix[: info.rows, : info.cols], block, info)
    elif split := _SPLIT.get(traits.stored_bits):
        cells = split(raw[: info.dense_bytes]).view(np.uint8).reshape(cells.shape)
    else:
        cells = raw[: cells.nbytes].view(cells.dtype).reshape(cells.shape)
    return _decode(_from_cells(cells, info), block, info)


def planes(block: Block) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """The upper and lower bits of a weight in planes, in [-8, 7]: value = 16 x upper + lower.

    Both [16 x groups, cols].
    """
    info = read_header(block)
    raw = block[info.value_offset :]
    cells = _split_nibbles(raw[: info.high_bytes]).reshape(info.groups, -1, 64)
    high = _cells_to_matrix(cells, info.traits.pack)
    low = _split_nibbles(raw[info.high_bytes :][: info.low_bytes]).reshape(len(high), -1)
    return high[:, : info.cols], low[:, : info.cols]


def inspect(block: Block) -> PackedInfo:
    """Check `block` as the kernels do; returns what its header says, or raises ValueError."""
    info = read_header(block)
    tail = ALIGNMENT
    if not info.sparse:
        whole = info.high_bytes + info.low_bytes if info.planes else info.dense_bytes
        _check_region("values", info.value_offset, whole + tail, block.size)
    if info.scale_bytes:
        _check_region("scales", info.scale_offset, info.scale_bytes, block.size)
    if (not info.scale_bytes and info.scale_offset) or (
        not info.sparse and info.mask_offset | info.index_offset
    ):
        raise ValueError("a region that this weight does not have is given a place")
    if info.sparse:
        _check_region("values", info.value_offset, tail, block.size)
        _check_region("masks", info.mask_offset, info.mask_bytes, block.size)
        _check_region("index", info.index_offset, info.index_bytes, block.size)
        _check_groups(block, info)
    return info


def interleave_gate_up(gate: NDArray[np.floating], up: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of gate and up [n, cols] in alternating groups of 16: one weight, one pass."""
    if gate.shape != up.shape:
        raise ValueError(f"gate {gate.shape} and up {up.shape} differ in shape")
    groups = -(-gate.shape[0] // GROUP_ROWS)
    both = np.zeros((groups, 2, GROUP_ROWS, gate.shape[1]), dtype=np.float32)
    for which, weight in enumerate((gate, up)):
        padded = np.zeros((groups * GROUP_ROWS, gate.shape[1]), dtype=np.float32)
        padded[: weight.shape[0]] = weight
        both[:, which] = padded.reshape(groups, GROUP_ROWS, -1)
    return both.reshape(-1, gate.shape[1])


def _by_group(codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[rows, blocks] -> [groups, blocks, 16]"""
    rows, blocks = codes.shape
    padded = np.zeros((-(-rows // GROUP_ROWS) * GROUP_ROWS, blocks), dtype=np.uint8)
    padded[:rows] = codes
    return np.ascontiguousarray(padded.reshape(-1, GROUP_ROWS, blocks).transpose(0, 2, 1))


def _to_planes(cells: NDArray[np.int8], cols: int) -> NDArray[np.generic]:
    """int8 cells [groups, cells, 64] -> the high plane and the low plane."""
    high = (cells + np.int8(8)) >> 4
    rows = _cells_to_matrix(cells - 16 * high, TRAITS["int8"].pack)
    low = np.zeros((len(rows), -(-cols // LOW_COLUMNS) * LOW_COLUMNS), dtype=np.int8)
    low[:, :cols] = rows[:, :cols]
    return np.concatenate((_join_nibbles(high), _join_nibbles(low)))


def _join_nibbles(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Values in [-8, 7]: of each 128, the first 64 as lower halves and the others as upper ones."""
    halves = (values + np.int8(8)).view(np.uint8).reshape(-1, 2, 64)
    return halves[:, 0] | halves[:, 1] << np.uint8(4)


def _split_nibbles(stored: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What `_join_nibbles` joined, [bytes / 64, 2, 64]."""
    pairs = stored.reshape(-1, 64)
    return np.stack((pairs & 15, pairs >> 4), axis=1).view(np.int8) - np.int8(8)


def _join_threes(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Values in [-4, 3] of cells: of each four the lower two bits, then the upper ones."""
    cells = (values + np.int8(4)).view(np.uint8).reshape(-1, 4, 64)
    lower = np.zeros((len(cells), 64), dtype=np.uint8)
    for place in range(4):
        lower |= (cells[:, place] & 3) << np.uint8(2 * place)
    upper = np.packbits(cells >> 2, axis=-1, bitorder="little")
    return np.concatenate((lower, upper.reshape(-1, 32)), axis=1)


def _split_threes(stored: NDArray[np.uint8]) -> NDArray[np.int8]:
    """What `_join_threes` joined, [bytes / 96, 4, 64]."""
    quads = stored.reshape(-1, 96)
    lower = np.stack([quads[:, :64] >> np.uint8(2 * place) & 3 for place in range(4)], axis=1)
    upper = np.unpackbits(quads[:, 64:].reshape(-1, 4, 8), axis=-1, bitorder="little")
    values: NDArray[np.int8] = (lower | upper << np.uint8(2)).view(np.int8) - np.int8(4)
    return values


# Dense cells of fewer than 8 bits a value, by these bits.
_JOIN = {4: _join_nibbles, 3: _join_threes}
_SPLIT = {4: _split_nibbles, 3: _split_threes}


def _decode(bits: NDArray[np.generic], block: Block, info: PackedInfo) -> NDArray[np.float32]:
    values = info.traits.decode(bits)
    if not info.scale_bytes:
        return values
    codes = block[info.scale_offset :][: info.scale_bytes]
    coded = decode_scales(codes, info.scale_exponent, info.signed_scales)
    by_group = coded.reshape(info.groups, -1, GROUP_ROWS).transpose(0, 2, 1)
    by_row = by_group.reshape(info.groups * GROUP_ROWS, -1)[: info.rows]
    return values * by_row.repeat(info.scale_columns, axis=1)[:, : info.cols]


def _to_cells(encoded: NDArray[np.generic], traits: ValueTraits) -> NDArray[np.generic]:
    """[rows, cols] -> [groups, cells, 16 * pack], zero-padded."""
    rows, cols = encoded.shape
    groups = -(-rows // GROUP_ROWS)
    cells, packed_columns = traits.cells(cols), traits.pack
    padded = np.zeros((groups * GROUP_ROWS, cells * packed_columns), dtype=encoded.dtype)
    padded[:rows, :cols] = encoded
    tiles = padded.reshape(groups, GROUP_ROWS, cells, packed_columns).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles).reshape(groups, cells, GROUP_ROWS * packed_columns)


def _from_cells(cells: NDArray[np.generic], info: PackedInfo) -> NDArray[np.generic]:
    matrix = _cells_to_matrix(cells, info.traits.pack)
    return np.ascontiguousarray(matrix[: info.rows, : info.cols])


def _cells_to_matrix(cells: NDArray[Any], packed_columns: int) -> NDArray[Any]:
    """[groups, cells, 16 * pack] -> [16 * groups, cells * pack]"""
    groups, count = cells.shape[:2]
    tiles = cells.reshape(groups, count, GROUP_ROWS, packed_columns).transpose(0, 2, 1, 3)
    return tiles.reshape(groups * GROUP_ROWS, count * packed_columns)


def _compress(
    cells: NDArray[np.generic], mask: NDArray[np.bool_], traits: ValueTraits
) -> tuple[NDArray[np.generic], NDArray[np.uint32]]:
    """Each group's non-zeros, padded to 64 bytes, and the index of their starts."""
    parts: list[bytes] = []
    index = np.zeros(len(cells) + 1, dtype=np.uint32)
    for group, (values, used) in enumerate(zip(cells, mask, strict=True)):
        kept: NDArray[np.generic] = values[used]
        if join := _JOIN_SPARSE.get(traits.stored_bits):
            kept = join(kept.view(np.int8), used.sum(axis=1))
        stored = kept.tobytes()
        stored += bytes(-len(stored) % ALIGNMENT)
        parts.append(stored)
        index[group + 1] = index[group] + len(stored) // ALIGNMENT
    return np.frombuffer(b"".join(parts), np.uint8), index


def _join_sparse_nibbles(values: NDArray[np.int8], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Values of cells that have `counts` of them: two a byte, a cell's first in an upper half."""
    ends = np.cumsum(counts)
    even = np.insert((values + np.int8(8)).view(np.uint8), ends[counts % 2 == 1], np.uint8(0))
    return even[::2] << np.uint8(4) | even[1::2]


def _sparse_nibbles(stored: NDArray[np.uint8], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The values that `_join_sparse_nibbles` joined."""
    size = int(((counts + 1) // 2).sum())
    halves = np.stack((stored[:size] >> 4, stored[:size] & 15), axis=1).reshape(-1)
    unused = (np.cumsum((counts + 1) // 2) * 2 - 1)[counts % 2 == 1]
    return np.delete(halves, unused) - np.uint8(8)


def _join_sparse_threes(values: NDArray[np.int8], _: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Values of cells, 3 bits each, one after the other."""
    bits = np.unpackbits((values + np.int8(4)).view(np.uint8)[:, None], axis=1, bitorder="little")
    return np.packbits(bits[:, :3], bitorder="little")


def _sparse_threes(stored: NDArray[np.uint8], counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """The values that `_join_sparse_threes` joined."""
    bits = np.unpackbits(stored, count=3 * int(counts.sum()), bitorder="little")
    joined = np.packbits(bits.reshape(-1, 3), axis=1, bitorder="little")
    return joined[:, 0] - np.uint8(4)


# Of sparse cells, with how many values each has.
_JOIN_SPARSE = {4: _join_sparse_nibbles, 3: _join_sparse_threes}
_SPLIT_SPARSE = {4: _sparse_nibbles, 3: _sparse_threes}


def _assemble(
    kind: tuple[int, int],
    extents: tuple[int, int, int, int],
    of_scales: tuple[int, int, int],
    regions: list[tuple[str, NDArray[np.generic]]],
) -> Block:
    """Header, regions, each at a multiple of 64, and the tail."""
    offsets = dict.fromkeys(("mask", "index", "scale", "value"), 0)
    end = _HEADER.size
    for name, region in regions:
        offsets[name] = -(-end // ALIGNMENT) * ALIGNMENT
        end = offsets[name] + region.nbytes
    block = np.zeros((-(-end // ALIGNMENT) + 1) * ALIGNMENT, dtype=np.uint8)
    places = (*offsets.values(), block.size, *of_scales)
    header = _HEADER.pack(MAGIC, VERSION, *kind, GROUP_ROWS, *extents, *places)
    block[: _HEADER.size] = np.frombuffer(header, np.uint8)
    for name, region in regions:
        place = slice(offsets[name], offsets[name] + region.nbytes)
        block[place] = np.ascontiguousarray(region).reshape(-1).view(np.uint8)
    return block


def read_header(block: Block) -> PackedInfo:
    """What a block's header says, without a look at what follows; ValueError if it cannot be."""
    if block.size < _HEADER.size:
        raise ValueError("the block is shorter than its header")
    magic, version, code, flags, group_rows, *rest = _HEADER.unpack(block[: _HEADER.size].tobytes())
    rows, cols, cells, nonzeros, mask, index, scale, value, total, exponent, shared, signed = rest
    names = {traits.code: name for name, traits in TRAITS.items()}
    if magic != MAGIC:
        raise ValueError("the block does not start with OWLPACK")
    if not OLDEST <= version <= VERSION:
        raise ValueError(f"format version {version} is not supported (2 to 4 are): export again")
    if version == OLDEST:
        names = {code: name for code, name in names.items() if code <= TRAITS["int8"].code}
    if code not in names or flags > _PLANES or group_rows != GROUP_ROWS:
        raise ValueError("unknown value type, flags or group size")
    traits = TRAITS[names[code]]
    if flags == _PLANES and not traits.planes:
        raise ValueError("only int8 comes in planes")
    if version == OLDEST:
        shared = SCALE_COLUMNS if traits.levels else 0
    if version <= WITHOUT_SIGNS:
        signed = 0
    if signed > (traits.levels is not None):
        raise ValueError("scales have signs or have none, and only integers have scales")
    allowed = (0,) if not traits.levels else SHARED_COLUMNS[: 1 if flags == _PLANES else None]
    if shared not in allowed:
        raise ValueError("scales cannot be shared by so many columns")
    if exponent > _MAX_SCALE_EXPONENT:
        raise ValueError("the scales' exponent is out of range")
    if not (0 < rows <= 1 << 28 and 0 < cols <= 1 << 28):
        raise ValueError("rows and columns must lie between 1 and 2^28")
    if total != block.size:
        raise ValueError("the block's length differs from what its header says (truncated?)")
    if cells != traits.cells(cols):
        raise ValueError("the number of cells does not match the columns")
    form = (names[code], flags == _SPARSE, flags == _PLANES)
    counts = (rows, cols, cells, nonzeros)
    places = (mask, index, scale, value, total)
    return PackedInfo(*form, *counts, *places, exponent, shared, bool(signed))


def _check_region(name: str, offset: int, size_bytes: int, total: int) -> None:
    if offset % ALIGNMENT or offset < _HEADER.size or offset + size_bytes > total:
        raise ValueError(f"the {name} lie outside the block")


def _masks(block: Block, info: PackedInfo) -> NDArray[np.bool_]:
    """[groups, cells, 16 * pack]"""
    raw = block[info.mask_offset :][: info.mask_bytes].reshape(info.groups, info.cells, -1)
    bits = np.unpackbits(raw, axis=-1, bitorder="little")
    return bits.astype(bool)


def _index(block: Block, info: PackedInfo) -> NDArray[np.int64]:
    return block[info.index_offset :][: info.index_bytes].view(np.uint32).astype(np.int64)


def _check_groups(block: Block, info: PackedInfo) -> None:
    index = _index(block, info)
    room = np.diff(index) * ALIGNMENT
    counts = _masks(block, info).sum(axis=2)  # of each cell
    # Its values begin on a byte, or all of the group follow one another.
    own = counts.sum(axis=1, keepdims=True) if info.traits.stored_bits == 3 else counts
    needed = -(-own * info.traits.stored_bits // 8)
    if (room < 0).any():
        raise ValueError("the index is not ascending")
    if info.value_offset + index[-1] * ALIGNMENT + ALIGNMENT > block.size:
        raise ValueError("the index points past the values")
    if (needed.sum(axis=1) > room).any():
        raise ValueError("a mask has more bits than its group has values")
    if int(counts.sum()) != info.nonzeros:
        raise ValueError("the masks do not add up to the number of non-zeros")
