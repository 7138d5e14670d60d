"""Programs that a model wrote, run apart from everything: `judge` them by tests of ours.

A program runs in Bubblewrap (`bwrap`): namespaces of its own for processes, users, network and
files, of which it sees the system's programs and libraries (/usr, /bin, /lib) and Python's,
read-only, its own processes' /proc, and one empty folder of 16 MiB in memory; with limits on time,
address space, processes and file sizes. The tests run here, in this process, and ask the program
for values over a pipe, so that nothing that it prints or returns says "passed" for them. What a
flaw of the kernel's would let through, this does not stop.
"""

import ast
import builtins
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from owl_deploy.errors import EnvironmentFailed

_SUSPECT = Path(__file__).with_name("suspect.py")
_NOBODY = 65534
_MIB = 2**20
_LONGEST_ANSWER = 2**16  # bytes: reading a literal takes many times its size, and its time
# Processor seconds; bytes; processes beside itself; open files beyond the few of the start.
LIMITS = {
    "RLIMIT_CPU": 10,
    "RLIMIT_AS": 1024 * _MIB,
    "RLIMIT_FSIZE": 16 * _MIB,
    "RLIMIT_NPROC": 0,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}
_SHOWN = ("/usr", "/lib", "/lib64", "/bin")


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed its tests, and why not, in a few words."""

    passed: bool
    why: str = ""


class _Failed(Exception):
    """The program gave no answer; its text says why."""


def require_sandbox() -> None:
    """Raise `EnvironmentFailed` where no program can be run in a sandbox."""
    if shutil.which("bwrap") is None:
        raise EnvironmentFailed(
            "A model's programs run only in Bubblewrap, and there is no `bwrap`.",
            "apt install bubblewrap",
        )
    outcome = judge("def one():\n    return 1", "def check(one):\n    assert one() == 1", "one")
    if not outcome.passed:
        raise _no_sandbox(outcome.why)


def _no_sandbox(why: str) -> EnvironmentFailed:
    return EnvironmentFailed(
        f"Bubblewrap makes no sandbox here ({_complaint() or why}).",
        "It must be version 0.8 or newer, and needs namespaces: see the sysctl "
        "kernel.unprivileged_userns_clone, or the container's settings.",
    )


def _complaint() -> str:
    """The last line that Bubblewrap writes where it makes no sandbox; "" where it says nothing."""
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run(
            [*_bubblewrap(), str(_python()), "-I", "-S", "-c", ""],
            check=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={},
            cwd="/",
            timeout=20,
        )
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        return lines[-1].strip()[:200] if done.returncode and lines else ""
    return ""


def judge(program: str, tests: str, entry_point: str, seconds: float = 20.0) -> Outcome:
    """Whether `program` passes `check(candidate)` of `tests`, where that is its `entry_point`.

    `tests` is trusted: it runs in this process. Its other names may be the program's, too, but for
    those of Python itself: an `abs` of the program's could have its tests say what it likes.
    `seconds`: for all of it together, by the wall clock. Raises `EnvironmentFailed` where there is
    no sandbox: that is no answer of the program's.
    """
    with _Program(seconds) as suspect:
        suspect.await_sandbox()
        try:
            defined = suspect.start(program)
            if entry_point not in defined:
                return Outcome(False, f"defines no {entry_point}")
            others = [name for name in defined if not hasattr(builtins, name)]
            names: dict[str, Any] = {name: suspect.function(name) for name in others}
            exec(tests, names)
            names["check"](suspect.function(entry_point))
        except _Failed as error:
            return Outcome(False, str(error))
        except AssertionError:
            return Outcome(False, "a test failed")
        except Exception as error:  # what the program raised, or tests on a value of another type
            return Outcome(False, f"raised {type(error).__name__}")
    return Outcome(True)


class _Program:
    """A program in a sandbox, which ends, with all that it started, when the block does."""

    def __init__(self, seconds: float) -> None:
        self._ends = time.monotonic() + seconds
        self._pending = b""
        self.process = subprocess.Popen(
            _command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            env={},
            cwd="/",
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _at: TracebackType | None,
    ) -> None:
        # bwrap is the parent of its namespace's first process: with it, all of them end.
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()  # type: ignore[union-attr] # both are pipes
        self.process.wait()

    def await_sandbox(self) -> None:
        """Read the line that comes before all; raises `EnvironmentFailed` where it does not."""
        try:
            self._line()
        except _Failed as error:
            raise _no_sandbox(str(error)) from error

    def start(self, program: str) -> list[str]:
        """Define what `program` defines; the names of its functions."""
        found = self._ask((program, LIMITS, _NOBODY if _is_root() else None))
        return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []

    def function(self, name: str) -> Callable[..., Any]:
        """The program's function `name`, to be called with values that have literals."""
        return lambda *arguments: self._ask((name, arguments))

    def _ask(self, question: object) -> Any:  # noqa: ANN401 - any literal
        self._send(repr(question).encode() + b"\n")
        try:
            kind, value = ast.literal_eval(self._line().decode())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise _Failed("gave no value that can be read") from error
        if not self._left():
            raise _Failed("took too long")
        if kind == "value":
            return value
        if kind == "iterator":  # two of the tests take one for the tuple that it fills
            return iter(value)
        raised = getattr(builtins, str(value), None)
        if isinstance(raised, type) and issubclass(raised, Exception):
            raise raised
        raise _Failed(f"raised {str(value)[:80]}")

    def _send(self, line: bytes) -> None:
        """Write a line, which a program that reads none would block once the pipe is full."""
        assert self.process.stdin is not None
        file = self.process.stdin.fileno()
        while line:
            if not select.select([], [file], [], self._left())[1]:
                raise _Failed("took too long")
            try:
                line = line[os.write(file, line[: select.PIPE_BUF]) :]
            except BrokenPipeError as error:
                raise _Failed("ended by itself") from error

    def _left(self) -> float:
        return max(0.0, self._ends - time.monotonic())

    def _line(self) -> bytes:
        assert self.process.stdout is not None
        file = self.process.stdout.fileno()
        while b"\n" not in self._pending:
            if not select.select([file], [], [], self._left())[0]:
                raise _Failed("took too long")
            piece = os.read(file, 2**16)
            if not piece:
                raise _Failed("ended by itself")
            self._pending += piece
            if len(self._pending) > _LONGEST_ANSWER:
                raise _Failed("answered too much")
        line, _, self._pending = self._pending.partition(b"\n")
        return line


