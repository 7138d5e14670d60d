"""Time the kernels alone: products from memory, against the read bandwidth of the same run.

python benchmarks/kernel_speed.py [--quick] [--rows 1 2 4 8 16] [--plot FILE.svg] [-o RESULT.json]

For each matrix size, copies of the matrix that fill 192 MB are multiplied, so that the weights
come from memory; they lie in huge pages, where the operators put them too. Every round reads memory
plainly, on as many threads, and then multiplies: `share_of_bandwidth` is the median over rounds of
the weights' speed over that read's, and `over_dense` that of the time over the dense weight's of
the same type. `--rows`: rows of activations that meet the weights at once, by the way of a few rows
or, with `--many`, by that of a prompt; `over_one_row` is the median of the time over one row's.
Where other work takes the processor away, take many short passes (`--megabytes 64`:
more than its caches) and their best. `--plot` draws time against sparsity on the first instruction
set.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from owl_deploy.bench.machine import look
from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.native import Library
from owl_deploy.runtime.timing import copies, huge_memory, time_matmul
from owl_deploy.utils.picture import plain_log_scale, svg

# (outputs, inputs) of the blocks' linear layers.
SIZES: dict[str, list[tuple[int, int]]] = {
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
    "Llama-3.2-1B": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
    "Llama-2-7B": [(4096, 4096), (11008, 4096), (4096, 11008)],
    "cache": [(512, 256)],  # with --megabytes 1: what the instructions take
}
VALUES = ("int8", "int4", "int3", "bf16", "fp32")
SPARSITIES = (None, 0.0, 0.5, 0.6, 0.7, 0.8, 0.9)  # None: stored dense, without a mask


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--isa", nargs="+", default=None, help="default: the best three that run here"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only 70 %% and dense, first instruction set"
    )
    parser.add_argument("--megabytes", type=int, default=192, help="of each shape's copies")
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--sparsities", nargs="+", type=float, help="besides dense")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="at once; 1 comes along")
    parser.add_argument("--many", action="store_true", help="two rows and more as a prompt")
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES)[:3])
    parser.add_argument("--plot", type=Path, help="draw time against sparsity into this SVG file")
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    library = Library(library_path())
    isas = arguments.isa or library.isas()[: 1 if arguments.quick else 3]
    sparsities = (None, 0.7) if arguments.quick else SPARSITIES
    sparsities = (None, *arguments.sparsities) if arguments.sparsities else sparsities
    some = {"fp32": (None, 0.7)}
    variants = [
        (v, s) for v in arguments.values for s in sparsities if s in some.get(v, sparsities)
    ]
    setting = Setting(
        *(arguments.megabytes << 20, arguments.threads, arguments.rounds),
        *(sorted({1, *arguments.rows}), arguments.many),
    )
    rows: list[dict[str, object]] = []
    for model in arguments.models:
        rows += measure(library, model, isas, variants, setting)
    result = {
        "command": " ".join(sys.argv),
        "machine": look(0.1).cpu,
        "threads": arguments.threads,
        "rows": rows,
    }
    if arguments.plot:
        plot(rows, arguments.plot)
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


@dataclass(frozen=True)
class Setting:
    """`size` in bytes of each shape's copies; `rows` at once, as those of a prompt if `many`."""

    size: int
    threads: int
    rounds: int
    rows: list[int]
    many: bool


