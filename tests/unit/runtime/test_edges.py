"""Where kernels go wrong: tails, large shapes, every batch and sparsity, threads, infinities."""

import os
import subprocess
import sys

import numpy as np
import pytest

from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.value_types import TRAITS, Values

from .conftest import INTEGERS, VALUES, Kernels, sparse_weight
from .test_kernels import PASS_ROWS, TOLERANCE, activations, error

# Around every width that some kernel has: lanes, cells, blocks of 32, planes of 128 columns, tiles.
WIDTHS = (*range(1, 21), 31, 32, 33, 63, 64, 65, 66, 127, 128, 129, 191, 193, 255, 256, 257, 259)


def check(kernels: Kernels, isa: str, block: pack.Block, rows: int, threads: int = 1) -> None:
    info = pack.inspect(block)
    x = activations(rows, info.cols)
    y, _ = kernels.matmul(isa, block, x, info.rows, threads=threads)
    assert error(y, x, block, isa) < TOLERANCE, (info.rows, info.cols, rows)


@pytest.mark.parametrize("values", VALUES)
def test_every_tail(kernels: Kernels, isa: str, values: Values) -> None:
    for number, cols in enumerate(WIDTHS):
        for outputs in (1 + number % 16, 17 + number % 64):
            block = pack.pack(sparse_weight(outputs, cols, 0.5, seed=cols), values)
            for rows in (1, 3, PASS_ROWS + 2):
                check(kernels, isa, block, rows)


@pytest.mark.parametrize("values", VALUES)
def test_every_sparsity(kernels: Kernels, isa: str, values: Values) -> None:
    for percent in range(0, 101, 5):
        block = pack.pack(sparse_weight(70, 203, percent / 100, seed=percent), values)
        for rows in (1, 18, PASS_ROWS + 1):
            check(kernels, isa, block, rows)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("sparse", [True, False])
def test_every_batch_near_a_tile(kernels: Kernels, isa: str, values: Values, sparse: bool) -> None:
    block = pack.pack(sparse_weight(90, 140, 0.7), values, sparse)
    for rows in (*range(1, 34), 63, 64, 65, 127, 128, 129, 200, 255, 256, 257, 300):
        check(kernels, isa, block, rows, threads=2)


@pytest.fixture(scope="module")
def large() -> dict[str, pack.Block]:
    return {values: pack.pack(sparse_weight(1031, 4099, 0.7), values) for values in VALUES}


@pytest.mark.parametrize("values", VALUES)
def test_a_large_odd_weight(
    kernels: Kernels, isa: str, values: Values, large: dict[str, pack.Block]
) -> None:
    for rows in (1, 19, PASS_ROWS + 17):
        check(kernels, isa, large[values], rows, threads=2)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("epilogue", ["none", "silu_mul", "gelu_mul"])
