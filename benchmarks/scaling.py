"""What a pruning costs by its steps: measured on single blocks, and reckoned for large models.

    python benchmarks/scaling.py -o benchmarks/results/scaling.json
    python benchmarks/scaling.py --tables benchmarks/results/scaling.json

The first measures CPU seconds (what others do beside it does not count) of one thread: the forward
pass, the statistics, the solving and the writing of a random Llama block, and what two and three
processes take to talk. The second prints the tables of docs/scaling.md, which follow from these,
from published figures of a GPU and from the assumptions that stand below; nothing is run for them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_deploy.bench.machine import look
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.partition import owners
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.models.manifest import versions
from owl_deploy.utils.artefact import write_json
from owl_deploy.utils.ranks import join

WINDOW = 512  # tokens, of what is measured
MEASURED = ((512, 1), (512, 4), (1024, 1), (1024, 4), (2048, 1))  # widths and windows, 2048 last
TOKENS, LENGTH = 128 * 2048, 2048  # of what is reckoned: the papers' calibration text
PASSES = 3  # OWL's dense one, the statistics', and what the pruned block passes on
STORED = 2  # bytes a weight of a checkpoint, and of a hidden state on a GPU
Reckoned = dict[str, float]


@dataclass(frozen=True)
class Shape:
    """A model as far as pruning it costs; `kv`: the width of keys and values."""

    layers: int
    width: int
    inner: int
    kv: int
    gated: bool = True

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a block's Linears."""
        width, inner = self.width, self.inner
        attention = {"q": width, "k": self.kv, "v": self.kv, "o": width}
        feed = {"gate": inner, "up": inner} if self.gated else {"up": inner}
        return {n: (width, rows) for n, rows in (attention | feed).items()} | {
            "down": (inner, width)
        }

    @property
    def groups(self) -> list[list[str]]:
        """The Linears that share an input."""
        return [["q", "k", "v"], ["o"], ["gate", "up"] if self.gated else ["up"], ["down"]]

    @property
    def weights(self) -> int:
        """A block's."""
        return sum(inputs * rows for inputs, rows in self.linears.values())

    @property
    def squares(self) -> int:
        """Entries of all X^T X of a block."""
        return sum(self.linears[group[0]][0] ** 2 for group in self.groups)

    def forward(self, tokens: int, length: int) -> float:
        """FLOP of a block's forward pass: its products, and causal attention."""
        return 2.0 * tokens * (self.weights + length * self.width)

    def statistics(self, tokens: int) -> float:
        """FLOP of X^T X: half of each matrix is computed."""
        return float(tokens * self.squares)

    def solve(self, group: Sequence[str]) -> float:
        """FLOP of SparseGPT: a factor, its inverse, and what each column changes in later ones."""
        inputs = self.linears[group[0]][0]
        rows = sum(self.linears[name][1] for name in group)
        return 2 / 3 * inputs**3 + rows * inputs**2


@dataclass(frozen=True)
class Machine:
    """What one process computes with, in FLOP/s that it reaches, bytes/s and bytes.

    `forward`: products in the model's type; `single`: X^T X in float32; `solve`: factors and
    columns in float32; `column`: seconds that a column of the solver takes at least; `near`, `far`:
    bytes/s between processes of a node, of which there are `a_node`, and between nodes.
    """

    forward: float
    single: float
    solve: float
    column: float
    near: float
    far: float
    a_node: int
    disk: float
    itemsize: int


# Published, not measured here: NVIDIA's H100 SXM and A100 SXM datasheets (dense BF16 and FP32 peak;
# NVLink both ways together). Assumed: 40 % of the peak in forward passes, 60 % of FP32's, launches
# that hold each column of the solver up for 50 us, half of the links' rate, a disk of 2 GB/s.
_FORWARD, _SINGLE, _COLUMN, _DISK = 0.4, 0.6, 50e-6, 2e9


def gpu(bf16: float, fp32: float, link: float) -> Machine:
    """A GPU of these peaks, eight to a node, nodes joined by 400 Gbit/s a GPU."""
    return Machine(
        forward=_FORWARD * bf16,
        single=_SINGLE * fp32,
        solve=_SINGLE * fp32,
        column=_COLUMN,
        near=link / 4,
        far=50e9 / 2,
        a_node=8,
        disk=_DISK,
        itemsize=STORED,
    )


H100, A100 = gpu(989e12, 67e12, 900e9), gpu(312e12, 19.5e12, 600e9)
CORES, SHARE, ETHERNET = 64, 0.5, 25e9 / 8  # of a CPU node: assumed, as is what its cores lose
MODELS = {
    "7B": Shape(32, 4096, 11008, 4096),  # Llama 2
    "70B": Shape(80, 8192, 28672, 1024),  # Llama 3.1
    "405B": Shape(126, 16384, 53248, 1024),  # Llama 3.1
}
OPT_175B = Shape(96, 12288, 49152, 12288, gated=False)


