"""Every instruction set against a naive oracle in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import Values

from .conftest import FEW_ROWS, INTEGERS, VALUES, Kernels, in_bf16, on_grid, sparse_weight, to_bf16

PASS_ROWS = 48  # kPassRows in kernels.h
TOLERANCE = 2e-6  # of sum |x| |w|: fp32 sums, since the oracle rounds activations as the kernels do


def rounding_error(
    y: NDArray[np.float32], x: NDArray[np.float32], weight: NDArray[np.float32]
) -> float:
    """Largest error of y = x W^T as a share of sum |x| |w|."""
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(weight.T).astype(np.float64)
    return float(np.max(np.abs(y - exact) / np.maximum(scale, 1e-30)))


def as_kernels_see(
    x: NDArray[np.float32], values: Values, isa: str, passes: int = 2
) -> NDArray[np.float32]:
    """x as the kernels round it: int8 in blocks of 32, bf16 where there is a bf16 product."""
    if values in INTEGERS and in_bf16(len(x), isa, passes):
        return to_bf16(x)
    if values == "bf16" and isa in ("amx", "avx512"):
        return to_bf16(x)
    if values not in INTEGERS:
        return x
    padded = np.zeros((x.shape[0], -(-x.shape[1] // 32) * 32), dtype=np.float32)
    padded[:, : x.shape[1]] = x
    blocks = padded.reshape(x.shape[0], -1, 32)
    peak = np.abs(blocks).max(axis=2, keepdims=True)
    steps = np.rint(blocks * (np.float32(127) / np.maximum(peak, np.float32(1e-30))))
    return (steps * (peak / np.float32(127))).reshape(padded.shape)[:, : x.shape[1]]


def error(y: NDArray[np.float32], x: NDArray[np.float32], block: pack.Block, isa: str) -> float:
    """`rounding_error` of what the kernels see of x and of the weight."""
    info, weight = pack.inspect(block), pack.unpack(block)
    passes = 1 if info.planes else 2
    if info.values in INTEGERS and in_bf16(len(x), isa, passes):
        weight = to_bf16(weight)
    return rounding_error(y, as_kernels_see(x, info.values, isa, passes), weight)


def activations(rows: int, cols: int, seed: int = 7) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


@pytest.mark.parametrize(
    "shape", [(1, 1), (15, 3), (16, 64), (17, 65), (33, 127), (64, 576), (200, 1537)]
)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("sparse", [True, False])
def test_against_oracle(
    kernels: Kernels,
    isa: str,
    shape: tuple[int, int],
    values: Values,
    sparsity: float,
    sparse: bool,
) -> None:
    block = pack.pack(sparse_weight(*shape, sparsity), values, sparse)
    for rows in (1, 2, 7, 65):
        x = activations(rows, shape[1])
        y, _ = kernels.matmul(isa, block, x, shape[0], threads=2)
        assert error(y, x, block, isa) < TOLERANCE


SCREEN_MARGIN, SCREEN_SHARE = 12.0, 8  # kScreenMargin and kScreenShare in engine.h


def halves_of_planes(
    block: pack.Block, rows: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The weight by its upper bits alone, and whole."""
    whole = pack.unpack(block).astype(np.float64)
    high, low = (part[:rows].astype(np.float64) for part in pack.planes(block))
    steps = 16 * high + low
    return np.divide(whole, steps, out=np.zeros_like(whole), where=steps != 0) * 16 * high, whole