def test_no_thread_count_changes_a_bit_of_what_is_fused(
    kernels: Kernels, isa: str, values: Values, rows: int, epilogue: str
) -> None:
    outputs, cols = 320, 200
    block = pack.pack(sparse_weight(2 * outputs, cols, 0.6), values)
    width = 2 * outputs if epilogue == "none" else outputs
    x, skip = activations(rows, cols, 1), activations(rows, cols, 2)
    gamma, bias = activations(1, cols, 3)[0], activations(1, width, 4)[0]

    def run(threads: int) -> tuple[np.ndarray, np.ndarray]:
        return kernels.matmul(
            isa,
            block,
            x,
            width,
            threads=threads,
            epilogue=epilogue,
            bias=bias,
            skip=skip,
            gamma=gamma,
        )

    first = run(1)
    for threads in range(2, 9):
        for one, other in zip(first, run(threads), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("values", ["fp32", "bf16"])
def test_infinity_times_a_zero_that_is_not_stored_is_nan(
    kernels: Kernels, isa: str, values: Values, rows: int, bad: float
) -> None:
    """As in the dense product: what is left out of the file is still a zero."""
    weight = sparse_weight(50, 90, 0.7)
    block = pack.pack(weight, values)
    x = activations(rows, 90)
    x[-1, 41] = bad
    with np.errstate(invalid="ignore"):
        expected = x.astype(np.float64) @ pack.unpack(block).T.astype(np.float64)
    y, _ = kernels.matmul(isa, block, x, 50)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    np.testing.assert_array_equal(y[np.isinf(expected)], expected[np.isinf(expected)])
    assert np.isinf(expected).any() or np.isnan(bad)


@pytest.mark.parametrize("values", VALUES)
def test_the_largest_activations_do_not_overflow_on_the_way(
    kernels: Kernels, isa: str, values: Values
) -> None:
    block = pack.pack(np.eye(48, 64, dtype=np.float32), values)
    x = np.full((1, 64), 3e38, dtype=np.float32)
    y, _ = kernels.matmul(isa, block, x, 48)
    np.testing.assert_allclose(y, x[:, :48] * np.diagonal(pack.unpack(block)), rtol=0.01)


@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize("rows", [1, 6, 65])
def test_the_largest_products_add_up_exactly(
    kernels: Kernels, isa: str, values: Values, end: int, rows: int
) -> None:
    """Every weight at one end of the grid and every activation at one of theirs."""
    levels = TRAITS[values].levels
    assert levels is not None
    weight = np.full((16, 64), levels[end], dtype=np.float32)
    block = pack.pack(weight, values, False, scales=np.ones((16, 2), dtype=np.float32))
    x = np.full((rows, 64), 127, dtype=np.float32)
    x[:, 1::2] *= np.where(np.arange(rows) % 3 == 0, -1, 1)[:, None]
    x[::2] *= -1
    y, _ = kernels.matmul(isa, block, x, 16)
    np.testing.assert_array_equal(y, x @ weight.T)


CHOSEN = """
import sys
import numpy as np, onnxruntime
from owl_deploy.runtime import kernels, library_path
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(str(library_path()))
session = onnxruntime.InferenceSession(sys.argv[1], options)
x = np.load(sys.argv[2])
parts = [session.run(None, {"x": part})[0] for part in (x, x[:1])]
np.save(sys.argv[3], np.concatenate(parts))
print(kernels())
"""


def with_isa(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, since a process chooses its kernels once."""
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "OWL_ISA": isa, "OWL_RUNTIME_LIBRARY": str(library_path())},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("values", VALUES[1:])
def test_owl_isa_chooses_the_kernels_of_a_session(
    kernels: Kernels, isa: str, values: Values, tmp_path
) -> None:
    from .test_operators import model_of

    block = pack.pack(sparse_weight(50, 96, 0.7), values)
    (tmp_path / "m.onnx").write_bytes(model_of(block, 96).SerializeToString())
    x = activations(5, 96)
    np.save(tmp_path / "x.npy", x)
    files = (str(tmp_path / name) for name in ("m.onnx", "x.npy", "y.npy"))
    done = with_isa(isa.upper() if values == "int8" else isa, "-c", CHOSEN, *files)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
    expected = [kernels.matmul(isa, block, part, 50)[0] for part in (x, x[:1])]
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), np.concatenate(expected))


REGISTERED = """
import onnxruntime
from owl_deploy.runtime import library_path
onnxruntime.SessionOptions().register_custom_ops_library(str(library_path()))
"""
CALLED = """
import numpy as np
from owl_deploy.runtime import library_path, pack
from tests.unit.runtime.conftest import Kernels
block = pack.pack(np.ones((16, 4), np.float32), "fp32")
print(Kernels(library_path()).matmul("", block, np.ones((1, 4), np.float32), 16))
"""


@pytest.mark.parametrize("wanted", ["nonsense", "neon" if sys.platform != "darwin" else "avx2"])
@pytest.mark.parametrize("code", [REGISTERED, CALLED], ids=["session", "c"])
def test_an_owl_isa_that_cannot_run_is_refused(kernels: Kernels, wanted: str, code: str) -> None:
    """A benchmark would otherwise time other kernels than it says."""
    if wanted in kernels.isas():
        pytest.skip(f"{wanted} runs here")
    done = with_isa(wanted, "-c", code)
    sentence = f"OWL_ISA is '{wanted}', but the kernels that run here are: "
    assert done.returncode != 0
    assert sentence + ", ".join(kernels.isas()) in done.stderr


def test_owl_says_that_owl_isa_is_wrong(kernels: Kernels) -> None:
    done = with_isa("nonsense", "-m", "owl_deploy", "engines", "ls")
    assert done.returncode == 2
    assert "OWL_ISA is 'nonsense'" in done.stderr
    assert "Traceback" not in done.stderr
    assert with_isa(kernels.isas()[-1].upper(), "-m", "owl_deploy", "engines", "ls").returncode == 0
    assert with_isa("", "-m", "owl_deploy", "engines", "ls").returncode == 0  # as if it were unset


def test_what_is_next_to_nothing_is_nothing_in_one_row_and_in_two(
    kernels: Kernels, isa: str
) -> None:
    block = pack.pack(sparse_weight(16, 64, 0.5), "fp32")
    x, gamma = np.full((2, 64), 1e-41, dtype=np.float32), np.ones(64, dtype=np.float32)
    together, _ = kernels.matmul(isa, block, x, 16, gamma=gamma)
    alone, _ = kernels.matmul(isa, block, x[:1], 16, gamma=gamma)
    assert np.array_equal(alone[0], together[0])
