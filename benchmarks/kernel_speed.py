"""Time the kernels alone: products from memory, against the read bandwidth of the same run.

python benchmarks/kernel_speed.py [--quick] [-o benchmarks/results/kernel_speed.json]

For each matrix size, enough copies of the matrix are multiplied that the weights (130 MB and more)
cannot stay in any cache. Each figure is the median of its passes; `read_bandwidth` is the best that
a plain read of memory reached between them, on as many threads.
"""

import argparse
import ctypes
import json
import platform
import statistics
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.runtime import library_path, pack

# (outputs, inputs) of the blocks' linear layers.
SIZES: dict[str, list[tuple[int, int]]] = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
SPARSITIES = (None, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9)  # None: stored dense, without a mask
ELEMENTS = 300_000_000


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", nargs="+", default=None, help="default: every one that runs here")
    parser.add_argument(
        "--quick", action="store_true", help="only 70 %% and dense, first instruction set"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    library = ctypes.CDLL(str(library_path()))
    library.owl_isa_name.restype = ctypes.c_char_p
    isas = arguments.isa or supported(library)[: 1 if arguments.quick else 3]
    sparsities = (None, 0.7) if arguments.quick else SPARSITIES
    rows: list[dict[str, object]] = []
    for model, shapes in SIZES.items():
        for isa in isas:
            rows += measure(
                library, model, shapes, isa, sparsities, arguments.threads, arguments.rounds
            )
    result = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "threads": arguments.threads,
        "rows": rows,
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    library: ctypes.CDLL,
    model: str,
    shapes: list[tuple[int, int]],
    isa: str,
    sparsities: tuple[float | None, ...],
    threads: int,
    rounds: int,
) -> list[dict[str, object]]:
    """All value types and sparsities of one model's shapes, each warmed up and then timed."""
    variants = [
        (v, s)
        for v in ("int8", "bf16", "fp32")
        for s in sparsities
        if v != "fp32" or s in (None, 0.7)
    ]
    seconds: dict[tuple[str, float | None], list[float]] = {variant: [] for variant in variants}
    sizes: dict[tuple[str, float | None], int] = {}
    memory = np.ones(256 << 20, dtype=np.uint8)
    reads: list[float] = []
    for values, sparsity in variants:
        total = 0
        sums = np.zeros(rounds)
        for shape in shapes:
            blocks = copies(shape, values, sparsity, ELEMENTS // len(shapes))
            sums += time_matvec(library, isa, blocks, threads, rounds)
            total += sum(block.size for block in blocks)
        seconds[values, sparsity] = list(sums)
        sizes[values, sparsity] = total
        reads += time_read(library, memory, threads, 3)
    bandwidth = memory.size / min(reads) / 1e9
    rows: list[dict[str, object]] = []
    for (values, sparsity), times in seconds.items():
        median, size = statistics.median(times), sizes[values, sparsity]
        row: dict[str, object] = {
            "model": model,
            "isa": isa,
            "values": values,
            "sparsity": sparsity,
            "milliseconds": round(median * 1e3, 3),
            "best_milliseconds": round(min(times) * 1e3, 3),
            "megabytes": round(size / 1e6, 1),
            "gigabytes_per_second": round(size / median / 1e9, 1),
            "read_bandwidth": round(bandwidth, 1),
            "share_of_bandwidth": round(size / median / 1e9 / bandwidth, 2),
            "best_share_of_bandwidth": round(size / min(times) / 1e9 / bandwidth, 2),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def copies(
    shape: tuple[int, int], values: str, sparsity: float | None, elements: int
) -> list[NDArray[np.uint8]]:
    """Copies of a random packed weight, in memory of their own, with `elements` weights in all."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, dtype=np.float32)
    if sparsity:
        weight[rng.random(shape, dtype=np.float32) < sparsity] = 0
    block = pack.pack(weight, values, sparsity is not None)  # type: ignore[arg-type]
    return [aligned_copy(block) for _ in range(max(1, elements // weight.size))]


def aligned_copy(block: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """As a memory-mapped file gives it: on a page boundary."""
    storage = np.empty(block.size + 4096, dtype=np.uint8)
    start = -storage.ctypes.data % 4096
    storage[start : start + block.size] = block
    return storage[start : start + block.size]


def time_matvec(
    library: ctypes.CDLL, isa: str, blocks: list[NDArray[np.uint8]], threads: int, rounds: int
) -> NDArray[np.float64]:
    """Seconds of each of `rounds` passes over all `blocks`."""
    seconds = np.zeros(rounds + 1)
    addresses = (ctypes.c_void_p * len(blocks))(*(block.ctypes.data for block in blocks))
    lengths = (ctypes.c_size_t * len(blocks))(*(block.size for block in blocks))
    code = library.owl_time_matvec(
        isa.encode(),
        addresses,
        lengths,
        ctypes.c_size_t(len(blocks)),
        ctypes.c_size_t(threads),
        ctypes.c_size_t(rounds + 1),
        ctypes.c_void_p(seconds.ctypes.data),
    )
    if code:
        raise RuntimeError(f"{isa} does not run here")
    return seconds[1:]


def time_read(
    library: ctypes.CDLL, memory: NDArray[np.uint8], threads: int, rounds: int
) -> list[float]:
    """Seconds of each plain read of `memory`."""
    seconds = np.zeros(rounds)
    start = -memory.ctypes.data % 64
    library.owl_time_read(
        ctypes.c_void_p(memory.ctypes.data + start),
        ctypes.c_size_t(memory.size - 64),
        ctypes.c_size_t(threads),
        ctypes.c_size_t(rounds),
        ctypes.c_void_p(seconds.ctypes.data),
    )
    return list(seconds)


def supported(library: ctypes.CDLL) -> list[str]:
    """Instruction sets that run here, best first."""
    names = []
    for i in range(8):
        name = library.owl_isa_name(ctypes.c_size_t(i))
        if name is None:
            break
        if library.owl_isa_supported(name):
            names.append(name.decode())
    return names


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
