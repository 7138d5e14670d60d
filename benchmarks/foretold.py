"""What `owl prune --budget` and `--allocation fisher` foretell of losses, beside what is found.

    python benchmarks/foretold.py MODEL calibration.txt -o foretold.json

Measures each Linear in each way as they do, then runs the model with all Linears of one name made
that way, and with all Linears: the divergence from the dense model on the same held-out windows.
FILE holds a row for a name and a way, nats a token. The disk holds a byte a weight for each way.
"""

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from owl_deploy.bench.machine import look
from owl_deploy.compression.allocation.sensitivity import Found, Measuring
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.request import Request, check
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.data.calibration import Calibration
from owl_deploy.models.blocks import Activations
from owl_deploy.utils.artefact import only_writer, write_json
from owl_deploy.utils.hardware import Hardware

WAYS = (
    Format(4),
    Format(3),
    *(Format(4, sparsity) for sparsity in (0.5, 0.7)),
    *(Format(None, sparsity) for sparsity in (0.3, 0.5, 0.7)),
)
Linear = tuple[int, str]  # a block's number, a name in it


class Model:
    """The model, run with some of its Linears changed."""

    def __init__(self, request: Request, store: Store) -> None:
        assert request.held_out is not None
        self.request, self.store, self.windows = request, store, request.held_out
        self.dense = self._run([], 0)

    def divergence(self, changed: Iterable[Linear], way: int) -> float:
        """From the dense model, with the `changed` Linears made that way, in nats a token."""
        left = self._run(list(changed), way)
        (found,) = self.request.skeleton.divergences(self.windows, self.dense, [left])
        return found

    @torch.no_grad()
    def _run(self, changed: list[Linear], way: int) -> Activations:
        skeleton = self.request.skeleton
        state = skeleton.embed(self.windows, self.request.batch, self.store.folder)
        for index, name in enumerate(skeleton.names):
            with skeleton.loaded(name) as block:
                for key in (key for number, key in changed if number == index):
                    forward = self.store.measured(name, "forward")
                    step = forward[f"{key}.step"][way].unsqueeze(-1)
                    change = forward[f"{key}.difference"][way] * step
                    weight = skeleton.linears(index)[key].weight
                    weight.copy_(weight + change)
                state.through(block, index, lambda _: None, keep=True)
        return state


def row(model: Model, name: str, own: dict[Linear, list[Found]], way: int) -> dict[str, Any]:
    """The Linears `own` in one of the ways: foretold, and found."""
    return {
        "linears": name,
        "sparsity": WAYS[way].sparsity,
        "bits": WAYS[way].bits,
        "foretold": sum(one[way].loss for one in own.values()),
        "found": model.divergence(own, way),
    }


def main() -> None:
    """Measure, write, and print a line a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    asked = PruneSettings.checked(method="sparsegpt", budget="4")
    calibration = Calibration(str(given.calibration), given.samples, 512)
    request = check(given.model, asked, calibration, Hardware(dtype="float32"))
    with tempfile.TemporaryDirectory() as folder, only_writer(Path(folder) / "out"):
        store = Store(Path(folder) / "out", request.deciding(), resume=False, force=False)
        measured = Measuring(request, store, Maker(asked), WAYS).run()
        each = {(index, key): own for index, one in enumerate(measured) for key, own in one.items()}
        model, rows, cpu = Model(request, store), [], look().cpu
        for name in (*dict.fromkeys(key for _, key in each), "all"):
            own = {place: found for place, found in each.items() if name in ("all", place[1])}
            for way in range(len(WAYS)):
                rows.append(row(model, name, own, way))
                numbers = (f"{rows[-1][key]:.4f}" for key in ("foretold", "found"))
                print(name, WAYS[way], *numbers, flush=True)
                result = {"cpu": cpu, "samples": given.samples, "rows": rows}
                write_json(given.output, result)


if __name__ == "__main__":
    main()
