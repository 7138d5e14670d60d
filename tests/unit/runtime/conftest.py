"""The kernels through their C interface: `owl_matmul` and its kin of the built library."""

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.runtime import library_path

Floats = NDArray[np.float32]
EPILOGUES = {"none": 0, "silu_mul": 1, "gelu_mul": 2}


def owned(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A copy that ends where its allocation ends, so that ASan sees a read one byte past it."""
    return np.array(block, copy=True)


def _pointer(array: NDArray[np.generic] | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if array is None else array.ctypes.data)


@dataclass
class Kernels:
    """The library, with numpy arrays in and out; a refusal of the library is a ValueError."""

    library: ctypes.CDLL

    def isas(self) -> list[str]:
        """Instruction sets that were built in and that this processor runs."""
        names = []
        for i in range(8):
            name = self.library.owl_isa_name(ctypes.c_size_t(i))
            if name is None:
                break
            if self.library.owl_isa_supported(name):
                names.append(name.decode())
        return names

    def check(self, block: NDArray[np.uint8]) -> None:
        """Validate a packed block."""
        copy = owned(block)
        self._raise(self.library.owl_check_packed(_pointer(copy), ctypes.c_size_t(copy.size)))

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
        code = self.library.owl_matmul(
            isa.encode(),
            _pointer(copy),
            ctypes.c_size_t(copy.size),
            _pointer(x),
            ctypes.c_size_t(x.shape[0]),
            _pointer(y),
            ctypes.c_size_t(threads),
            ctypes.c_int(EPILOGUES[epilogue]),
            _pointer(bias),
            _pointer(skip),
            _pointer(gamma),
            ctypes.c_float(epsilon),
            _pointer(total if gamma is not None else None),
        )
        self._raise(code)
        return y, total

    def gather(self, block: NDArray[np.uint8], row: int, cols: int) -> Floats:
        """One row of a dense weight."""
        copy, out = owned(block), np.empty(cols, dtype=np.float32)
        self._raise(
            self.library.owl_gather(
                _pointer(copy), ctypes.c_size_t(copy.size), ctypes.c_size_t(row), _pointer(out)
            )
        )
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
        sizes = (qkv.shape[0], past, heads, kv_heads, size, capacity)
        code = self.library.owl_attention(
            isa.encode(),
            _pointer(qkv),
            *(ctypes.c_size_t(n) for n in sizes),
            ctypes.c_int(keys.dtype == np.float16),
            _pointer(keys),
            _pointer(values),
            _pointer(cosines),
            _pointer(sines),
            ctypes.c_float(size**-0.5),
            ctypes.c_float(softcap),
            ctypes.c_size_t(window),
            ctypes.c_size_t(threads),
            _pointer(out),
        )
        self._raise(code)
        return out

    def _raise(self, code: int) -> None:
        if code:
            raise ValueError(self.library.owl_last_error().decode())


def load(path: Path) -> Kernels:
    """Open the library and declare what its functions return."""
    library = ctypes.CDLL(str(path))
    for name in ("owl_last_error", "owl_isa_name"):
        getattr(library, name).restype = ctypes.c_char_p
    return Kernels(library)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The built library; the tests are skipped, with its own hint, where it was not built."""
    try:
        return load(library_path())
    except EnvironmentFailed as error:
        pytest.skip(str(error))


ARM = platform.machine() in ("aarch64", "arm64")
ISAS = ["neon"] if ARM else ["avx512", "avx512vnni", "avxvnni", "avx512f", "avx2"]


@pytest.fixture(params=[*ISAS, "portable"])
def isa(request: pytest.FixtureRequest, kernels: Kernels) -> str:
    """Each instruction set in turn, if it runs here."""
    name = str(request.param)
    if name not in kernels.isas():
        pytest.skip(f"{name} was not built or does not run on this processor")
    return name
