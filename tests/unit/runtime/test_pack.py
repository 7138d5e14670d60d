"""The packed format: what goes in comes out, and what is wrong is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import SHARED_COLUMNS, Values

from .conftest import INTEGERS, STEP, VALUES, Kernels, in_bf16, on_grid, sparse_weight, to_bf16

SHAPES = [(1, 1), (16, 64), (17, 5), (31, 129), (64, 576), (100, 1000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99, 1.0])
def test_round_trip(shape: tuple[int, int], values: Values, sparse: bool, sparsity: float) -> None:
    weight = sparse_weight(*shape, sparsity)
    block = pack.pack(weight, values, sparse)
    info = pack.inspect(block)
    back = pack.unpack(block)
    assert (info.rows, info.cols, info.sparse, info.values) == (*shape, sparse, values)
    assert back.shape == weight.shape
    assert np.array_equal(back == 0, weight == 0) or values in INTEGERS
    assert np.abs(back - weight).max() <= STEP[values] * np.abs(weight).max()
    again = pack.unpack(pack.pack(back, values, sparse))
    assert np.abs(again - back).max() <= STEP[values] * np.abs(weight).max()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 1.0])
def test_planes_hold_int8_in_two_halves(shape: tuple[int, int], sparsity: float) -> None:
    weight = sparse_weight(*shape, sparsity)
    block = pack.pack(weight, "int8", sparse=False, planes=True)
    high, low = (part[: shape[0]].astype(int) for part in pack.planes(block))
    back = pack.unpack(block)
    assert pack.inspect(block).planes
    assert np.abs(back - weight).max() <= 127 / 119 * STEP["int8"] * np.abs(weight).max()
    assert np.abs(high).max() <= 7
    assert set(low.flat) <= set(range(-8, 8))
    scale = np.divide(back, 16 * high + low, out=np.zeros_like(back), where=back != 0)
    # Half of 16 steps, and half of one.
    assert np.abs(scale * 16 * high - weight).max() <= 8.5 / 119 * 17 / 16 * np.abs(weight).max()


def as_version_2(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """`block` as it was before its header said how many columns share a scale."""
    return changed(changed(block, "version", 2), "scale_columns", 0)


@pytest.mark.parametrize("values", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("sparse", [True, False])
def test_version_2_is_read(kernels: Kernels, isa: str, values: Values, sparse: bool) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), values, sparse)
    old = as_version_2(block)
    np.testing.assert_array_equal(pack.unpack(old), pack.unpack(block))
    x = np.ones((3, 70), dtype=np.float32)
    found, wanted = (kernels.matmul(isa, one, x, 33)[0] for one in (old, block))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("values", INTEGERS)
def test_version_3_is_read(kernels: Kernels, isa: str, values: Values) -> None:
    weight, scales = on_grid(33, 70, values, 32)
    block = pack.pack(weight, values, sparse=False, scales=scales)
    # What tells of signs means nothing there.
    old = changed(changed(block, "version", 3), "signs", 7)
    np.testing.assert_array_equal(pack.unpack(old), weight)
    np.testing.assert_array_equal(kernels.gather(old, 5, 70), weight[5])
    x = np.ones((3, 70), dtype=np.float32)
    found, wanted = (kernels.matmul(isa, one, x, 33)[0] for one in (old, block))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("sparse", [False, True])
def test_scales_below_zero(kernels: Kernels, isa: str, values: Values, sparse: bool) -> None:
    weight, scales = on_grid(33, 70, values, 32, signs=True)
    block = pack.pack(weight, values, sparse, scales=scales)
    for rows in (1, 3, 40):
        x = np.ones((rows, 70), dtype=np.float32)
        found = kernels.matmul(isa, block, x, 33)[0]
        seen = to_bf16(weight.astype(np.float32)) if in_bf16(rows, isa) else weight
        np.testing.assert_allclose(found, x @ seen.T, rtol=1e-5, atol=1e-4)
    if not pack.inspect(block).sparse:
        np.testing.assert_array_equal(kernels.gather(block, 5, 70), weight[5])


def test_version_2_has_no_int4(kernels: Kernels) -> None:
    refused(kernels, as_version_2(pack.pack(sparse_weight(33, 70, 0.5), "int4")), "value type")


@pytest.mark.parametrize("values", VALUES[1:])
def test_only_so_many_columns_share_a_scale(kernels: Kernels, values: Values) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), values)
    for shared in (1, 31, 48, 256) + ((32,) if values == "bf16" else (0,)):
        refused(kernels, changed(block, "scale_columns", shared), "shared by so many")


def test_values_of_int4_are_counted_by_cell(kernels: Kernels) -> None:
    """Each cell's begin on a byte: 64 cells of one value need 64 bytes, not 32."""
    weight = np.zeros((16, 256), dtype=np.float32)
    weight[0, ::4] = 1
    block = pack.pack(np.concatenate((weight, weight)), "int4").copy()
    info = pack.inspect(block)
    assert np.diff(block[info.index_offset :][:12].view(np.uint32)).tolist() == [1, 1]
    block[info.mask_offset + 1] = 1  # of cell 0, which has room for it in its byte
    refused(kernels, block, "do not add up")
    kernels.check(changed(block, "nonzeros", 129))
    block[info.mask_offset + 2] = 1  # and for no third
    refused(kernels, changed(block, "nonzeros", 130), "more bits")


