"""What `owl prune --reconstruct` gives, by learning rate, step, loss and target, on a few blocks.

    python benchmarks/reconstruction.py MODEL CALIBRATION EVALUATION -o FILE [--blocks 4]
                                        [--try LEARNING_RATE:TOKENS_A_STEP:LOSS:TARGET ...]

Prunes the first blocks of a model to 50 % and reconstructs them; the others stay dense. What is
told is the held-out error of every half and the perplexity of the whole. LOSS: "relative", as the
verb has it, or "plain", the mean square. TARGET: "stream", what the dense model has at that place,
as the verb has it, or "block", what the dense half makes of what the pruned ones before it let
through, as EBFT's code does. Rows that FILE holds are not repeated.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from owl_deploy.bench.machine import look
from owl_deploy.compression import reconstruct, sequential
from owl_deploy.compression.plan import resolve
from owl_deploy.compression.request import Request, check
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.compression.sublayers import Half
from owl_deploy.data.calibration import Calibration
from owl_deploy.data.text import evaluation_windows
from owl_deploy.data.tokens import load_tokens
from owl_deploy.models.blocks import window_loss
from owl_deploy.utils.artefact import only_writer, write_json
from owl_deploy.utils.hardware import Hardware

AS_THE_VERB = f"{reconstruct.LEARNING_RATE:g}:{reconstruct.TOKENS_A_STEP}:relative:stream"


class OnPruned(reconstruct.Reconstruction):
    """Takes as its target what the dense half makes of the pruned model's stream."""

    def _pass(
        self, half: Half, index: int, weights: dict[str, torch.Tensor], stream: reconstruct.Stream
    ) -> None:
        if stream == "dense":
            for streams in (self.training, self.held_out):
                streams.dense.hidden.copy_(streams.pruned.hidden)
        super()._pass(half, index, weights, stream)


def mean_square(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The error without regard to a token's size."""
    return (output - target).square().mean()


def choose(asked: str) -> None:
    """Let the reconstructions from here on be of the kind `asked`."""
    rate, tokens, loss, target = asked.split(":")
    reconstruct.LEARNING_RATE, reconstruct.TOKENS_A_STEP = float(rate), int(tokens)
    reconstruct.error = {"relative": RELATIVE, "plain": mean_square}[loss]
    kind = {"stream": reconstruct.Reconstruction, "block": OnPruned}[target]
    setattr(sequential, "Reconstruction", kind)  # noqa: B010 - not one of its own names


RELATIVE = reconstruct.error


def first_parts(request: Request, blocks: int) -> list[sequential.Part]:
    """The first blocks, pruned, and reconstructed if that is asked for."""
    with tempfile.TemporaryDirectory() as scratch, only_writer(Path(scratch) / "out"):
        store = Store(Path(scratch) / "out", {}, resume=False, force=False)
        plan, first = resolve(request, store)
        return list(itertools.islice(sequential.Walk(request, plan, store, first).parts(), blocks))


@torch.no_grad()
def perplexity(model: str, parts: Sequence[sequential.Part], windows: torch.Tensor) -> float:
    """That of the model with `parts` in the place of its own, on `windows` [n, length]."""
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for part in parts:
        whole.get_submodule(part.name).load_state_dict(dict(part.tensors))
    return math.exp(statistics.mean(window_loss(whole, window.long()) for window in windows))


def row(asked: str, given: argparse.Namespace) -> dict[str, Any]:
    """Prune, reconstruct as `asked` ("none": not at all), and measure."""
    if asked != "none":
        choose(asked)
    settings = PruneSettings.checked(
        method=given.method,
        allocation="uniform",
        sparsity=0.5,
        reconstruct=None if asked == "none" else given.epochs,
    )
    text = Calibration(given.calibration, given.samples, given.length)
    before = time.process_time()
    request = check(given.model, settings, text, Hardware())
    parts = first_parts(request, given.blocks)
    seconds = time.process_time() - before
    tokens = load_tokens(Path(given.model), [given.evaluation])
    windows = evaluation_windows(tokens, given.window, given.windows)
    halves = [(half.before, half.after, half.epochs) for p in parts for half in p.halves.values()]
    return {
        "asked": asked,
        "halves": halves,
        "cpu_seconds": seconds,
        "perplexity": perplexity(given.model, parts, windows),
    }


def main() -> None:
    """Do the rows that FILE does not hold; print every one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("evaluation")
    parser.add_argument("--method", default="sparsegpt")
    parser.add_argument("--blocks", type=int, default=4, help="the first ones")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=6, help="to evaluate on")
    parser.add_argument("--window", type=int, default=1024, help="tokens of each")
    parser.add_argument("--try", dest="tries", action="append", help="repeat. [none, the verb's]")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    keys = ("method", "blocks", "epochs", "samples", "length", "windows", "window")
    asked = {key: getattr(given, key) for key in keys}
    result: dict[str, Any] = {"cpu": look().cpu, **asked, "rows": []}
    if given.output.is_file():
        result = json.loads(given.output.read_text(encoding="utf-8"))
        if {key: result[key] for key in keys} != asked:
            parser.error(f"{given.output} was made with other options")
    done = {one["asked"] for one in result["rows"]}
    for one in given.tries or ("none", AS_THE_VERB):
        if one not in done:
            result["rows"].append(row(one, given))
            write_json(given.output, result)
            print(json.dumps(result["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
