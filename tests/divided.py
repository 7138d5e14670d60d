"""Prunings and evaluations one after another, as a file of JSON asks: what tests start by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.divided FILE
"""

import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from owl_deploy import ranks, recipe
from owl_deploy.ending import exit_code
from owl_deploy.evaluate.run import Asked, evaluate
from owl_deploy.prune import run as pruning
from owl_deploy.prune.run import Calibration, prune

SAMPLES, LENGTH = 5, 48  # which no two or three processes share evenly


def asked(model: Path, text: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """One pruning, as JSON. Of `settings`, `tune` and `resume` are not the recipe's."""
    return {"model": str(model), "text": str(text), "output": str(output), "settings": settings}


def run(one: dict[str, Any]) -> None:
    """Do what one object asks, in this process or together with the others.

    With `window`: evaluate as the rest says, into the file `output`. With `killed`, [rank, count]:
    that process ends by SIGKILL as it talks to the others for the count-th time. With `unlike`: all
    but the first say that they have that version of torch.
    """
    if "killed" in one:
        _kill_later(*one["killed"])
    if "window" in one:
        apart = ("model", "output", "killed")
        asked = Asked(**{name: value for name, value in one.items() if name not in apart})
        (found,) = evaluate([one["model"]], asked)
        if ranks.leads():
            Path(one["output"]).write_text(json.dumps(found.to_json()))
        return
    if "unlike" in one and not ranks.leads():
        told = pruning.versions() | {"torch": one["unlike"]}
        pruning.versions = lambda: told
    settings = {"sparsity": 0.6} | one["settings"]
    how = {"tune_allocation": settings.pop("tune", False), "resume": settings.pop("resume", False)}
    calibration = Calibration(one["text"], SAMPLES, LENGTH)
    prune(one["model"], one["output"], recipe.settings(**settings), calibration, **how)


def _kill_later(rank: int, count: int) -> None:
    if rank != ranks.local_rank():
        return
    talking, calls = ranks._talking, itertools.count(1)

    def counted() -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return talking()

    ranks._talking = counted


def torchrun(processes: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    """`python -m ARGUMENTS` in so many processes, to its end."""
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m"]
    command = [sys.executable, "-m", *map(str, [*launcher, *arguments])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def in_processes(
    processes: int, folder: Path, asked: Iterable[dict[str, Any]]
) -> "subprocess.CompletedProcess[str]":
    """Do all that is `asked` in one start of so many; `folder` is for what they are told."""
    told = folder / "asked.json"
    told.write_text(json.dumps(list(asked)))
    return torchrun(processes, "tests.divided", told)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def difference(a: Path, b: Path) -> tuple[int, float]:
    """How many weights are zero in one of two checkpoints only; what the others differ by at most,
    as a share of the largest of their tensor."""
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    elsewhere, most = 0, 0.0
    for name, x in one.items():
        y = other[name]
        differs = (x == 0) != (y == 0)
        elsewhere += int(differs.sum())
        off = (x.double() - y.double()).abs().masked_fill(differs, 0).max() / x.abs().max()
        most = max(most, float(off))
    return elsewhere, most


def main(arguments: Sequence[str]) -> None:
    for one in json.loads(Path(arguments[0]).read_text()):
        run(one)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
