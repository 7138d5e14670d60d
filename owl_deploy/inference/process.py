"""One engine in a process of its own: started, asked, timed out, and never left behind."""

import contextlib
import json
import math
import os
import re
import selectors
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import psutil

from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.inference.environment import WORKER, python_of
from owl_deploy.inference.loading import Folder
from owl_deploy.inference.registry import LOOKUP, Engine, get_engine
from owl_deploy.utils import container

DEFAULT_CONTEXT = 512
DEFAULT_TIMEOUT_S = 600.0
_LEAST_SPEED = 5.0  # tokens a second, of a long request that is still waited for
_STACK = re.compile(r"^ *(?:0# |#0 |Traceback |backtrace)", re.MULTILINE)
_TOPOLOGY = Path("/sys/devices/system/cpu")
_MOST_THREADS = 64  # that any machine bears
_LAST_WORDS = 300  # characters of an engine's stderr that an error shows


def threads_for(asked: int | None) -> int:
    """How many threads an engine gets: as many as `asked` for, else the physical cores.

    Every verb takes this number: ONNX Runtime's own default is one thread on some virtual machines
    of two cores. Raises `BadInput` for less than one, and for so many that only starting them would
    take the machine's time and memory.
    """
    if asked is None:
        return default_threads()
    if asked < 1:
        raise BadInput(f"--threads {asked} is too small.", "It must be 1 or more.")
    most = max(_MOST_THREADS, 4 * (os.cpu_count() or 1))
    if asked > most:
        raise BadInput(f"--threads {asked} is too large.", f"It must be {most} or less.")
    return asked


def default_threads() -> int:
    """The physical cores that this process may use: engines gain nothing from their siblings, and
    threads beyond a container's quota wait for one another.
    """
    return max(1, math.ceil(min(_cores(), container.processors())))


