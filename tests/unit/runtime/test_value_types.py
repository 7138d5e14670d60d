"""Which value stands for each weight: integers, their scales and grids, and bf16."""

import numpy as np
import pytest

from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import SHARED_COLUMNS, Values

from .conftest import INTEGERS, STEP, on_grid, sparse_weight

MIXED: tuple[tuple[Values, bool], ...] = (("int8", False), ("int4", True))


def test_int8_scales_span_the_sizes_of_a_weight_s_rows() -> None:
    weight = sparse_weight(64, 64, 0.0)
    weight *= np.logspace(-4, 4, 64, dtype=np.float32)[:, None]
    error = np.abs(pack.unpack(pack.pack(weight, "int8")) - weight).max(axis=1)
    size = np.abs(weight).max(axis=1)
    assert (
        error[size > 2**-14 * size.max()] <= STEP["int8"] * size[size > 2**-14 * size.max()]
    ).all()
    assert error.max() <= STEP["int8"] * size.max()
    for factor in (1e-30, 1e30):  # the exponent is the weight's own
        scaled = (weight[:8] * np.float32(factor)).astype(np.float32)
        back = pack.unpack(pack.pack(scaled, "int8"))
        assert np.abs(back - scaled).max() <= STEP["int8"] * np.abs(scaled).max()


@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shared", SHARED_COLUMNS)
@pytest.mark.parametrize("signs", [False, True])
def test_a_weight_on_a_grid_keeps_it(
    values: Values, sparse: bool, shared: int, signs: bool
) -> None:
    weight, scales = on_grid(37, 200, values, shared, signs=signs)
    bf16 = pack.unpack(pack.pack(weight, "bf16"))  # as checkpoints hold it
    for held in (weight, bf16):
        block = pack.pack(held, values, sparse, scales=scales, scale_columns=shared)
        np.testing.assert_array_equal(pack.unpack(block), weight)
        assert pack.inspect(block).nonzeros == np.count_nonzero(weight)
        assert pack.inspect(block).signed_scales == (signs and values != "int8")


def test_8_bits_hold_scales_of_either_sign_and_any_mantissa() -> None:
    """As they meet where Linears of different bits are one weight."""
    (fine, steps), (coarse, signed) = (on_grid(16, 64, v, 32, signs=s) for v, s in MIXED)
    weight, scales = np.concatenate((fine, coarse)), np.concatenate((steps, signed))
    block = pack.pack(weight, "int8", sparse=False, scales=scales)
    np.testing.assert_array_equal(pack.unpack(block), weight)


@pytest.mark.parametrize("exponent", range(-22, -16))
def test_an_8_bit_grid_in_float16_holds_weights_that_are_nearly_nothing(exponent: int) -> None:
    generator = np.random.default_rng(0)
    scales = np.ldexp(1 + generator.integers(0, 16, (16, 2)) / 16, -8).astype(np.float32)
    scales[3] = np.ldexp(scales[3], exponent + 8)  # fp16 has multiples of 2**-24 there
    integers = generator.integers(-127, 128, (16, 128))
    weight = integers * scales.repeat(64, axis=1)
    held = weight.astype(np.float16).astype(np.float32)
    assert not np.array_equal(held, weight)
    block = pack.pack(held, "int8", scales=scales, scale_columns=64)
    np.testing.assert_array_equal(pack.unpack(block), weight)


