"""Training speed: `owl finetune --method masked` against a plain transformers Trainer.

    python benchmarks/finetune_speed.py SPARSE TEXT [--dtype float32 ...] [--length 512]
                                        [--batch 1] [--steps 10] [--rounds 3] [-o FILE]

SPARSE is a pruned checkpoint. The plain Trainer is what one would write without owl: the model in
float32, its blocks trained by the same AdamW with the products in the same dtype (autocast), and
after each step the weights times their masks, which keeps the zeros. Both train the same blocks on
the same windows, in turn, forwards and backwards, each time in a process of its own. The speed is
by the median step, the first two left out; the peak of memory is of the whole process.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

from owl_deploy.bench.machine import look
from owl_deploy.finetune.settings import resolved
from owl_deploy.finetune.source import Source
from owl_deploy.finetune.train import Schedule, Windows, train
from owl_deploy.finetune.trainee import Trainee
from owl_deploy.inference import default_threads
from owl_deploy.models.manifest import versions
from owl_deploy.models.sparse_linear import sparsify
from owl_deploy.utils.artefact import write_json

LEFT_OUT = 2  # steps, in which memory is allocated and kernels are chosen
RATE = 1e-4
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def ours(
    source: Source, windows: tuple[torch.Tensor, torch.Tensor], given: argparse.Namespace
) -> list[float]:
    """The seconds of each step, and the losses, by `owl finetune`'s own training."""
    dtype = DTYPES[given.dtype[0]]
    model = source.load(torch.float32)
    for name in source.blocks:
        sparsify(model.get_submodule(name), dtype)
    values = {"method": "masked", "learning_rate": RATE, "batch_size": given.batch, "warmup": 0.0}
    with tempfile.TemporaryDirectory() as folder:
        curve = train(
            Trainee(model, dtype=dtype),
            windows,
            resolved(values, teacher=False),
            Schedule(given.steps, None),
            Path(folder),
            "owl",
        )
    times = [row["seconds"] for row in curve]
    steps = [index for index, row in enumerate(curve) if "loss" in row]
    return [times[index] - times[index - 1] for index in steps]


class Masked(transformers.TrainerCallback):  # type: ignore[misc]
    """Puts the zeros back after each step, and notes when steps begin and end."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self.masks = [(one, (one.detach() != 0).to(one.dtype)) for one in parameters]
        self.seconds: list[float] = []

    def on_step_begin(self, *_: object, **__: object) -> None:
        self.began = time.monotonic()

    @torch.no_grad()
    def on_optimizer_step(self, *_: object, **__: object) -> None:
        for parameter, mask in self.masks:
            parameter.mul_(mask)

    def on_step_end(self, *_: object, **__: object) -> None:
        self.seconds.append(time.monotonic() - self.began)


def plain(
    source: Source, windows: tuple[torch.Tensor, torch.Tensor], given: argparse.Namespace
) -> list[float]:
    """The seconds of each step by the Trainer alone."""
    model = source.load(torch.float32)
    trained = [one for name in source.blocks for one in model.get_submodule(name).parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    masked = Masked([one for one in trained if one.ndim == 2])
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch,
            use_cpu=not torch.cuda.is_available(),
            bf16=given.dtype[0] == "bfloat16",
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        )
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1 - step / given.steps
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=Windows(windows[0]),
            data_collator=transformers.default_data_collator,
            optimizers=(optimizer, scheduler),
            callbacks=[masked],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return masked.seconds


WAYS = {"owl finetune": ours, "transformers Trainer": plain}


def measure(given: argparse.Namespace) -> None:
    """Train in the one way that is given, and print what came out as JSON."""
    source = Source(given.sparse)
    windows = source.windows([given.text], given.length)
    seconds = WAYS[given.way](source, windows, given)[LEFT_OUT:]
    result = {
        "tokens_per_second": given.batch * given.length / statistics.median(seconds),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    print(json.dumps(result))


def samples(given: argparse.Namespace, dtype: str) -> dict[str, list[dict[str, float]]]:
    """What each way gave in each round, the rounds forwards and backwards in turn."""
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(given.rounds):
        for way in list(WAYS)[:: 1 if number % 2 == 0 else -1]:
            options = ["--way", way, "--dtype", dtype]
            for name in ("length", "batch", "steps"):
                options += [f"--{name}", str(getattr(given, name))]
            command = [sys.executable, __file__, given.sparse, given.text, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[way].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    """Measure both ways in each dtype, and show the medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sparse")
    parser.add_argument("text")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="repeat. [both]")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.steps <= LEFT_OUT:
        parser.error(f"--steps must be above {LEFT_OUT}")
    if given.way:
        measure(given)
        return
    rows = {dtype: samples(given, dtype) for dtype in given.dtype or DTYPES}
    print("| products in | | tokens/s | peak memory, GB |\n|---|---|--:|--:|")
    for dtype, ways in rows.items():
        for way, found in ways.items():
            speed = statistics.median(one["tokens_per_second"] for one in found)
            memory = max(one["peak_memory_bytes"] for one in found) / 1e9
            print(f"| {dtype} | {way} | {speed:.0f} | {memory:.2f} |")
    if given.output:
        asked = {name: getattr(given, name) for name in ("length", "batch", "steps", "rounds")}
        machine = {"cpu": look().cpu, "cores": default_threads(), "versions": versions()}
        write_json(given.output, {**machine, **asked, "rows": rows})


if __name__ == "__main__":
    main()
