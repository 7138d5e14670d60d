"""What fine-tuning wins back: perplexity dense, pruned, and after each kind at equal time.

    python benchmarks/finetune.py WORK [--minutes 10] [--case wanda:0.5 ...] [--kind masked ...]
                                  [--step-minutes 4] -o FILE

Prunes the demo's model by OWL with each case's method to its sparsity, fine-tunes it in every kind
for the same time on the demo's calibration text, and evaluates on its evaluation text, which holds
other articles. WORK keeps what is finished: run it again to go on; FILE gets all that WORK has
of the cases. With --step-minutes a training is interrupted after so long, as by Ctrl-C, and the
command ends with 75: the next one resumes it.
"""

import argparse
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from owl_deploy.bench.machine import look
from owl_deploy.demo_input import CALIBRATION, EVALUATION, MODEL, demo_input
from owl_deploy.evaluate.perplexity import perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.inference import default_threads
from owl_deploy.models.manifest import Manifest, read_manifest, versions
from owl_deploy.utils.artefact import is_artefact, write_json
from owl_deploy.utils.resume import partial_folder

NOT_DONE = 75
TRAINING = ("--sequence-length", "512", "--batch-size", "1", "--gradient-accumulation", "1")
TEACHER = "TEACHER"  # the demo's dense model
KINDS: dict[str, tuple[str, ...]] = {
    "masked + teacher": ("--method", "masked", "--teacher", TEACHER),
    "masked": ("--method", "masked"),
    "LoRA": ("--method", "lora"),
    "LoRA merged": ("--method", "lora", "--merge", "masked"),
}
WINDOW, WINDOWS = 2048, 6


def owl(*arguments: object, seconds: float | None = None) -> bool:
    """Run an `owl` command; False when `seconds` were over first, and it was interrupted."""
    process = subprocess.Popen([sys.executable, "-m", "owl_deploy", *map(str, arguments)])
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return False
    if code:
        sys.exit(code)
    return True


def prune(case: str, work: Path) -> Path:
    """The checkpoint of a case, METHOD:SPARSITY, made if it is not there."""
    method, sparsity = case.split(":")
    folder = work / f"{method}-{sparsity}"
    if not is_artefact(folder):
        text = demo_input() / CALIBRATION
        calibration = ("--calibration", text, "--samples", 32, "--sequence-length", 512)
        what = ("--method", method, "--allocation", "owl", "--sparsity", sparsity)
        owl("prune", demo_input() / MODEL, "-o", folder, *what, *calibration)
    return folder


def tuned_folder(sparse: Path, kind: str) -> Path:
    """Where the result of a kind of fine-tuning lies."""
    return sparse.with_name(f"{sparse.name}-{kind.replace(' ', '-')}")


def finetune(sparse: Path, kind: str, minutes: float, step: float | None) -> None:
    """Fine-tune unless that is done; exits with `NOT_DONE` when it is to go on later."""
    folder = tuned_folder(sparse, kind)
    if not is_artefact(folder):
        options = [demo_input() / MODEL if part == TEACHER else part for part in KINDS[kind]]
        resume = ["--resume"] if partial_folder(folder).is_dir() else []
        done = owl(
            *("finetune", sparse, "-o", folder, "--text", demo_input() / CALIBRATION),
            *(*TRAINING, *options, "--max-minutes", minutes, *resume),
            seconds=None if step is None else 60 * step,
        )
        if not done:
            sys.exit(NOT_DONE)


def evaluate(checkpoint: Path, work: Path, adapter: Path | None = None) -> float:
    """The perplexity on the evaluation text, kept in WORK."""
    file = work / f"{(adapter or checkpoint).name}.perplexity.json"
    if not file.is_file():
        text = str(demo_input() / EVALUATION)
        found = perplexity(
            checkpoint, EvaluationSettings(text, window=WINDOW, windows=WINDOWS, adapter=adapter)
        )
        write_json(file, found.value)
    return float(json.loads(file.read_text()))


def row(case: str, kind: str, sparse: Path, work: Path) -> dict[str, Any]:
    """What is known of the finished fine-tuning of the pruned checkpoint `sparse`."""
    folder = tuned_folder(sparse, kind)
    dense, pruned = (evaluate(one, work) for one in (demo_input() / MODEL, sparse))
    manifest = (read_manifest(folder, Manifest) or Manifest(kind="none")).to_json()
    if manifest["kind"] == "adapter":
        after = evaluate(sparse, work, folder)
    else:
        after = evaluate(folder, work)
    done = manifest["finetune"]
    keys = ("settings", "steps", "seconds", "tokens", "dtype", "held_out_loss", "training_loss")
    return {
        "case": case,
        "kind": kind,
        "perplexity": {"dense": dense, "pruned": pruned, "after": after},
        "recovered": math.log(pruned / after) / math.log(pruned / dense),
        **{key: done[key] for key in (*keys, "peak_memory_bytes", "curve")},
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a markdown table."""
    print("| pruned | fine-tuned | perplexity | of the loss won back | minutes | tokens |")
    print("|---|---|--:|--:|--:|--:|")
    for one in rows:
        value = one["perplexity"]
        print(
            f"| {one['case']} ({value['pruned']:.1f}; dense {value['dense']:.1f}) | {one['kind']} "
            f"| {value['after']:.1f} | {one['recovered']:.0%} | {one['seconds'] / 60:.1f} "
            f"| {one['tokens']} |"
        )


def main() -> None:
    """Do what is not done yet, then write and show all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--case", action="append", help="METHOD:SPARSITY; repeat. [wanda:0.5]")
    parser.add_argument("--kind", action="append", choices=KINDS, help="repeat. [all]")
    parser.add_argument("--step-minutes", type=float)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(exist_ok=True)
    rows = []
    for case in given.case or ["wanda:0.5"]:
        sparse = prune(case, given.work)
        for kind in given.kind or KINDS:
            finetune(sparse, kind, given.minutes, given.step_minutes)
        finished = [kind for kind in KINDS if is_artefact(tuned_folder(sparse, kind))]
        rows += [row(case, kind, sparse, given.work) for kind in finished]
    result = {
        "cpu": look().cpu,
        "cores": default_threads(),
        "versions": versions(),
        "evaluated": {"window": WINDOW, "windows": WINDOWS},
        "rows": rows,
    }
    write_json(given.output, result)
    show(rows)


if __name__ == "__main__":
    main()