def node(rates: Mapping[str, float]) -> Machine:
    """A node of `CORES` of the cores that were measured, with one process on it."""
    cores = CORES * SHARE
    return Machine(
        forward=cores * rates["forward"],
        single=cores * rates["statistics"],
        solve=cores * rates["solve"],
        column=0.0,
        near=ETHERNET,
        far=ETHERNET,
        a_node=1,
        disk=_DISK,
        itemsize=4,
    )


def reckon(
    shape: Shape,
    machine: Machine,
    ranks: int,
    *,
    tokens: int = TOKENS,
    length: int = LENGTH,
    passes: int = PASSES,
) -> Reckoned:
    """Seconds of each step of a pruning by SparseGPT; by Wanda all but `statistics` and `solve`.

    What Wanda does instead is too little to count.
    """
    stored = shape.weights * STORED
    talked = 0.0
    if ranks > 1:
        link = machine.near if ranks <= machine.a_node else machine.far
        talked = (4 * shape.squares + stored) / link
    a_block = {
        "read": (passes - 1) * stored / machine.disk,
        "forward": passes * shape.forward(tokens, length) / ranks / machine.forward,
        "statistics": shape.statistics(tokens) / ranks / machine.single,
        "solve": solve_seconds(shape, machine, ranks),
        "talk": talked,
        "write": stored / machine.disk,
    }
    return {step: shape.layers * value for step, value in a_block.items()}


def solve_seconds(shape: Shape, machine: Machine, ranks: int) -> float:
    """What the rank takes that has most to solve of a block, as they are divided."""
    with torch.device("meta"):
        linears = {name: nn.Linear(*sizes) for name, sizes in shape.linears.items()}
    owner = owners(shape.groups, linears, ranks, hessian=True)
    busy = [0.0] * ranks
    for group in shape.groups:
        steps = sum(shape.linears[name][0] for name in group)
        busy[owner[group[0]]] += shape.solve(group) / machine.solve + steps * machine.column
    return max(busy)


def memory(shape: Shape, machine: Machine, ranks: int, tokens: int = TOKENS) -> Reckoned:
    """Bytes of a process: a block, its X^T X, the largest factor with two copies; hidden states.

    The last may lie in the host's memory or on its disk.
    """
    largest = max(inputs for inputs, _ in shape.linears.values())
    return {
        "block": shape.weights * machine.itemsize,
        "statistics": 4 * shape.squares,
        "factor": 3 * 4 * largest**2,
        "hidden": tokens / ranks * shape.width * machine.itemsize,
    }


# --- the tables ----------------------------------------------------------------------------------


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


def _hours(seconds: float) -> str:
    return f"{seconds / 60:.2g} min" if seconds < 5400 else f"{seconds / 3600:.3g} h"


def measured_table(result: Mapping[str, Any]) -> str:
    """What was measured, a line a block and a number of tokens."""
    steps = ("forward", "statistics", "solve", "wanda", "write")
    rows = [
        [
            *(str(row["width"]), str(row["inner"]), str(row["tokens"])),
            *(f"{row['seconds'][step]:.3g}" for step in steps),
            *(f"{row['flop'][step] / row['seconds'][step] / 1e9:.0f}" for step in steps[:3]),
        ]
        for row in result["rows"]
    ]
    heads = ["width", "inner", "tokens", "forward", "X^T X", "SparseGPT", "Wanda", "write"]
    heads += [f"GFLOP/s: {step}" for step in ("forward", "X^T X", "SparseGPT")]
    return table(heads, rows)


def talk_table(result: Mapping[str, Any]) -> str:
    """CPU seconds that each process spends on talking, for a GB of statistics or of weights."""
    rows = []
    for one in result["talk"]:
        cells = (f"{one[way] / one['bytes'] * 1e9:.1f}" for way in ("reduce", "merge"))
        rows.append([str(one["ranks"]), *cells])
    return table(["processes", "add up a GB", "send a GB to all"], rows)


def plan_table(result: Mapping[str, Any]) -> str:
    """Time by SparseGPT and by Wanda, and memory, on GPUs and on CPU nodes."""
    places = [(f"H100 x {n}", H100, n) for n in (1, 8, 64)]
    places += [(f"CPU node x {n}", node(rates(result)), n) for n in (1, 8)]
    rows = []
    for name, shape in MODELS.items():
        for place, machine, ranks in places:
            steps = reckon(shape, machine, ranks)
            whole = sum(steps.values())
            wanda = whole - steps["statistics"] - steps["solve"]
            held = memory(shape, machine, ranks)
            hidden = held.pop("hidden")
            sizes = [f"{size / 1e9:.2g} GB" for size in (sum(held.values()), hidden)]
            rows.append([name, place, _hours(whole), _hours(wanda), *sizes])
    heads = ["model", "on", "SparseGPT", "Wanda", "a process holds", "its hidden states"]
    return table(heads, rows)


def steps_table() -> str:
    """Minutes of each step on H100s: where more of them stop helping."""
    rows = []
    for name, shape in MODELS.items():
        for ranks in (1, 8, 64):
            steps = reckon(shape, H100, ranks)
            rows.append([name, str(ranks), *(f"{value / 60:.1f}" for value in steps.values())])
    return table(["model", "H100s", *reckon(MODELS["7B"], H100, 1)], rows)


