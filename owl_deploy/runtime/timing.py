"""How long the kernels take over a packed weight that comes from memory."""

import math
import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from owl_deploy.runtime import pack
from owl_deploy.runtime.native import Library
from owl_deploy.runtime.value_types import Values

_FILL = 192 << 20  # bytes of copies: more than caches hold
_COPIES = 4096  # at most: of the smallest weights, which no cache is too small for
_WEIGHTS = 1 << 22  # of a matrix that is timed; of a larger one, so many in whole rows
_PRIVATE = (
    {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
)


def from_memory(
    library: Library,
    shape: tuple[int, int],
    values: Values,
    sparsity: float | None,
    *,
    scale_columns: int,
    threads: int,
) -> float:
    """Seconds of a product with one row of activations, of a random weight [out, in].

    `sparsity`: the share of zeros of a weight that is packed sparse, None for a dense one. The best
    of three passes over copies that fill more than the caches, as it lies in a session's memory. A
    larger matrix is taken to take as much longer as it has rows more.
    """
    rows, cols = shape
    taken = min(rows, math.ceil(_WEIGHTS / cols))
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((taken, cols), dtype=np.float32)
    if sparsity is not None:
        weight[rng.random(weight.shape, dtype=np.float32) < sparsity] = 0
    isa = library.best_isa()
    block = pack.pack(weight, values, sparsity is not None, scale_columns=scale_columns)
    if lies_dense(library, isa, block):
        block = pack.pack(weight, "int4", sparse=False, scale_columns=scale_columns)
    blocks = copies(block, min(_FILL, _COPIES * block.size))
    passes = time_matmul(library, isa, blocks, 1, many=False, threads=threads)
    return min(passes) / len(blocks) * rows / taken


def lies_dense(library: Library, isa: str, block: NDArray[np.uint8]) -> bool:
    """Whether a session on this machine lays the packed weight `block` dense in memory."""
    found = np.zeros(1, dtype=np.int32)
    library.call("owl_lies_dense", isa.encode(), block, block.size, found)
    return bool(found[0])


def copies(block: NDArray[np.uint8], size: int) -> list[NDArray[np.uint8]]:
    """Copies of a packed weight that fill `size` bytes, as the operators hold them in memory."""
    count = max(1, size // block.size)
    memory = huge_memory(count * block.size).reshape(count, block.size)
    memory[:] = block
    return list(memory)


def huge_memory(size_bytes: int) -> NDArray[np.uint8]:
    """Memory in huge pages, where the system gives them."""
    # Private, as the operators' is: for shared memory another setting decides, most often "never".
    pages = mmap.mmap(-1, size_bytes, **_PRIVATE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # advice, which a kernel built without huge pages refuses
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def time_matmul(
    library: Library,
    isa: str,
    blocks: list[NDArray[np.uint8]],
    rows: int,
    *,
    many: bool,
    threads: int,
) -> list[float]:
    """Seconds of passes over all `blocks`, all but the first."""
    seconds = np.zeros(4)
    addresses = np.array([block.ctypes.data for block in blocks], dtype=np.uintp)
    lengths = np.array([block.size for block in blocks], dtype=np.uintp)
    places = (addresses, lengths, len(blocks))
    how = (rows, many, threads, len(seconds))
    library.call("owl_time_matmul", isa.encode(), *places, *how, seconds)
    return list(seconds[1:])
