"""Processes that begin with PyTorch imported: forks of one that has only imported it.

A start of Python and PyTorch takes seconds, and a suite that kills and resumes has hundreds. What a
test says of a launcher, of an import or of the interpreter's end needs a start of its own.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import IO

from owl_deploy.inference.environment import ending_with_us

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "owl_deploy.cli",
        "owl_deploy.compression.run",
        "owl_deploy.finetune.run",
        "transformers.models.llama.modeling_llama",
        "transformers.trainer",
        "torch.distributed.nn",
        "onnxruntime_genai.models",  # which has a folder of its own for these:
        "builders",
    ]
)

ensure_running = forkserver.ensure_running

_STREAMS = ("stdout", "stderr")


def started(
    work: Callable[..., object], *arguments: object, output: Path, **environment: str
) -> ForkServerProcess:
    """A process that does `work`, a function of a module.

    What it prints is added to the files stdout and stderr in the folder `output`.
    """
    process = _CONTEXT.Process(
        target=_do, args=(output, os.environ | environment, work, arguments), daemon=False
    )
    process.start()
    return process


def ran(
    work: Callable[..., object], *arguments: object, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """The same to its end; the returncode of a signal is negative."""
    return _together([(work, arguments, environment)])


def signalled_at(reached: Path, number: signal.Signals) -> None:
    """Have this process send itself the signal `number` once `reached` is there.

    At its next look at a file: from outside, on a busy machine, that might be seen when it is gone
    again. Not within a file: of a lease that says nothing nobody knows whose it is, for a minute.
    """

    def look(event: str, _: object) -> None:
        if event in ("open", "os.mkdir", "os.remove", "os.rename") and reached.exists():
            os.kill(os.getpid(), number)

    sys.addaudithook(look)


def owl(*arguments: object) -> None:
    """`owl ARGUMENTS`, the work of such a process."""
    from owl_deploy import cli

    sys.argv = ["owl", *map(str, arguments)]
    cli.main()


def group(
    processes: int, work: Callable[..., object], *arguments: object
) -> "subprocess.CompletedProcess[str]":
    """So many that find each other as torchrun's do, to the end of all; nobody ends the others."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_PORT": port}
    told |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "none", "OMP_NUM_THREADS": 1}
    ranks = [told | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return _together(
        [(work, arguments, {key: str(one) for key, one in own.items()}) for own in ranks]
    )


def _together(
    asked: list[tuple[Callable[..., object], tuple[object, ...], dict[str, str]]],
) -> "subprocess.CompletedProcess[str]":
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder)
        all_of_them = [started(work, *args, output=output, **own) for work, args, own in asked]
        for one in all_of_them:
            one.join()
        code = next((one.exitcode for one in all_of_them if one.exitcode), 0)
        said = [(output / name).read_text() for name in _STREAMS]
        return subprocess.CompletedProcess([], code, *said)


def _do(
    output: Path,
    environment: Mapping[str, str],
    work: Callable[..., object],
    arguments: tuple[object, ...],
) -> None:
    for number, name in enumerate(_STREAMS, 1):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    work(*arguments)


class Builder:
    """onnxruntime-genai's model builder in such a process, for `owl_deploy.export.genai`.

    It imports for six seconds what it needs for one. It is asked as a `subprocess.Popen` is; what
    tests start as a process of its own starts it as its users do.
    """

    def __init__(
        self,
        command: list[str],
        *,
        cwd: Path,
        env: dict[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
    ) -> None:
        assert (stdin, stderr) == (subprocess.DEVNULL, subprocess.STDOUT)
        arguments = command[6:]
        assert command == ending_with_us([sys.executable, "-P", *arguments])
        self._process = _CONTEXT.Process(target=_build, args=(arguments, cwd, env, stdout.name))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode

    def kill(self) -> None:
        self._process.kill()


def _build(arguments: list[str], folder: Path, environment: dict[str, str], log: str) -> None:
    from huggingface_hub import constants

    with Path(log).open("ab") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    sys.stdout.reconfigure(write_through=True)
    os.environ.clear()
    os.environ.update(environment)
    # Read from the environment by now.
    constants.HF_HUB_OFFLINE, tempfile.tempdir = True, environment["TMPDIR"]
    # Ours came with the arguments, and lacks the folder that this package adds.
    sys.path.extend(sys.modules["onnxruntime_genai.models"].__path__)
    os.chdir(folder)
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
