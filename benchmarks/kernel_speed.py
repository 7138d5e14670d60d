"""Time the kernels alone: products from memory, against the read bandwidth of the same run.

python benchmarks/kernel_speed.py [--quick] [--plot FILE.svg] [-o RESULT.json]

For each matrix size, copies of the matrix that fill 192 MB are multiplied, so that the weights
come from memory; they lie in huge pages, where the operators put them too. Every round reads memory
plainly, on as many threads, and then multiplies: `share_of_bandwidth` is the median over rounds of
the weights' speed over that read's. `--plot` draws time against sparsity on the first instruction
set.
"""

import argparse
import json
import mmap
import platform
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.picture import plain_log_scale, svg
from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.native import Library

# (outputs, inputs) of the blocks' linear layers.
SIZES: dict[str, list[tuple[int, int]]] = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
}
SPARSITIES = (None, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9)  # None: stored dense, without a mask
BYTES = 192 << 20


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", nargs="+", default=None, help="default: every one that runs here")
    parser.add_argument(
        "--quick", action="store_true", help="only 70 %% and dense, first instruction set"
    )
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--plot", type=Path, help="draw time against sparsity into this SVG file")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    library = Library(library_path())
    isas = arguments.isa or library.isas()[: 1 if arguments.quick else 3]
    sparsities = (None, 0.7) if arguments.quick else SPARSITIES
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        rows += measure(library, model, isas, sparsities, arguments.threads, arguments.rounds)
    result = {
        "command": " ".join(sys.argv),
        "machine": machine(),
        "threads": arguments.threads,
        "rows": rows,
    }
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


def measure(
    library: Library,
    model: str,
    isas: list[str],
    sparsities: tuple[float | None, ...],
    threads: int,
    rounds: int,
) -> list[dict[str, object]]:
    """All instruction sets, value types and sparsities for one model's shapes.

    Every round times each of them once, so that a neighbour's busy minute falls on all alike.
    """
    variants = [
        (v, s)
        for v in ("int8", "bf16", "fp32")
        for s in sparsities
        if v != "fp32" or s in (None, 0.7)
    ]
    blocks = {variant: [packed(shape, *variant) for shape in SIZES[model]] for variant in variants}
    memory = huge_memory(256 << 20)
    memory[:] = 1
    rows = [Row(model, isa, *variant) for isa in isas for variant in variants]
    for _ in range(rounds):
        for variant in variants:
            own = [row for row in rows if (row.values, row.sparsity) == variant]
            reads = [min(time_read(library, memory, threads, 2)) / memory.size for _ in own]
            for row, read in zip(own, reads, strict=True):
                row.reads.append(read)
                row.seconds.append(0.0)
            for block in blocks[variant]:
                spread = copies(block)
                for row in own:
                    # One matrix of each shape.
                    seconds = time_matvec(library, row.isa, spread, threads)
                    row.seconds[-1] += seconds / len(spread)
    found = [row.summary(sum(b.size for b in blocks[row.values, row.sparsity])) for row in rows]
    for one in found:
        print(json.dumps(one), flush=True)
    return found


@dataclass
class Row:
    """One kernel: seconds a pass over one matrix of each shape, and seconds a byte of a read."""

    model: str
    isa: str
    values: str
    sparsity: float | None
    seconds: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)

    def summary(self, size: int) -> dict[str, object]:
        """Medians, the best, and how they compare with the read; `size`: bytes of the weights."""
        shares = [size * read / s for read, s in zip(self.reads, self.seconds, strict=True)]
        return {
            "model": self.model,
            "isa": self.isa,
            "values": self.values,
            "sparsity": self.sparsity,
            "microseconds": round(statistics.median(self.seconds) * 1e6, 1),
            "best_microseconds": round(min(self.seconds) * 1e6, 1),
            "megabytes": round(size / 1e6, 2),
            "gigabytes_per_second": round(size / statistics.median(self.seconds) / 1e9, 1),
            "read_bandwidth": round(1e-9 / statistics.median(self.reads), 1),
            "best_read_bandwidth": round(1e-9 / min(self.reads), 1),
            "share_of_bandwidth": round(statistics.median(shares), 2),
            "best_over_best": round(size * min(self.reads) / min(self.seconds), 2),
        }


def plot(rows: list[dict[str, object]], file: Path) -> None:
    """Time against sparsity for each model: sparse int8 and bf16, dense ones, the memory bound."""
    isa = rows[0]["isa"]
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    colours = {"int8": "tab:blue", "bf16": "tab:orange", "fp32": "tab:gray"}

    def draw(every: Any) -> None:  # noqa: ANN401
        for axis, model in zip(every[0], models, strict=True):
            for values, colour in colours.items():
                key = (model, isa, values)
                own = [r for r in rows if (r["model"], r["isa"], r["values"]) == key]
                dense = [r for r in own if r["sparsity"] is None]
                sparse = [r for r in own if r["sparsity"] is not None]
                x = [100 * float(str(r["sparsity"])) for r in sparse]
                axis.plot(x, [r["microseconds"] for r in sparse], "o-", color=colour, label=values)
                bound = [1e3 * r["megabytes"] / r["read_bandwidth"] for r in sparse]  # type: ignore[operator]
                axis.plot(x, bound, ":", color=colour, label=f"{values} memory bound")
                for row in dense:
                    y, label = row["microseconds"], f"{values} dense"
                    axis.axhline(y, color=colour, ls="--", label=label)
            axis.set(title=f"{model}, {isa}", xlabel="sparsity, %", ylabel="one block, us")
            plain_log_scale(axis)
        every[0][0].legend(fontsize=6)

    file.write_text(svg(draw, (4.5 * len(models), 3.6), (1, len(models))))


def packed(shape: tuple[int, int], values: str, sparsity: float | None) -> NDArray[np.uint8]:
    """A random packed weight."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(shape, dtype=np.float32)
    if sparsity:
        weight[rng.random(shape, dtype=np.float32) < sparsity] = 0
    return pack.pack(weight, values, sparsity is not None)  # type: ignore[arg-type]


def copies(block: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Copies of a packed weight that fill `BYTES`, as the operators hold them in memory."""
    count = max(1, BYTES // block.size)
    memory = huge_memory(count * block.size).reshape(count, block.size)
    memory[:] = block
    return list(memory)


def huge_memory(size_bytes: int) -> NDArray[np.uint8]:
    """Memory in huge pages, where the system gives them."""
    pages = mmap.mmap(-1, size_bytes)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, dtype=np.uint8)


def time_matvec(library: Library, isa: str, blocks: list[NDArray[np.uint8]], threads: int) -> float:
    """Seconds of a pass over all `blocks`, the second of two."""
    seconds = np.zeros(2)
    addresses = np.array([block.ctypes.data for block in blocks], dtype=np.uintp)
    lengths = np.array([block.size for block in blocks], dtype=np.uintp)
    places = (addresses, lengths, len(blocks))
    library.call("owl_time_matvec", isa.encode(), *places, threads, len(seconds), seconds)
    return float(seconds[-1])


def time_read(
    library: Library, memory: NDArray[np.uint8], threads: int, rounds: int
) -> list[float]:
    """Seconds of each plain read of `memory`."""
    seconds = np.zeros(rounds)
    aligned = memory[-memory.ctypes.data % 64 :]
    library.call("owl_time_read", aligned, memory.size - 64, threads, rounds, seconds)
    return list(seconds)


def machine() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