def measure(
    library: Library,
    model: str,
    isas: list[str],
    variants: list[tuple[str, float | None]],
    setting: Setting,
) -> list[dict[str, object]]:
    """All instruction sets, and value types with sparsities, for one model's shapes.

    Every round times each of them once, so that a neighbour's busy minute falls on all alike.
    """
    blocks = {variant: [packed(shape, *variant) for shape in SIZES[model]] for variant in variants}
    memory = huge_memory(setting.size)
    memory[:] = 1
    rows = [
        Row(model, isa, *variant, at_once)
        for isa in isas
        for variant in variants
        for at_once in setting.rows
    ]
    for _ in range(setting.rounds):
        for variant in variants:
            own = [row for row in rows if (row.values, row.sparsity) == variant]
            reads = [min(time_read(library, memory, setting.threads, 3)) / memory.size for _ in own]
            for row, read in zip(own, reads, strict=True):
                row.reads.append(read)
                row.seconds.append(0.0)
            for shape, block in enumerate(blocks[variant]):
                spread = copies(block, setting.size)
                for row in own:
                    # One matrix of each shape.
                    many = setting.many and row.rows > 1
                    passes = time_matmul(
                        library, row.isa, spread, row.rows, many=many, threads=setting.threads
                    )
                    row.seconds[-1] += statistics.median(passes) / len(spread)
                    fastest = row.fastest.get(shape, math.inf)
                    row.fastest[shape] = min(fastest, *(p / len(spread) for p in passes))
    elements = sum(rows * cols for rows, cols in SIZES[model])
    by_kind = {(row.isa, row.values, row.sparsity, row.rows): row for row in rows}
    found = [
        row.summary(
            sum(b.size for b in blocks[row.values, row.sparsity]),
            elements,
            by_kind[row.isa, row.values, None, row.rows],
            by_kind[row.isa, row.values, row.sparsity, 1],
        )
        for row in rows
    ]
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
    rows: int
    seconds: list[float] = field(default_factory=list)
    reads: list[float] = field(default_factory=list)
    fastest: dict[int, float] = field(default_factory=dict)  # of each shape

    def summary(self, size: int, elements: int, dense: "Row", single: "Row") -> dict[str, object]:
        """Medians, the best, how they compare with the read, `dense`, and a `single` row.

        `size` in bytes of all `elements` weights.
        """
        best = sum(self.fastest.values())
        shares = [size * read / s for read, s in zip(self.reads, self.seconds, strict=True)]
        return {
            "model": self.model,
            "isa": self.isa,
            "values": self.values,
            "sparsity": self.sparsity,
            "rows": self.rows,
            "microseconds": round(statistics.median(self.seconds) * 1e6, 1),
            "best_microseconds": round(best * 1e6, 1),
            "megabytes": round(size / 1e6, 2),
            "gigabytes_per_second": round(size / statistics.median(self.seconds) / 1e9, 1),
            "read_bandwidth": round(1e-9 / statistics.median(self.reads), 1),
            "best_read_bandwidth": round(1e-9 / min(self.reads), 1),
            "bits_a_weight": round(8 * size / elements, 2),
            "picoseconds_a_weight": round(statistics.median(self.seconds) / elements * 1e12, 2),
            "over_dense": round(self.over(dense), 3),
            "over_one_row": round(self.over(single), 3),
            "share_of_bandwidth": round(statistics.median(shares), 2),
            "best_picoseconds": round(best / elements * 1e12, 2),
            "best_over_best": round(size * min(self.reads) / best, 2),
        }

    def over(self, other: "Row") -> float:
        """Median over the rounds of the time over another's."""
        return statistics.median(
            own / its for own, its in zip(self.seconds, other.seconds, strict=True)
        )


def plot(rows: list[dict[str, object]], file: Path) -> None:
    """Time against sparsity for each model: sparse and dense of each type, the memory bound."""
    isa = rows[0]["isa"]
    rows = [row for row in rows if row["rows"] == 1]
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    colours = dict(
        zip(VALUES, ("tab:blue", "tab:green", "tab:red", "tab:orange", "tab:gray"), strict=True)
    )

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


def time_read(
    library: Library, memory: NDArray[np.uint8], threads: int, rounds: int
) -> list[float]:
    """Seconds of each plain read of `memory`."""
    seconds = np.zeros(rounds)
    aligned = memory[-memory.ctypes.data % 64 :]
    library.call("owl_time_read", aligned, memory.size - 64, threads, rounds, seconds)
    return list(seconds)


if __name__ == "__main__":
    main()
