"""What each method loses of a Linear's outputs on text that it has not seen, Linear by Linear.

    python benchmarks/solver_error.py [--block 0 --block 9 ...] [--sparsity 0.5] -o FILE

Prunes the Linears of the demo's model, each by itself, by the dense model's own inputs on the
calibration text, and measures on its evaluation text, which holds other articles:
||X (V - W)^T||^2 / ||X W^T||^2 for a weight W that became V. FILE holds a row a Linear.
"""

import argparse
import math
import pkgutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from owl_deploy.bench.machine import look
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.methods import METHODS
from owl_deploy.compression.pruning.refit import refit
from owl_deploy.compression.settings import parse_structure
from owl_deploy.data.text import calibration_windows
from owl_deploy.data.tokens import load_tokens
from owl_deploy.demo_input import CALIBRATION, EVALUATION, MODEL, demo_input
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.utils.artefact import write_json

SAMPLES, LENGTH = 32, 512  # as for the perplexities in docs/benchmarks/pruning.md
COMPARED = ("sparsegpt", "alps", "wanda", "wanda --refit", "sparsegpt --refit")


def statistics(
    skeleton: Skeleton, blocks: set[int], scratch: Path
) -> Iterator[tuple[int, InputStatistics, InputStatistics]]:
    """Of each of `blocks`, what enters its Linears: of the calibration, and of the other text."""
    states = []
    for name in (CALIBRATION, EVALUATION):
        tokens = load_tokens(skeleton.checkpoint.folder, [str(demo_input() / name)])
        windows = calibration_windows(tokens, SAMPLES, LENGTH, 0)
        states.append(skeleton.embed(windows, 4, scratch))
    for index in range(max(blocks) + 1):
        with skeleton.loaded(skeleton.names[index]) as block:
            seen = []
            for state in states:
                watched = skeleton.linears(index) if index in blocks else {}
                one = InputStatistics(watched, SAMPLES, hessian=True)
                with one.gathering():
                    state.through(block, index, lambda _: None, keep=True)
                seen.append(one)
            if index in blocks:
                yield index, seen[0], seen[1]


def pruned(way: str, weight: torch.Tensor, inputs: Inputs, given: argparse.Namespace) -> Any:  # noqa: ANN401
    """The weight [out, in] pruned by one of `COMPARED`."""
    method, _, after = way.partition(" --")
    row = METHODS[method]
    group = parse_structure(given.structure)
    found = pkgutil.resolve_name(row.prune)(weight, inputs, given.sparsity, group, row.options())
    return refit(weight, found, inputs) if after else found


def errors(
    weight: torch.Tensor, inputs: Inputs, other: Inputs, given: argparse.Namespace
) -> dict[str, float]:
    """The relative error of each way on the other text."""
    hessian = other.of_hessian(torch.clone)

    def energy(change: torch.Tensor) -> float:
        return float(((change @ hessian) * change).sum(dtype=torch.float64))

    whole = energy(weight)
    return {way: energy(pruned(way, weight, inputs, given) - weight) / whole for way in COMPARED}


def main() -> None:
    """Measure, write, and print a line a way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, action="append", help="repeat. [all]")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--structure", default="unstructured")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    skeleton = Skeleton(open_checkpoint(demo_input() / MODEL), torch.float32, torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        blocks = set(given.block or range(len(skeleton.names)))
        for index, seen, other in statistics(skeleton, blocks, Path(scratch)):
            weights = skeleton.checkpoint.read_module(skeleton.names[index])
            for name in skeleton.linears(index):
                weight = weights[f"{name}.weight"].float()
                found = errors(weight, Inputs(seen, name), Inputs(other, name), given)
                rows.append({"block": index, "linear": name, "errors": found})
    asked = {"sparsity": given.sparsity, "structure": given.structure}
    write_json(given.output, {"cpu": look().cpu, **asked, "rows": rows})
    for way in COMPARED[1:]:
        ratios = [one["errors"][way] / one["errors"]["sparsegpt"] for one in rows]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        under = sum(ratio < 1 for ratio in ratios)
        print(f"{way}: {mean:.2f} of SparseGPT's error, under it on {under} of {len(ratios)}")


if __name__ == "__main__":
    main()
