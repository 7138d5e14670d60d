"""onnxruntime-genai's model builder, in a process that has its imports already.

What `owl_deploy.export.genai` starts imports PyTorch, Transformers and the builder: six seconds of
a processor for every tiny model, of which building it takes one. Here a server that imported them
once forks for each (`multiprocessing`'s), which then runs the same script with the same arguments.
Whatever tests run as a process of its own starts the builder as its users do.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from typing import IO, Any

_CONTEXT = multiprocessing.get_context("forkserver")
# The builder's modules know each other by bare names, once their package is there.
_CONTEXT.set_forkserver_preload(
    ["torch", "transformers.modeling_utils", "onnxruntime_genai.models", "builders"]
)

ensure_running = forkserver.ensure_running


class Popen:
    """What `genai` asks of a `subprocess.Popen`."""

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
        assert command[:2] == [sys.executable, "-P"]
        self._process: Any = _CONTEXT.Process(
            target=_run, args=(command[2:], cwd, env, stdout.name)
        )
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


def _run(arguments: list[str], folder: Path, environment: dict[str, str], log: str) -> None:
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