def _is_root() -> bool:
    return os.geteuid() == 0


def _python() -> Path:
    return Path(sys.base_prefix) / "bin" / "python{}.{}".format(*sys.version_info)


def _command() -> list[str]:
    suspect = _SUSPECT.read_text(encoding="utf-8")
    return [*_bubblewrap(), str(_python()), "-I", "-S", "-c", suspect]


def _bubblewrap() -> list[str]:
    """What makes the sandbox, without what runs in it; options as of Bubblewrap 0.8."""
    bwrap = shutil.which("bwrap") or "bwrap"  # a program without an environment has no PATH
    prefix = Path(sys.base_prefix)
    # The number of root's processes has no limit: there the suspect makes itself nobody, who must
    # be able to walk to Python, be it in root's home.
    as_root = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
    user = as_root if _is_root() else ("--unshare-user", "--disable-userns")
    above = [("--perms", "0755", "--dir", str(path)) for path in reversed(prefix.parents[:-1])]
    shown = [("--ro-bind-try", path, path) for path in (*_SHOWN, str(prefix))]
    return [
        *(bwrap, "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL", *user),
        *(word for option in (*above, *shown) for word in option),
        *("--proc", "/proc", "--dev", "/dev"),
        *("--perms", "1777", "--size", str(16 * _MIB), "--tmpfs", "/tmp"),
        # These are in memory too, have no size, and belong to an ordinary user's programs.
        *("--remount-ro", "/dev", "--remount-ro", "/"),
        *("--chdir", "/tmp", "--clearenv"),
    ]