@pytest.mark.parametrize("shape", [(1, 1), (16, 32), (17, 65), (70, 127), (501, 160), (2085, 576)])
@pytest.mark.parametrize("spread", [0.1, 3.0, 100.0])
def test_one_row_times_planes_is_exact_near_the_largest(
    kernels: Kernels, isa: str, shape: tuple[int, int], spread: float
) -> None:
    """Outputs that the upper bits put within the margin get all 8 bits, the others only those."""
    block = pack.pack(sparse_weight(*shape, 0.0), "int8", sparse=False, planes=True)
    x = activations(1, shape[1])
    seen = as_kernels_see(x, "int8", isa)[0].astype(np.float64)
    rough_weight, whole = halves_of_planes(block, shape[0])
    factor = spread / np.abs(rough_weight @ seen).max() if shape[0] > 1 else 1.0
    bias = activations(1, shape[0], 3)[0]
    x, seen = (x * factor).astype(np.float32), seen * factor
    y, _ = kernels.matmul(isa, block, x, shape[0], threads=3, bias=bias)
    rough, exact = rough_weight @ seen + bias, whole @ seen + bias
    size = np.abs(whole) @ np.abs(seen) + np.abs(bias)
    least = rough.max() - SCREEN_MARGIN
    sample = np.sort(rough[::16][: shape[0] // 16])[::-1]
    if len(sample) >= 64 and (sample >= least).sum() > len(sample) // SCREEN_SHARE:
        least = sample[len(sample) // SCREEN_SHARE]
    near = rough >= least
    undecided = np.abs(rough - least) < 1e-4 * spread
    error = np.abs(y[0] - np.where(near, exact, rough)) / np.maximum(size, 1e-30)
    assert error[~undecided].max() < 4e-6
    assert near.all() == (spread < 5 and len(sample) < 64) or shape[0] < 20


def test_what_is_not_a_number_does_not_count_among_the_near(kernels: Kernels, isa: str) -> None:
    """Outputs are sampled to see which are near: a comparison with NaN would order nothing."""
    outputs = 2085
    block = pack.pack(sparse_weight(outputs, 160, 0.0), "int8", sparse=False, planes=True)
    x = activations(1, 160) * np.float32(0.02)
    seen = as_kernels_see(x, "int8", isa)[0].astype(np.float64)
    rough, whole = (weight @ seen for weight in halves_of_planes(block, outputs))
    bias = np.zeros(outputs, dtype=np.float32)
    # In the first group of some pairs, where the search for the largest passes over them.
    bias[:1600:32] = np.nan
    y = kernels.matmul(isa, block, x, outputs, bias=bias)[0][0]
    bad = np.isnan(bias)
    assert np.isnan(y[bad]).all()
    sample = np.sort(rough[::16][: outputs // 16][~bad[::16][: outputs // 16]])[::-1]
    least = sample[outputs // 16 // SCREEN_SHARE]
    near = rough >= least
    # Beside one of them an output may pass for one that is far.
    decided = ~bad[::16].repeat(16)[:outputs] & (np.abs(rough - least) > 1e-5)
    assert np.abs(rough - rough.max()).max() < SCREEN_MARGIN
    np.testing.assert_allclose(y[decided], np.where(near, whole, rough)[decided], atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (17, 65), (70, 127), (501, 160)])
@pytest.mark.parametrize("rows", [FEW_ROWS + 1, 66])
def test_many_rows_times_planes(
    kernels: Kernels, isa: str, shape: tuple[int, int], rows: int
) -> None:
    block = pack.pack(sparse_weight(*shape, 0.3), "int8", sparse=False, planes=True)
    x = activations(rows, shape[1])
    y, _ = kernels.matmul(isa, block, x, shape[0], threads=2)
    assert error(y, x, block, isa) < TOLERANCE


@pytest.mark.parametrize("bad", [np.inf, np.nan])
@pytest.mark.parametrize("rows", [1, 3])
def test_planes_pass_on_what_is_not_a_number(
    kernels: Kernels, isa: str, bad: float, rows: int
) -> None:
    block = pack.pack(sparse_weight(70, 96, 0.0), "int8", sparse=False, planes=True)
    x = activations(rows, 96)
    x[-1, 40] = bad
    y, _ = kernels.matmul(isa, block, x, 70)
    assert np.isnan(y[-1]).all()
    assert np.isfinite(y[:-1]).all()


@pytest.mark.parametrize(
    ("values", "storage"),
    [(v, s) for v in VALUES for s in ("sparse", "dense")] + [("int8", "planes")],
)
@pytest.mark.parametrize(("outputs", "cols"), [(16, 3), (50, 36), (35, 333), (2085, 100)])
def test_a_row_says_the_same_alone_and_in_company(
    kernels: Kernels, isa: str, values: Values, storage: str, outputs: int, cols: int
) -> None:
    """To the last bit among few rows; of integers, if their sums are exact, among many as well."""
    planes = storage == "planes"
    weight = sparse_weight(outputs, cols, 0.5)
    block = pack.pack(weight, values, storage == "sparse", planes=planes)
    exact = values in INTEGERS and not planes
    some = [*range(2, FEW_ROWS + 2)]
    if exact:
        more = (FEW_ROWS + 9, 2 * FEW_ROWS, 2 * FEW_ROWS + 1, PASS_ROWS, PASS_ROWS + 1)
        some += [rows for rows in more if not in_bf16(rows, isa)]
    x, skip = activations(some[-1], cols, 1), activations(some[-1], cols, 2)
    given = {"gamma": activations(1, cols, 3)[0], "bias": activations(1, outputs, 4)[0]}
    alone = [
        kernels.matmul(isa, block, x[m : m + 1], outputs, skip=skip[m : m + 1], **given)
        for m in range(len(x))
    ]
    single, single_sum = (np.concatenate(part) for part in zip(*alone, strict=True))
    for rows in some:
        y, total = kernels.matmul(
            isa, block, x[:rows], outputs, threads=3, skip=skip[:rows], **given
        )
        np.testing.assert_array_equal(total, single_sum[:rows])
        if rows <= FEW_ROWS or exact:
            np.testing.assert_array_equal(y, single[:rows])


@pytest.mark.parametrize(
    ("values", "rows"),
    [(v, r) for v in ("fp32", "int8") for r in (2, 5, FEW_ROWS)] + [("int8", PASS_ROWS)],
)
def test_a_gated_row_says_the_same_in_company(
    kernels: Kernels, isa: str, rows: int, values: Values
) -> None:
    if in_bf16(rows, isa):
        pytest.skip("many rows are taken in bf16, one in int8")
    parts = (sparse_weight(600, 72, 0.5, seed=seed) for seed in (3, 4))
    block = pack.pack(pack.interleave_gate_up(*parts), values)
    x = activations(rows, 72)
    y, _ = kernels.matmul(isa, block, x, 608, threads=2, epilogue="silu_mul")
    for m in range(rows):
        alone, _ = kernels.matmul(isa, block, x[m : m + 1], 608, epilogue="silu_mul")
        np.testing.assert_array_equal(y[m], alone[0])


@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("shared", [64, 128])
@pytest.mark.parametrize("cols", [32, 33, 96, 130, 700])
def test_scales_of_more_columns(
    kernels: Kernels, isa: str, values: Values, sparse: bool, shared: int, cols: int
) -> None:
    block = pack.pack(sparse_weight(50, cols, 0.5), values, sparse, scale_columns=shared)
    for rows in (1, 5, 20):
        x = activations(rows, cols)
        y, _ = kernels.matmul(isa, block, x, 50)
        assert error(y, x, block, isa) < TOLERANCE
    if not sparse:
        np.testing.assert_array_equal(kernels.gather(block, 17, cols), pack.unpack(block)[17])


@pytest.mark.parametrize("narrow", ["int4", "int3"])
@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_integers_of_one_grid_agree_to_the_last_bit(
    kernels: Kernels, isa: str, narrow: Values, sparse: bool, rows: int
) -> None:
    weight, scales = on_grid(70, 203, narrow, 32)
    x = activations(rows, 203)
    few, eight = (
        kernels.matmul(isa, pack.pack(weight, values, sparse, scales=scales), x, 70)[0]
        for values in (narrow, "int8")
    )
    np.testing.assert_array_equal(few, eight)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 129, 300])
def test_batches(kernels: Kernels, isa: str, values: Values, rows: int) -> None:
    block = pack.pack(sparse_weight(80, 300, 0.7), values)
    x = activations(rows, 300)
    y, _ = kernels.matmul(isa, block, x, 80, threads=3)
    assert error(y, x, block, isa) < TOLERANCE


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows", [1, 9, 150])
def test_thread_count_changes_no_bit(kernels: Kernels, isa: str, values: Values, rows: int) -> None:
    block = pack.pack(sparse_weight(700, 333, 0.6), values)
    x = activations(rows, 333)
    first, _ = kernels.matmul(isa, block, x, 700, threads=1)
    for threads in range(2, 9):
        again, _ = kernels.matmul(isa, block, x, 700, threads=threads)
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("values", VALUES)
def test_empty_and_full_rows(kernels: Kernels, isa: str, values: Values) -> None:
    weight = sparse_weight(50, 200, 0.7)
    weight[::3] = 0
    weight[1::3] = 1.5
    block = pack.pack(weight, values)
    x = activations(1, 200)
    y, _ = kernels.matmul(isa, block, x, 50)
    assert not y[0, ::3].any()
    assert error(y, x, block, isa) < TOLERANCE


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("rows", [1, 5, 20, PASS_ROWS + 3])
def test_infinity_and_nan_propagate(
    kernels: Kernels, isa: str, values: Values, bad: float, rows: int
) -> None:
    block = pack.pack(np.abs(sparse_weight(40, 100, 0.0)) + 0.1, values, sparse=False)
    x = np.ones((rows, 100), dtype=np.float32)
    x[rows - 1, 97] = bad
    y, _ = kernels.matmul(isa, block, x, 40)
    assert not np.isfinite(y[rows - 1]).any()
    assert np.isfinite(y[: rows - 1]).all()
    if values not in INTEGERS:  # integers have no infinity: their blocks become NaN
        np.testing.assert_array_equal(y[rows - 1], np.full(40, bad, dtype=np.float32))


def test_denormal_activations_are_harmless(kernels: Kernels, isa: str) -> None:
    block = pack.pack(sparse_weight(32, 64, 0.5), "fp32")
    y, _ = kernels.matmul(isa, block, np.full((1, 64), 1e-42, dtype=np.float32), 32)
    assert np.abs(y).max() < 1e-38


@pytest.mark.parametrize("epilogue", ["silu_mul", "gelu_mul"])
@pytest.mark.parametrize("outputs", [16, 20, 96])
@pytest.mark.parametrize("rows", [1, 9, 20])
@pytest.mark.parametrize("values", ["fp32", *INTEGERS])
def test_gated(
    kernels: Kernels, isa: str, epilogue: str, outputs: int, rows: int, values: Values
) -> None:
    gate, up = sparse_weight(outputs, 72, 0.5, seed=3), sparse_weight(outputs, 72, 0.5, seed=4)
    block = pack.pack(pack.interleave_gate_up(gate, up), values)
    weight = pack.unpack(block)
    if values in INTEGERS and in_bf16(rows, isa):
        weight = to_bf16(weight)
    both = weight.reshape(-1, 2, 16, 72).astype(np.float64)
    x = activations(rows, 72)
    # The operator's `columns` attribute cuts off the padding; here the whole width is asked for.
    y, _ = kernels.matmul(isa, block, x, both.shape[0] * 16, epilogue=epilogue)
    x = as_kernels_see(x, values, isa)
    g, u = x @ both[:, 0].reshape(-1, 72).T, x @ both[:, 1].reshape(-1, 72).T
    inner = g if epilogue == "silu_mul" else 2 * np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)
    expected = g * (1 + np.tanh(inner / 2)) / 2 * u  # the logistic function, without overflow
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("cols", [16, 63, 576])
@pytest.mark.parametrize("rows", [1, 6, 20])
def test_norm_residual_and_bias(kernels: Kernels, isa: str, cols: int, rows: int) -> None:
    block = pack.pack(sparse_weight(30, cols, 0.5), "fp32")
    x, skip = activations(rows, cols, 1), activations(rows, cols, 2)
    gamma, bias = activations(1, cols, 3)[0], activations(1, 30, 4)[0]
    y, total = kernels.matmul(isa, block, x, 30, bias=bias, skip=skip, gamma=gamma, epsilon=1e-6)
    both = x.astype(np.float64) + skip
    normed = both / np.sqrt((both**2).mean(axis=1, keepdims=True) + 1e-6) * gamma
    np.testing.assert_allclose(total, both, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        y, normed @ pack.unpack(block).T.astype(np.float64) + bias, atol=1e-4
    )


@pytest.mark.parametrize("values", [*VALUES, "planes"])
def test_gather(kernels: Kernels, values: str) -> None:
    planes = values == "planes"
    block = pack.pack(
        sparse_weight(50, 300, 0.0), "int8" if planes else values, sparse=False, planes=planes
    )
    rows = pack.unpack(block)
    for row in (0, 1, 15, 16, 49):
        np.testing.assert_array_equal(kernels.gather(block, row, 300), rows[row])
    with pytest.raises(ValueError, match="no such row"):
        kernels.gather(block, 50, 300)
