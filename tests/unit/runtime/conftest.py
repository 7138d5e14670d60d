"""The kernels through their C interface: `owl_matmul` and its kin of the built library."""

import platform

import numpy as np
import pytest
from numpy.typing import NDArray

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.runtime import library_path
from owl_deploy.runtime.native import Library
from owl_deploy.runtime.value_types import TRAITS, Values

Floats = NDArray[np.float32]
FEW_THREADS = 4  # kFewThreads in dense.cpp
FEW_ROWS = 16  # kFewRows in kernels.h
EPILOGUES = {"none": 0, "silu_mul": 1, "gelu_mul": 2}

# Relative to the largest value of the row and block: half a step of each type; of int4, what the
# largest may lose so that the others lose less.
STEP = {"fp32": 0.0, "bf16": 2**-8, "int8": 17 / 16 * 1.001 / 254, "int4": 0.3, "int3": 0.6}
VALUES: tuple[Values, ...] = tuple(TRAITS)
INTEGERS = tuple(values for values, traits in TRAITS.items() if traits.levels)


def sparse_weight(rows: int, cols: int, sparsity: float, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, cols)).astype(np.float32)
    weight[rng.random((rows, cols)) < sparsity] = 0
    return weight


def on_grid(
    rows: int, cols: int, values: Values, shared: int, *, signs: bool = False
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A weight of random integers times scales of the byte's form, and the scales."""
    rng = np.random.default_rng(0)
    shape = (rows, -(-cols // shared))
    parts = 8 if signs else 16
    scales = np.ldexp(1 + rng.integers(0, parts, shape) / parts, rng.integers(-9, 5, shape))
    scales = scales.astype(np.float32)
    if signs:
        scales *= rng.choice(np.float32([-1, 1]), shape)
    least, largest = TRAITS[values].levels or (0, 0)
    integers = rng.integers(least, largest + 1, (rows, cols))
    integers[rng.random((rows, cols)) < 0.4] = 0
    return integers * scales.repeat(shared, axis=1)[:, :cols], scales


def owned(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that ends where its allocation ends, so that ASan sees a read one byte past it."""
    return np.array(block, copy=True)


class Kernels(Library):
    """The library, with numpy arrays in and out; a refusal of the library is a ValueError."""

    def check(self, block: NDArray[np.uint8]) -> None:
        """Validate a packed block."""
        copy = owned(block)
        self.call("owl_check_packed", copy, copy.size)

    def matmul(
        self,
        isa: str,
        block: NDArray[np.uint8],
        x: Floats,
        outputs: int,
        *,
        threads: int = 1,
        epilogue: str = "none",
        bias: Floats | None = None,
        skip: Floats | None = None,
        gamma: Floats | None = None,
        epsilon: float = 1e-5,
    ) -> tuple[Floats, Floats]:
        """x [rows, cols] -> (y [rows, outputs], x + skip [rows, cols])."""
        copy = owned(block)
        x = np.ascontiguousarray(x, dtype=np.float32)
        y = np.full((x.shape[0], outputs), np.nan, dtype=np.float32)
        total = np.zeros_like(x)
        rest = (bias, skip, gamma, epsilon, total if gamma is not None else None)
        code = EPILOGUES[epilogue]
        self.call(
            *("owl_matmul", isa.encode(), copy, copy.size, x, len(x), y, threads, code, *rest)
        )
        return y, total

    def gather(self, block: NDArray[np.uint8], row: int, cols: int) -> Floats:
        """One row of a dense weight."""
        copy, out = owned(block), np.empty(cols, dtype=np.float32)
        self.call("owl_gather", copy, copy.size, row, out)
        return out

    def attention(
        self,
        isa: str,
        qkv: Floats,
        keys: NDArray[np.generic],
        values: NDArray[np.generic],
        heads: int,
        past: int,
        tables: tuple[Floats, Floats] | None,
        *,
        softcap: float = 0.0,
        window: int = 0,
        threads: int = 1,
    ) -> Floats:
        """qkv [length, (heads + 2 kv) * size]; caches [kv, capacity, size] change."""
        kv_heads, capacity, size = keys.shape
        out = np.full((qkv.shape[0], heads * size), np.nan, dtype=np.float32)
        cosines, sines = tables if tables is not None else (None, None)
        sizes = (len(qkv), past, heads, kv_heads, size, capacity)
        memory = (keys.dtype == np.float16, keys, values, cosines, sines)
        how = (size**-0.5, softcap, window, threads)
        self.call("owl_attention", isa.encode(), qkv, *sizes, *memory, *how, out)
        return out


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest values of bf16, halfway the even one."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)


def in_bf16(rows: int, isa: str, passes: int = 2) -> bool:
    """Whether so many rows meet integers in AMX's tiles of bf16: more than these passes hold."""
    return isa == "amx" and rows > passes * FEW_ROWS


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The built library; the tests are skipped, with its own hint, where it was not built."""
    try:
        return Kernels(library_path())
    except EnvironmentFailed as error:
        pytest.skip(str(error))


ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ["neon"] if ARM else ["amx", "avx512", "avx512vnni", "avxvnni", "avx512f", "avx2"]


@pytest.fixture(params=[*ISAS, "portable"])
def isa(request: pytest.FixtureRequest, kernels: Kernels) -> str:
    """Each instruction set in turn, if it runs here."""
    name = str(request.param)
    if name not in kernels.isas():
        pytest.skip(f"{name} was not built or does not run on this processor")
    return name
