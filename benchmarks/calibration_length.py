"""What a rounded Linear loses on other text, by the amount of text that it was rounded by.

    python benchmarks/calibration_length.py MODEL calibration.txt evaluation.txt --block 2 -o FILE

Rounds the Linears of a block, each by itself, by the dense model's own inputs, as `owl prune
--method none --bits` does, and with GPTQ's dampening of 0.01 whatever the text, and measures
||X (V - W)^T||^2 / ||X W^T||^2 for a weight W that became V: on the calibration text and on the
other one. FILE holds a row for a Linear, a number of windows and a dampening.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch

from owl_deploy.bench.machine import look
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.text import calibration_windows
from owl_deploy.data.tokens import load_tokens
from owl_deploy.models.blocks import Activations, Skeleton
from owl_deploy.models.checkpoint import open_checkpoint, stored_dtype
from owl_deploy.utils.artefact import write_json
from owl_deploy.utils.hardware import find_dtype
from owl_deploy.utils.progress import bar

LENGTH, OTHERS = 512, 32  # tokens of a window; windows of the other text


class AsGPTQ(Inputs):
    """Inputs that are taken at their word, however few tokens they are of."""

    def dampening(self, least: float) -> float:
        """Always the `least`."""
        return least


def entered(skeleton: Skeleton, windows: torch.Tensor, index: int, scratch: Path) -> Activations:
    """What enters block `index` for `windows`."""
    state = skeleton.embed(windows, 4, scratch)
    for before in range(index):
        with skeleton.loaded(skeleton.names[before]) as block:
            state.through(block, before, lambda _: None, keep=True)
    return state


def seen(skeleton: Skeleton, index: int, state: Activations, windows: int) -> InputStatistics:
    """What enters the Linears of block `index` for the first of the windows."""
    first = Activations(state.hidden[:windows], state.arguments, state.batch, state.device)
    found = InputStatistics(skeleton.linears(index), windows, hessian=True)
    with skeleton.loaded(skeleton.names[index]) as block, found.gathering(inputs_only=True):
        first.through(block, index, lambda _: None, keep=False)
    return found


def error(change: torch.Tensor, weight: torch.Tensor, inputs: Inputs) -> float:
    """Of the outputs, as a share of them, both squared."""
    hessian = inputs.of_hessian(torch.Tensor.double)
    lost, whole = (float(((one.double() @ hessian) * one).sum()) for one in (change, weight))
    return lost / whole


def main() -> None:
    """Measure, write, and print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs=2, help="to calibrate on, and another")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--samples", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    checkpoint, cpu = open_checkpoint(given.model), torch.device("cpu")
    skeleton = Skeleton(checkpoint, find_dtype("auto", stored_dtype(checkpoint.config), cpu), cpu)
    maker = Maker(PruneSettings.checked(method="none", bits=given.bits))
    weights = checkpoint.read_module(skeleton.names[given.block])
    linears = skeleton.linears(given.block)
    rows: list[dict[str, Any]] = []
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        states = [
            entered(
                skeleton,
                calibration_windows(load_tokens(given.model, [str(text)]), count, LENGTH, 0),
                given.block,
                Path(scratch),
            )
            for text, count in zip(given.texts, (max(given.samples), OTHERS), strict=True)
        ]
        other = seen(skeleton, given.block, states[1], OTHERS)
        with bar("Rounding", 2 * len(given.samples) * len(linears)) as advance:
            for samples in given.samples:
                own = seen(skeleton, given.block, states[0], samples)
                for name in linears:
                    weight = weights[f"{name}.weight"].float()
                    for kind in (AsGPTQ, Inputs):
                        inputs = kind(own, name)
                        change = maker.make(weight, inputs, Format(given.bits)).weight - weight
                        rows.append(
                            {
                                "linear": name,
                                "windows": samples,
                                "dampening": inputs.dampening(0.01),
                                "own": error(change, weight, inputs),
                                "other": error(change, weight, Inputs(other, name)),
                            }
                        )
                        advance(1)
    asked = {"block": given.block, "bits": given.bits, "length": LENGTH}
    write_json(given.output, {"cpu": look().cpu, **asked, "rows": rows})
    for row in rows:
        print(*(f"{value:.3g}" if isinstance(value, float) else value for value in row.values()))


if __name__ == "__main__":
    main()