def tables(result: Mapping[str, Any]) -> list[str]:
    """All of docs/scaling.md."""
    return [measured_table(result), talk_table(result), plan_table(result), steps_table()]


def rates(result: Mapping[str, Any]) -> Reckoned:
    """FLOP/s of one core in each step, of the widest block that was measured."""
    row = result["rows"][-1]
    return {step: row["flop"][step] / row["seconds"][step] for step in row["flop"]}


# --- the measurement -----------------------------------------------------------------------------


def cpu_seconds(act: Callable[[], object], times: int = 2) -> float:
    """The least CPU time of `act`."""
    found = []
    for _ in range(times):
        begun = time.process_time()
        act()
        found.append(time.process_time() - begun)
    return min(found)


def write_block(folder: Path, shape: Shape) -> None:
    """A checkpoint of one random block, in bfloat16."""
    import transformers

    heads = shape.width // 64
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=WINDOW,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def measure_block(shape: Shape, windows: int) -> dict[str, Any]:
    """CPU seconds and FLOP of each step of a block, on so many windows of text."""
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        write_block(folder / "model", shape)
        skeleton = Skeleton(open_checkpoint(folder / "model"), torch.float32, torch.device("cpu"))
        (block,) = skeleton.names
        weights = skeleton.checkpoint.read_module(block)
        state = skeleton.embed(torch.randint(256, (windows, WINDOW)), 1, folder)
        linears = skeleton.linears(0)
        seconds: Reckoned = {}
        with skeleton.loaded(block, weights) as module:

            def forward() -> None:
                state.through(module, 0, lambda _: None, keep=True)

            def seen(hessian: bool) -> InputStatistics:
                statistics = InputStatistics(linears, windows, hessian=hessian)
                with statistics.gathering():
                    forward()
                return statistics

            seconds["forward"] = cpu_seconds(forward)
            seconds["statistics"] = cpu_seconds(lambda: seen(True)) - seconds["forward"]
            inputs = {method: seen(method == "sparsegpt") for method in ("sparsegpt", "wanda")}
        dense = {key: weights[f"{key}.weight"].float() for key in linears}
        for method, step in (("sparsegpt", "solve"), ("wanda", "wanda")):
            maker = Maker(PruneSettings.checked(method=method, sparsity=0.5))

            def solved(maker: Maker = maker, statistics: InputStatistics = inputs[method]) -> None:
                statistics._made.clear()  # the factors, which this process would keep
                for key, weight in dense.items():
                    maker.make(weight, Inputs(statistics, key), Format(None, 0.5))

            seconds[step] = cpu_seconds(solved)
        from safetensors.torch import save_file

        seconds["write"] = cpu_seconds(lambda: save_file(weights, folder / "block"))
    tokens = windows * WINDOW
    flop = {
        "forward": shape.forward(tokens, WINDOW),
        "statistics": shape.statistics(tokens),
        "solve": sum(map(shape.solve, shape.groups)),
    }
    about = {"width": shape.width, "inner": shape.inner, "tokens": tokens}
    return {**about, "seconds": seconds, "flop": flop}


def talk(width: int) -> dict[str, float] | None:
    """In a process of torchrun: CPU seconds of adding a matrix up, and of sending one to all."""
    ranks = join(versions())
    matrix = torch.ones(width, width)
    own = {str(ranks.rank): matrix[ranks.part(torch.arange(width))]}
    reduced = cpu_seconds(lambda: ranks.reduce(matrix.clone(), 0))
    merged = cpu_seconds(lambda: ranks.merged(own, matrix.device))
    every = ranks.gathered((reduced, merged))
    if not ranks.leads:
        return None
    most = [max(times) for times in zip(*every, strict=True)]
    return {"ranks": ranks.size, "bytes": matrix.nbytes, "reduce": most[0], "merge": most[1]}


def talking(width: int) -> Iterator[dict[str, float]]:
    """What two and three processes take."""
    for ranks in (2, 3):
        launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, "-m", *launcher, __file__, "--talk", str(width)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment)
        yield json.loads(done.stdout)


def main() -> None:
    """Measure and write, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="measure, and write this file")
    parser.add_argument("--tables", type=Path, help="print the tables of this file")
    parser.add_argument("--talk", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.talk:
        if found := talk(given.talk):
            print(json.dumps(found))
    elif given.tables:
        result = json.loads(given.tables.read_text(encoding="utf-8"))
        print("\n\n".join(tables(result)))
    elif given.output:
        blocks = {width: Shape(1, width, width * 11008 // 4096, width) for width, _ in MEASURED}
        rows = [measure_block(blocks[width], windows) for width, windows in MEASURED]
        whole = {"cpu": look().cpu, "rows": rows, "talk": list(talking(4096))}
        write_json(given.output, whole)


if __name__ == "__main__":
    main()
