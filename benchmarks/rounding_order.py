"""What a rounded Linear loses on other text, by the order in which its columns are rounded.

    python benchmarks/rounding_order.py MODEL calibration.txt evaluation.txt --blocks 4 12 -o FILE

Rounds the Linears of some blocks, each by itself, by the dense model's own inputs: their columns in
the order in which they lie, and as `owl prune` takes them, those with the largest inputs first.
FILE holds a row for a Linear and a number of bits: ||X (V - W)^T||^2 / ||X W^T||^2 on the other
text for a weight W that became V, in either order, before coordinate descent and after.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from calibration_length import LENGTH, OTHERS, entered, error, seen

from owl_deploy.bench.machine import look
from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.pruning.obs import factorise
from owl_deploy.compression.quantization.grid import Grid
from owl_deploy.compression.quantization.rounding import finished, round_pruned, rounded
from owl_deploy.data.text import calibration_windows
from owl_deploy.data.tokens import load_tokens
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint, stored_dtype
from owl_deploy.utils.artefact import write_json
from owl_deploy.utils.hardware import find_dtype

GROUP = 32


def errors(
    weight: torch.Tensor, inputs: Inputs, other: Inputs, bits: int
) -> Iterator[tuple[str, float]]:
    """Of both orders, named, before coordinate descent and after."""
    grid, none = Grid(bits, GROUP), torch.zeros_like(weight, dtype=torch.bool)
    lying = inputs.of_hessian(factorise, inputs.dampening(0.01))
    orders = {
        "as they lie": rounded(weight, none, lying, grid),
        "by size": round_pruned(weight, weight, none, inputs, grid),
    }
    for name, swept in orders.items():
        refined, _ = finished(swept, weight, inputs, grid)
        yield f"{name}, before", error(swept.weight - weight, weight, other)
        yield name, error(refined - weight, weight, other)


def main() -> None:
    """Measure, write, and print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs=2, help="to calibrate on, and another")
    parser.add_argument("--blocks", type=int, nargs="+", default=[2])
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    checkpoint, cpu = open_checkpoint(given.model), torch.device("cpu")
    skeleton = Skeleton(checkpoint, find_dtype("auto", stored_dtype(checkpoint.config), cpu), cpu)
    windows = [
        calibration_windows(load_tokens(given.model, [str(text)]), count, LENGTH, 0)
        for text, count in zip(given.texts, (given.samples, OTHERS), strict=True)
    ]
    rows = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        for block in given.blocks:
            own, other = (
                seen(skeleton, block, entered(skeleton, one, block, Path(scratch)), len(one))
                for one in windows
            )
            weights = checkpoint.read_module(skeleton.names[block])
            for name in skeleton.linears(block):
                for bits in (4, 3):
                    weight = weights[f"{name}.weight"].float()
                    found = errors(weight, Inputs(own, name), Inputs(other, name), bits)
                    rows.append({"block": block, "linear": name, "bits": bits} | dict(found))
                    print(*rows[-1].values(), flush=True)
    asked = {"samples": given.samples, "length": LENGTH, "group": GROUP}
    write_json(given.output, {"cpu": look().cpu, **asked, "rows": rows})


if __name__ == "__main__":
    main()
