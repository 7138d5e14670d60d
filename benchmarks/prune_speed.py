"""Pruning time: `owl prune` against a plain transcription of the published procedure.

    python benchmarks/prune_speed.py MODEL TEXT [--samples 16] [--length 512] [--rounds 3]

The transcription follows the OWL paper's code as it is published: every sample alone, a pass for
the outlier ratios that runs each block twice, another that prunes and runs each block twice,
statistics and a Hessian for each Linear by itself, full sorts. It runs in float32 and in bfloat16
(the published code takes float16, in which no CPU is fast), with PyTorch's fused attention, which
is faster than the eager one of its time. All run in turn, forwards and backwards, on the same
model (stored in bfloat16), text and machine, each in a process of its own that reads the model and
tokenises the text.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from owl_deploy.bench.machine import look
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.data.text import calibration_windows
from owl_deploy.data.tokens import load_tokens

SPARSITY, MULTIPLE, SPREAD, DAMPENING, BLOCK = 0.7, 5.0, 0.08, 0.01, 128


class Gathered:
    """One Linear's statistic, as the published wrapper gathers it: one sample at a time."""

    def __init__(self, linear: torch.nn.Linear, hessian: bool) -> None:
        columns = linear.weight.shape[1]
        self.linear, self.samples, self.wants_hessian = linear, 0, hessian
        self.scale = torch.zeros(columns)
        self.hessian = torch.zeros(columns, columns) if hessian else torch.zeros(0)

    def add(self, module: Any, inputs: Any, output: Any) -> None:  # noqa: ANN401 - a hook
        rows = inputs[0].reshape(-1, inputs[0].shape[-1]).t().float()  # [in, tokens]
        before, self.samples = self.samples, self.samples + 1
        self.scale *= before / self.samples
        self.scale += rows.norm(p=2, dim=1) ** 2 / self.samples
        if self.wants_hessian:
            self.hessian *= before / self.samples
            rows = (2 / self.samples) ** 0.5 * rows
            self.hessian += rows.matmul(rows.t())