def _cores() -> int:
    """The physical cores of the processors that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    with contextlib.suppress(OSError):  # a system that does not say who are siblings
        siblings = (_TOPOLOGY / f"cpu{one}/topology/thread_siblings_list" for one in allowed)
        return len({path.read_text() for path in siblings})
    return min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))


class Child:
    """A process that an engine runs in, with all that it starts.

    Nothing of it is left after `close`.
    """

    def __init__(self, engine: str, deployment: Path) -> None:
        self.engine: Engine = get_engine(engine)
        self.deployment = deployment
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._ended = False  # all of it: the group's number may be another's by now

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _spawn(self, command: list[str], environment: dict[str, str], pipe: int) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=self._stderr,
            env=environment,
            start_new_session=True,  # a group of its own: to end all of it, and Ctrl-C is ours
        )
        self._ended = False

    def _death(self, op: str) -> EngineFailed:
        """The error for a process that ended without an answer."""
        assert self._process is not None
        code = self._process.wait()
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        words = self.last_words()
        said = f" Its last words: {words}" if words else ""
        return EngineFailed(f"{self._who()} {how} in {op!r}.{said}")

    def last_words(self) -> str:
        """The end of what the engine wrote to stderr, before any stack trace, on one line."""
        if self._stderr is None:
            return ""
        self._stderr.seek(0)
        text = self._stderr.read().decode(errors="replace")
        text = _STACK.split(text, maxsplit=1)[0]
        return " / ".join(filter(None, map(str.strip, text.splitlines())))[-_LAST_WORDS:]

    def _who(self) -> str:
        return f"The engine {self.engine.name!r}, with {self.deployment},"

    def _kill(self) -> None:
        """End the process and all that it started."""
        if self._process is None or self._ended:
            return
        # Also where the first of them has ended: its group's number is taken while one is left.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._ended = True

    def close(self) -> None:
        """End the process, whatever it is doing; nothing of it is left."""
        self._kill()
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout):
                if stream is not None:
                    with contextlib.suppress(BrokenPipeError):  # a request that was never read
                        stream.close()
            self._process = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None


class EngineProcess(Child):
    """A deployment opened by an engine in a fresh process, for the length of a `with` block.

    Linux ends that process with the thread that entered the block, should it die before.

    `context` is the tokens that the cache must hold, `timeout_s` the limit of each request (None:
    ten minutes, or more where the context is large); with `all_logits` the requests that need the
    logits of every position can be made; `batch` rows are decoded together, `streams` decoders
    share the model; with `places` so many texts can go side by side; `trust_library` lets a
    deployment bring operators of its own (see loading.py); `draft`, a deployment's folder or
    "lookup", proposes `draft_tokens` tokens at a time, 0 for as many as pay (speculate.py).
    `loaded` is the answer to the load request: seconds, version, runtime, isa, threads.

    Entering raises `BadInput` for settings that name what must not be loaded, `EnvironmentFailed`
    when the engine is not installed, and `EngineFailed`, with the engine's own last words, when it
    refuses the model, aborts, or takes too long.
    """

    def __init__(
        self,
        engine: str,
        deployment: Path,
        *,
        threads: int | None = None,
        context: int = DEFAULT_CONTEXT,
        timeout_s: float | None = None,
        all_logits: bool = False,
        batch: int = 1,
        streams: int = 1,
        places: int = 0,
        trust_library: bool = False,
        draft: str = "",
        draft_tokens: int = 0,
    ) -> None:
        super().__init__(engine, deployment)
        self.threads = threads_for(threads)
        self.context = context
        rows = max(batch, places)
        self.timeout_s = timeout_s or max(DEFAULT_TIMEOUT_S, rows * context / _LEAST_SPEED)
        rowwise = {"batch": batch, "streams": streams, "places": places}
        self.options = {"all_logits": all_logits, **rowwise}
        self.draft, self.draft_tokens = draft, draft_tokens
        self.trust_library = trust_library
        self.loaded: dict[str, Any] = {}
        self._pending = b""
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        library = Folder(self.deployment).operators(trust=self.trust_library)
        try:
            self._start()
            self.loaded = self.request(
                "load",
                folder=str(self.deployment.absolute()),
                threads=self.threads,
                context=self.context,
                library=str(library.absolute()) if library else "",
                **self.options,
                **self._draft_options(),
            )
        except BaseException:
            self.close()
            raise
        return self

    def _draft_options(self) -> dict[str, Any]:
        if not self.draft:
            return {}
        found = {"draft": self.draft, "draft_tokens": self.draft_tokens}
        if self.draft != LOOKUP:
            folder = Path(self.draft).absolute()
            library = Folder(folder).operators(trust=self.trust_library)
            found |= {
                "draft": str(folder),
                "draft_library": str(library.absolute()) if library else "",
            }
        return found

    def _start(self) -> None:
        python = python_of(self.engine.name)
        command = [str(python), "-I", str(WORKER), str(self.engine.driver), str(os.getpid())]
        # An engine that aborts, or is ended, leaves its files: they lie where we remove them.
        self._scratch = tempfile.TemporaryDirectory("-owl", ignore_cleanup_errors=True)
        environment = {"NM_DISABLE_ANALYTICS": "True", "TMPDIR": self._scratch.name}
        self._spawn(command, os.environ | environment, subprocess.PIPE)

    def close(self) -> None:
        """End the process, whatever it is doing; nothing of it is left."""
        super().close()
        if self._scratch is not None:
            self._scratch.cleanup()
            self._scratch = None

    def request(self, op: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - JSON values
        """Ask the worker for one operation (worker.py lists them) and return its answer.

        Raises `EngineFailed` when it answers with an error, dies, or exceeds the time limit; after
        the last two the process is gone.
        """
        assert self._process is not None, "use EngineProcess in a with block"
        assert self._process.stdin is not None
        line = json.dumps({"op": op, **arguments}).encode() + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._death(op) from None
        answer = self._read_answer(op)
        if not answer.pop("ok"):
            raise EngineFailed(f"{self._who()} failed in {op!r}: {answer['error']}.")
        return answer

    def _read_answer(self, op: str) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + self.timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._pending:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    self._kill()
                    raise EngineFailed(
                        f"{self._who()} did not finish {op!r} within {self.timeout_s:g} s.",
                        "It was ended. Give it more time, or a smaller model or context.",
                    )
                part = os.read(self._process.stdout.fileno(), 1 << 16)
                if not part:
                    raise self._death(op)
                self._pending += part
        line, self._pending = self._pending.split(b"\n", 1)
        return self._parsed(line, op)

    def _parsed(self, line: bytes, op: str) -> dict[str, Any]:
        """An answer; the process is ended that gave something else."""
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(line)
            if isinstance(answer, dict) and (
                answer.get("ok") is True or (answer.get("ok") is False and "error" in answer)
            ):
                return answer
        self._kill()
        raise EngineFailed(f"{self._who()} gave no answer to {op!r} that can be read.")