def test_values_of_int3_are_counted_by_group(kernels: Kernels) -> None:
    """They follow one another: in 64 bytes there is room for 170, of whichever cells."""
    weight = np.zeros((16, 256), dtype=np.float32)
    weight[0, ::4] = 1
    block = pack.pack(np.concatenate((weight, weight)), "int3").copy()
    info = pack.inspect(block)
    assert np.diff(block[info.index_offset :][:12].view(np.uint32)).tolist() == [1, 1]
    room = 512 // 3  # values in 64 bytes
    masks = block[info.mask_offset :][: info.mask_bytes // 2].reshape(64, 8)
    masks[: (room - 64) // 2, 1] = 3
    kernels.check(changed(block, "nonzeros", 64 + room))
    masks[-1, 1] = 1
    refused(kernels, changed(block, "nonzeros", 65 + room), "more bits")


@pytest.mark.parametrize("group", [32, 128])
def test_values_of_int3_lie_where_the_format_says(group: int) -> None:
    weight, scales = on_grid(33, 70, "int3", group)
    weight[np.random.default_rng(5).random(weight.shape) < 0.5] = 0
    block = pack.pack(weight, "int3", scales=scales, scale_columns=group)
    info = pack.inspect(block)
    bits = np.unpackbits(block[info.value_offset :], bitorder="little")
    masks = np.unpackbits(block[info.mask_offset :][: info.mask_bytes], bitorder="little")
    starts = 8 * 64 * block[info.index_offset :][: 4 * info.groups].view(np.uint32)
    for row, column in zip(*np.nonzero(weight), strict=True):
        in_group, group_at = row % 16, row // 16
        place = (column // 4) * 64 + in_group * 4 + column % 4
        own = masks[group_at * info.cells * 64 :]
        assert own[place]
        first = starts[group_at] + 3 * int(own[:place].sum())
        stored = int(bits[first] + 2 * bits[first + 1] + 4 * bits[first + 2])
        assert (stored - 4) * scales[row, column // group] == weight[row, column]


def test_size_at_seventy_percent() -> None:
    weight = sparse_weight(1024, 1024, 0.7)
    bits = {values: pack.pack(weight, values).size / weight.size for values in ("bf16", "int8")}
    assert bits["bf16"] == pytest.approx(0.725, rel=0.02)
    assert bits["int8"] == pytest.approx(0.3 + 1 / 8 + 1 / 32, rel=0.01)


@pytest.mark.parametrize("shape", [*SHAPES, (192, 576)])
@pytest.mark.parametrize("values", VALUES)
def test_the_size_of_a_dense_weight_is_known_before(shape: tuple[int, int], values: Values) -> None:
    weight = sparse_weight(*shape, 0.0)
    assert pack.stored_bytes(shape, values) == pack.pack(weight, values, sparse=False).size
    if values in INTEGERS:
        block = pack.pack(weight, values, sparse=False, scale_columns=128)
        assert pack.stored_bytes(shape, values, scale_columns=128) == block.size
    if values == "int8":
        block = pack.pack(weight, values, sparse=False, planes=True)
        assert pack.stored_bytes(shape, values, planes=True) == block.size


@pytest.mark.parametrize("shape", [(192, 576), (100, 1000), (576, 1536)])
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_the_size_of_a_sparse_weight_is_expected_to_a_hundredth(
    shape: tuple[int, int], values: Values, sparsity: float
) -> None:
    block = pack.pack(sparse_weight(*shape, sparsity), values)
    zeros = 1 - pack.inspect(block).nonzeros / (shape[0] * shape[1])
    expected = pack.stored_bytes(shape, values, zeros, scale_columns=32)
    assert expected == pytest.approx(block.size, rel=0.01)


def test_every_region_is_aligned() -> None:
    info = pack.inspect(pack.pack(sparse_weight(100, 77, 0.5), "int8"))
    for offset in (info.mask_offset, info.index_offset, info.scale_offset, info.value_offset):
        assert offset % pack.ALIGNMENT == 0


def test_refuses_what_it_cannot_store() -> None:
    with pytest.raises(ValueError, match="two dimensions"):
        pack.pack(np.zeros(3, dtype=np.float32))
    for values in INTEGERS:
        with pytest.raises(ValueError, match="infinities"):
            pack.pack(np.array([[np.inf]], dtype=np.float32), values)
    for values, sparse in (("bf16", False), ("int8", True)):
        with pytest.raises(ValueError, match="planes"):
            pack.pack(np.ones((2, 2), dtype=np.float32), values, sparse, planes=True)
    with pytest.raises(ValueError, match="must be one of"):
        pack.pack(np.ones((2, 2), dtype=np.float32), "int5")  # type: ignore[arg-type]


def test_gate_and_up_must_be_of_one_shape() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        pack.interleave_gate_up(np.ones((2, 3)), np.ones((3, 3)))
    assert pack.interleave_gate_up(np.ones((2, 3)), np.ones((2, 3))).dtype == np.float32


def test_gate_and_up_alternate() -> None:
    gate, up = sparse_weight(20, 8, 0, seed=1), sparse_weight(20, 8, 0, seed=2)
    both = pack.interleave_gate_up(gate, up)
    assert both.shape == (64, 8)
    np.testing.assert_array_equal(both[:16], gate[:16])
    np.testing.assert_array_equal(both[16:32], up[:16])
    np.testing.assert_array_equal(both[32:36], gate[16:])
    assert not both[36:48].any()


# ---- Hostile blocks --------------------------------------------------------------------

REFUSAL = (
    "block|version|value type|flags|planes|exponent|"
    "groups of 16|rows|cells|outside|region|index|mask|shared|signs"
)
HEADER_FIELDS = {
    "version": (8, 4),
    "type": (12, 4),
    "flags": (16, 4),
    "group_rows": (20, 4),
    "rows": (24, 8),
    "cols": (32, 8),
    "cells": (40, 8),
    "nonzeros": (48, 8),
    "masks": (56, 8),
    "index": (64, 8),
    "scales": (72, 8),
    "values": (80, 8),
    "total": (88, 8),
    "exponent": (96, 4),
    "scale_columns": (100, 4),
    "signs": (104, 4),
}


@pytest.mark.parametrize("field", HEADER_FIELDS)
@pytest.mark.parametrize("value", [0, 1, 63, 2**31, 2**32 - 1, 2**63, 2**64 - 64, 2**64 - 1])
@pytest.mark.parametrize("values", ["bf16", "int8", "int4", "int3"])
def test_hostile_header(kernels: Kernels, field: str, value: int, values: Values) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), values).copy()
    offset, width = HEADER_FIELDS[field]
    new = np.frombuffer((value % 2 ** (8 * width)).to_bytes(width, "little"), dtype=np.uint8)
    if np.array_equal(block[offset : offset + width], new):
        pytest.skip("this is the true value")
    block[offset : offset + width] = new
    exponent = field == "exponent" and value % 2**32 < 2**8 - 16  # the weight is larger or smaller
    signs = field == "signs" and value % 2**32 < 2 and values != "bf16"  # others are
    if exponent or signs:
        kernels.check(block)
        pack.inspect(block)
        return
    with pytest.raises(ValueError, match=REFUSAL):
        kernels.check(block)
    with pytest.raises(ValueError, match=REFUSAL):
        pack.inspect(block)


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 1000])
def test_truncated(kernels: Kernels, size: int) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), "bf16")[:size]
    with pytest.raises(ValueError, match=REFUSAL):
        kernels.check(block)
    with pytest.raises(ValueError, match=REFUSAL):
        pack.inspect(block)


