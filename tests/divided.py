"""Prunings and evaluations one after another, as a file of JSON asks: what tests start by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.divided FILE
"""

import atexit
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file

from owl_deploy.compression import run as pruning
from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.evaluate.run import evaluate
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.utils import ranks
from owl_deploy.utils.ending import exit_code
from owl_deploy.utils.hardware import Hardware

_HERE = ("-m", "tests.divided")
SAMPLES, LENGTH = 5, 48  # which no two or three processes share evenly


def asked(model: Path, text: Path, output: Path, **settings: Any) -> dict[str, Any]:
    """One pruning, as JSON. Of `settings`, `resume` and `batch` (windows) are not the recipe's."""
    return {"model": str(model), "text": str(text), "output": str(output), "settings": settings}


def run(one: dict[str, Any]) -> None:
    """Do what one object asks, in this process or together with the others.

    With `window`: evaluate as the rest says, into the file `output`. With `killed`, [rank, count]:
    that process ends by SIGKILL as it talks to the others for the count-th time. With `unlike`: all
    but the first say that they have that version of torch. With `times`, from here on: what the
    last process reads counts so many times, a fault for the comparison to find.
    """
    if "killed" in one:
        _kill_later(*one["killed"])
    if "times" in one:
        _count_last_rank(one["times"])
    if "window" in one:
        apart = ("model", "output", "killed")
        asked = EvaluationSettings(
            **{name: value for name, value in one.items() if name not in apart}
        )
        (found,) = evaluate([one["model"]], asked)
        if ranks.leads():
            Path(one["output"]).write_text(json.dumps(found.to_json()))
        return
    if "unlike" in one and not ranks.leads():
        told = pruning.versions() | {"torch": one["unlike"]}
        pruning.versions = lambda: told
    settings = {"sparsity": 0.6} | one["settings"]
    resume = settings.pop("resume", False)
    hardware = Hardware(batch_size=settings.pop("batch", None))
    calibration = Calibration(one["text"], SAMPLES, LENGTH)
    asked = PruneSettings.checked(**settings)
    prune(one["model"], one["output"], asked, calibration, hardware, resume=resume)


def _kill_later(rank: int, count: int) -> None:
    if rank != ranks.local_rank():
        return
    talking, calls = ranks._talking, itertools.count(1)

    def counted() -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return talking()

    ranks._talking = counted


def _count_last_rank(times: float) -> None:
    if ranks.local_rank() != int(os.environ["LOCAL_WORLD_SIZE"]) - 1:
        return
    add = InputStatistics._add

    def weighed(self: InputStatistics, name: str, rows: torch.Tensor) -> None:
        add(self, name, rows * times**0.5)

    InputStatistics._add = weighed


def torchrun(
    processes: int,
    *arguments: object,
    program: Sequence[object] = ("-m", "owl_deploy"),
    group: Sequence[object] = ("--standalone",),
) -> "subprocess.CompletedProcess[str]":
    """`python PROGRAM ARGUMENTS` in so many processes, to its end; by `group` they find each other.

    A start takes seconds: `fresh.group` does without, and without what torchrun does for them.
    """
    launcher = ["torch.distributed.run", *group, "--nproc-per-node", processes, *program]
    command = [sys.executable, "-m", *map(str, [*launcher, *arguments])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def in_processes(
    processes: int, folder: Path, asked: Iterable[dict[str, Any]]
) -> "subprocess.CompletedProcess[str]":
    """Do all that is `asked` in one start of so many; `folder` is for what they are told."""
    return torchrun(processes, _told(folder, asked), program=_HERE)


def in_two_nodes(
    processes: int, folder: Path, asked: Iterable[dict[str, Any]]
) -> "list[subprocess.CompletedProcess[str]]":
    """The same in so many processes for each of two launchers, as two machines have them."""
    told = _told(folder, asked)
    with socket.create_server(("127.0.0.1", 0)) as free:
        where = ("--master-addr", "127.0.0.1", "--master-port", free.getsockname()[1])

    def node(rank: int) -> "subprocess.CompletedProcess[str]":
        group = ("--nnodes", 2, "--node-rank", rank, *where)
        return torchrun(processes, told, program=_HERE, group=group)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(node, range(2)))


def _told(folder: Path, asked: Iterable[dict[str, Any]]) -> Path:
    told = folder / "asked.json"
    told.write_text(json.dumps(list(asked)))
    return told


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


class Apart(NamedTuple):
    """How far a checkpoint is from another.

    `elsewhere`: weights that are zero in one only; `rows`: those that hold such; `off`: the most
    that a weight of the other rows differs, as a share of the largest of its tensor; `moved`: the
    norm of the difference of all weights, as a share of the norm of all.
    """

    elsewhere: int
    rows: int
    off: float
    moved: float


SAME = Apart(0, 0, 0.0, 0.0)


def difference(a: Path, b: Path) -> Apart:
    """How far checkpoint `b` is from `a`."""
    one, other = weights(a), weights(b)
    assert one.keys() == other.keys()
    elsewhere, rows, most, squares, whole = 0, 0, 0.0, 0.0, 0.0
    for name, tensor in one.items():
        x, y = (each.double().reshape(-1, each.shape[-1]) for each in (tensor, other[name]))
        differs = (x == 0) != (y == 0)
        swapped = differs.any(dim=1, keepdim=True)
        elsewhere, rows = elsewhere + int(differs.sum()), rows + int(swapped.sum())
        off = (x - y).abs().masked_fill(swapped, 0).max() / x.abs().max()
        most = max(most, float(off))
        squares += float((x - y).square().sum())
        whole += float(x.square().sum())
    return Apart(elsewhere, rows, most, (squares / whole) ** 0.5)


def _ended_alone() -> None:
    """At exit, after the group's end: its threads must not see the interpreter's."""
    names = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if left := [name for name in names if "gloo" in name]:
        print("threads of the group are left:", *left, file=sys.stderr)
        os._exit(9)


def main(arguments: Sequence[str]) -> None:
    atexit.register(_ended_alone)  # the first to be registered is the last to be called
    for one in json.loads(Path(arguments[0]).read_text()):
        run(one)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