def gather(
    block: torch.nn.Module, states: list[torch.Tensor], arguments: dict[str, Any], hessian: bool
) -> dict[str, Gathered]:
    """One pass over the samples with a hook on every Linear."""
    found = {
        name: Gathered(module, hessian)
        for name, module in block.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    handles = [one.linear.register_forward_hook(one.add) for one in found.values()]
    for state in states:
        block(state, **arguments)
    for handle in handles:
        handle.remove()
    return found


def metric(one: Gathered) -> torch.Tensor:
    return one.linear.weight.abs() * one.scale.reshape(1, -1).sqrt()


def sparsegpt(one: Gathered, sparsity: float) -> None:
    weight, hessian = one.linear.weight.data.clone().float(), one.hessian
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMPENING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block = weight[:, start:end].clone()
        errors, kept = torch.zeros_like(block), torch.zeros_like(block)
        own = upper[start:end, start:end]
        scores = block**2 / own.diagonal().reshape(1, -1) ** 2
        threshold = scores.flatten().sort()[0][int(scores.numel() * sparsity)]
        mask = scores <= threshold
        for column in range(end - start):
            values = block[:, column].clone()
            values[mask[:, column]] = 0
            kept[:, column] = values
            error = (block[:, column] - values) / own[column, column]
            block[:, column:] -= error.unsqueeze(1).matmul(own[column, column:].unsqueeze(0))
            errors[:, column] = error
        weight[:, start:end] = kept
        weight[:, end:] -= errors.matmul(upper[start:end, end:])
    one.linear.weight.data = weight.to(one.linear.weight.dtype)


def wanda(one: Gathered, sparsity: float) -> None:
    scores = metric(one)
    order = scores.sort(dim=-1, stable=True)[1]
    indices = order[:, : int(scores.shape[1] * sparsity)]
    one.linear.weight.data[
        torch.zeros_like(scores, dtype=torch.bool).scatter_(1, indices, True)
    ] = 0


@torch.no_grad()
def published(
    model_folder: Path, windows: torch.Tensor, method: str, dtype: torch.dtype, out: Path
) -> None:
    """The published procedure, start to saved model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    blocks = model.model.layers
    ratios = []
    states, arguments = first_states(model, windows)
    for block in blocks:
        found = gather(block, states, arguments, False)
        for index, state in enumerate(states):
            states[index] = block(state, **arguments)
        scores = torch.cat([metric(one).flatten() for one in found.values()])
        ratios.append(float((scores > MULTIPLE * scores.mean()).sum() / scores.numel() * 100))
    scaled = [(r - min(ratios)) / (max(ratios) - min(ratios)) * 2 * SPREAD for r in ratios]
    mean = sum(scaled) / len(scaled)
    states, arguments = first_states(model, windows)
    for block, ratio in zip(blocks, scaled, strict=True):
        sparsity = 1 - (ratio - mean + 1 - SPARSITY)
        for one in gather(block, states, arguments, method == "sparsegpt").values():
            (sparsegpt if method == "sparsegpt" else wanda)(one, sparsity)
        for index, state in enumerate(states):
            states[index] = block(state, **arguments)
    model.save_pretrained(out)


class Stop(Exception):
    """Ends the pass that catches what enters the first block."""


def first_states(
    model: Any,  # noqa: ANN401 - transformers is untyped
    windows: torch.Tensor,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    states, caught = [], {}

    def catch(module: Any, inputs: Any, arguments: dict[str, Any]) -> None:  # noqa: ANN401
        states.append(inputs[0])
        caught.update(arguments)
        raise Stop

    handle = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with contextlib.suppress(Stop):
            model(window.unsqueeze(0), use_cache=False)
    handle.remove()
    return states, caught


def run_one(who: str, method: str, model: Path, text: Path, samples: int, length: int) -> None:
    """Prune once, in this process; the seconds go to stdout."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        settings = PruneSettings.checked(
            method=method,
            allocation="owl",
            sparsity=SPARSITY,
            outlier_multiple=MULTIPLE,
            spread=SPREAD,
        )
        started = time.perf_counter()
        if who == "ours":
            prune(model, out, settings, Calibration(str(text), samples, length))
        else:
            tokens = load_tokens(model, [str(text)])
            windows = calibration_windows(tokens, samples, length, 0)
            published(model, windows, method, getattr(torch, who), out)
        print(time.perf_counter() - started)


def compare(common: list[str], method: str, rounds: int) -> dict[str, Any]:
    """Seconds of each contestant, and the ratios of ours to the transcription in each dtype."""
    seconds: dict[str, list[float]] = {"ours": [], "float32": [], "bfloat16": []}
    for number in range(rounds):
        for who in list(seconds)[:: 1 if number % 2 == 0 else -1]:
            done = subprocess.run(
                [*common, "--one", who, method], check=True, stdout=subprocess.PIPE, text=True
            )
            seconds[who].append(float(done.stdout.split()[-1]))
    compared: dict[str, Any] = {"seconds": seconds}
    for dtype in ("float32", "bfloat16"):
        ratios = [a / b for a, b in zip(seconds["ours"], seconds[dtype], strict=True)]
        compared[f"ours_to_{dtype}"] = {
            "median": statistics.median(ratios),
            "range": [min(ratios), max(ratios)],
        }
    return compared


def main() -> None:
    """Run both in turn for each method; print and write the medians and the ratios by pairs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.one:
        who, method = given.one
        run_one(who, method, given.model, given.text, given.samples, given.length)
        return
    machine = look()
    result: dict[str, Any] = {"cpu": machine.cpu, "samples": given.samples, "length": given.length}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        transformers.AutoModelForCausalLM.from_pretrained(
            given.model, dtype=torch.bfloat16
        ).save_pretrained(model)
        transformers.AutoTokenizer.from_pretrained(given.model).save_pretrained(model)
        common = [sys.executable, __file__, str(model), str(given.text)]
        common += ["--samples", str(given.samples), "--length", str(given.length)]
        for method in ("wanda", "sparsegpt"):
            result[f"owl-{method}"] = compare(common, method, given.rounds)
            print(method, json.dumps(result[f"owl-{method}"], indent=1), flush=True)
    if given.output:
        given.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