def changed(block: NDArray[np.uint8], field: str, value: int) -> NDArray[np.uint8]:
    """`block` with another value in its header."""
    offset, width = HEADER_FIELDS[field]
    block = block.copy()
    block[offset : offset + width] = np.frombuffer(value.to_bytes(width, "little"), dtype=np.uint8)
    return block


def refused(kernels: Kernels, block: NDArray[np.uint8], match: str) -> None:
    """The kernels and the Python refuse `block`, in the same words."""
    for check in (kernels.check, pack.inspect):
        with pytest.raises(ValueError, match=match):
            check(block)


@pytest.mark.parametrize(
    ("values", "sparse", "planes", "field", "bytes_"),
    [
        ("int4", True, False, "masks", 3 * 52 * 8),
        ("int4", False, False, "scales", 3 * 7 * 16),
        ("int4", False, False, "values", 3 * 26 * 64 + 64),
        ("int3", False, False, "scales", 3 * 7 * 16),
        # 33 x 200 is 3 groups of 52 cells of int8, of 100 of bf16.
        ("int8", True, False, "masks", 3 * 52 * 8),
        ("bf16", True, False, "masks", 3 * 100 * 4),
        ("int8", True, False, "index", 4 * 4),
        ("int8", True, False, "scales", 3 * 7 * 16),
        ("int8", False, False, "scales", 3 * 7 * 16),
        ("int8", False, False, "values", 3 * 52 * 64 + 64),
        ("bf16", False, False, "values", 3 * 100 * 64 + 64),
        ("int8", False, True, "values", 3 * 26 * 64 + 3 * 16 * 2 * 64 + 64),
        ("int8", True, False, "values", 64),
    ],
)
def test_a_region_may_end_where_the_block_does_and_no_later(
    kernels: Kernels, values: Values, sparse: bool, planes: bool, field: str, bytes_: int
) -> None:
    block = pack.pack(sparse_weight(33, 200, 0.5), values, sparse, planes=planes)
    # Space behind the last region, with a place that fits by the byte and one that does not.
    room = -(-bytes_ // 64) * 64
    longer = np.concatenate((block, np.zeros(room, dtype=np.uint8)))
    longer = changed(longer, "total", len(longer))
    last = len(longer) - room
    fits = changed(longer, field, last)
    if field == "values" and sparse:
        refused(kernels, fits, "points past the values")
    elif field in ("values", "scales"):  # other numbers, but they are all there
        kernels.check(fits)
        pack.inspect(fits)
    refused(kernels, changed(longer, field, last + 64), f"outside|{field}|mask|region")
    refused(kernels, changed(longer, field, last + 1), f"outside|{field}|mask|region")


@pytest.mark.parametrize("field", ["rows", "cols"])
def test_extents_have_bounds(kernels: Kernels, field: str) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), "bf16")
    for value in (0, 2**28 + 1, 2**29):
        refused(kernels, changed(block, field, value), "between 1 and 2")