def test_a_weight_off_its_grid_is_refused() -> None:
    weight, scales = on_grid(37, 64, "int4", 32)
    large = np.argwhere(np.abs(weight / scales.repeat(32, axis=1)) == 7)[0]
    for row, column, change in ((3, 40, 0.3), (36, 0, 0.6), (*large, 0.1)):
        changed = weight.copy()
        changed[row, column] += np.float32(change) * scales[row, column // 32]
        with pytest.raises(ValueError, match="does not lie on its grid"):
            pack.pack(changed, "int4", scales=scales)
    for bad in (np.nan, np.inf, 8 * scales[0, 0], scales[0, 0] * -9):
        changed = weight.copy()
        changed[0, 0] = bad
        with pytest.raises(ValueError, match=r"does not lie on its grid|infinities or NaN"):
            pack.pack(changed, "int4", scales=scales)
    with pytest.raises(ValueError, match="power of two times sixteenths"):
        pack.pack(weight, "int4", scales=scales * np.float32(1.01))
    with pytest.raises(ValueError, match="sixteenths or eighths"):
        pack.pack(weight, "int4", scales=-scales)
    with pytest.raises(ValueError, match="does not lie on its grid"):
        pack.pack(-8 * np.ones((1, 32), np.float32), "int4", scales=-np.ones((1, 1), np.float32))
    with pytest.raises(ValueError, match="asks for"):
        pack.pack(weight, "int4", scales=scales[:, :1])
    with pytest.raises(ValueError, match="share a scale"):
        pack.pack(weight, "int4", scale_columns=48)
    with pytest.raises(ValueError, match="planes"):
        pack.pack(weight, "int8", sparse=False, planes=True, scale_columns=64)


def test_scales_too_small_for_their_weight_s_exponent_are_rounded_up() -> None:
    scales = np.array([[1.0], [2.0**-30]], dtype=np.float32)
    back = pack.unpack(pack.pack(np.repeat(7 * scales, 32, axis=1), "int4", scales=scales))
    np.testing.assert_array_equal(back[0], np.full(32, 7, dtype=np.float32))
    assert not back[1].any()


@pytest.mark.parametrize("size", [1e-45, 1e-39, 1e-37, 1e30, 3e38])
def test_int4_of_the_smallest_and_the_largest(size: float) -> None:
    weight = np.array([[1, -1, 0.5, 0]], dtype=np.float32) * np.float32(size)
    back = pack.unpack(pack.pack(weight, "int4"))
    assert np.isfinite(back).all()
    assert np.abs(back - weight).max() <= max(0.3 * size, 2e-37)


@pytest.mark.parametrize(
    ("values", "largest", "sparsity"),
    [("int4", 7, 0.0), ("int4", 7, 0.5), ("int3", 3, 0.0), ("int3", 3, 0.5)],
)
def test_scales_lose_less_than_those_that_cut_nothing_off(
    values: Values, largest: int, sparsity: float
) -> None:
    weight = sparse_weight(64, 512, sparsity)
    peaks = np.abs(weight.reshape(64, -1, 32)).max(axis=2) / largest
    scales = ((peaks.view(np.int32) + 0x7FFFF) >> 19 << 19).view(np.float32)
    step = scales.repeat(32, axis=1)
    whole = np.sum((np.rint(weight / step) * step - weight) ** 2)
    found = np.sum((pack.unpack(pack.pack(weight, values, sparsity > 0)) - weight) ** 2)
    assert found < 0.8 * whole


def test_bf16_keeps_infinities_and_nan() -> None:
    weight = np.array([[np.inf, -np.inf, np.nan, 1e-45, -0.0, 3.0]], dtype=np.float32)
    back = pack.unpack(pack.pack(weight, "bf16"))
    np.testing.assert_array_equal(back, [[np.inf, -np.inf, np.nan, 0, 0, 3]])


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    bits = np.array([0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F818000], dtype=np.uint32)
    smallest = np.float32(2.0**-126)
    weight = np.concatenate((bits.view(np.float32), [smallest, -smallest, smallest / 2]))[None]
    back = pack.unpack(pack.pack(weight, "bf16")).view(np.uint32)[0] >> 16
    assert back.tolist() == [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x0080, 0x8080, 0]


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_only_int8_has_an_exponent(name: Values) -> None:
    assert pack.inspect(pack.pack(np.full((2, 2), 1e30, np.float32), name)).scale_exponent == 0


def test_rows_of_zeros_have_no_scale() -> None:
    weight = np.zeros((2, 32), dtype=np.float32)
    weight[0, 0] = 1.0
    block = pack.pack(weight, "int8")
    info = pack.inspect(block)
    scales = block[info.scale_offset :][: info.scale_bytes]
    assert scales[0] > 0
    assert not scales[1:].any()
    assert not pack.unpack(block)[1].any()