def test_the_largest_exponent_is_allowed_and_no_larger(kernels: Kernels) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), "int8")
    pack.inspect(changed(block, "exponent", 239))
    kernels.check(changed(block, "exponent", 239))
    refused(kernels, changed(block, "exponent", 240), "exponent")


@pytest.mark.parametrize("values", ["bf16", "fp32"])
def test_only_int8_comes_in_planes(kernels: Kernels, values: Values) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), values, sparse=False)
    refused(kernels, changed(block, "flags", 2), "planes")


def test_an_index_that_points_past_the_values(kernels: Kernels) -> None:
    block = pack.pack(sparse_weight(33, 70, 0.5), "int8").copy()
    info = pack.inspect(block)
    last = block[info.index_offset + 4 * info.groups :][:4].view(np.uint32)
    last += 1
    refused(kernels, block, "points past the values")


def test_mask_with_too_many_bits(kernels: Kernels) -> None:
    block = pack.pack(sparse_weight(32, 64, 0.9), "int8").copy()
    info = pack.inspect(block)
    block[info.mask_offset : info.mask_offset + 64] = 0xFF
    with pytest.raises(ValueError, match="more bits"):
        kernels.check(block)
    with pytest.raises(ValueError, match="more bits"):
        pack.inspect(block)


@settings(max_examples=300, deadline=None, derandomize=True)  # the same each time
@given(data=st.data())
def test_fuzzed_blocks_never_read_outside(kernels: Kernels, data: st.DataObject) -> None:
    """Damage is refused, or leaves a block that multiplies inside its bounds (ASan watches)."""
    values = data.draw(st.sampled_from(VALUES))
    shared = data.draw(st.sampled_from(SHARED_COLUMNS))
    rows, cols = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 150))
    sparse = data.draw(st.booleans())
    planes = values == "int8" and not sparse and data.draw(st.booleans())
    weight = sparse_weight(rows, cols, 0.6)
    shared = 32 if planes else shared
    block = pack.pack(weight, values, sparse, planes=planes, scale_columns=shared).copy()
    for _ in range(data.draw(st.integers(1, 8))):
        # Mostly in the header and the index, where it hurts.
        at = data.draw(st.integers(0, min(block.size, 256) - 1) | st.integers(0, block.size - 1))
        block[at] = data.draw(st.integers(0, 255))
    block = block[
        : data.draw(
            st.sampled_from([block.size, block.size, data.draw(st.integers(0, block.size))])
        )
    ]
    refusals = []
    for check in (kernels.check, pack.inspect):
        try:
            check(block)
            refusals.append(False)
        except ValueError:
            refusals.append(True)
    assert refusals[0] == refusals[1]
    if refusals[0]:
        return
    info = pack.inspect(block)
    x = np.ones((data.draw(st.sampled_from([1, 3, 17, 49])), info.cols), dtype=np.float32)
    for isa in kernels.isas():
        kernels.matmul(isa, block, x, info.rows)
