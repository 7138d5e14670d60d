"""How `owl` ends: an exit code, and at most one sentence on stderr.

0 done, 1 a failed check, 2 bad input, 3 not decided, 4 an engine or the environment failed; 130
after Ctrl-C, and 143 after SIGTERM, which is taken as Ctrl-C is. 141, without a word, when the
reader of stdout has gone: what a shell reports of a program that SIGPIPE ended. 70 (sysexits.h:
EX_SOFTWARE) for what owl did not foresee, a defect.
"""

import contextlib
import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, TextIO, cast

import typer

from owl_deploy.errors import (
    BadInput,
    EnvironmentFailed,
    OwlError,
    first_line,
    is_full_disk,
    is_out_of_memory,
    not_installed,
    printable,
    with_type,
)
from owl_deploy.utils import interrupted
from owl_deploy.utils.ranks import one_voice

READER_GONE = 141
TERMINATED = 143
# What a system says for itself; other errors of it are a program's.
_OF_THE_SYSTEM = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE)


class Defect(OwlError):
    """What owl did not foresee: exit code 70."""

    exit_code = 70


class Interrupted(OwlError):
    """Ctrl-C ended it: exit code 130. `left`: what there is to go on with, if anything."""

    exit_code = interrupted.EXIT_CODE

    def __init__(self, left: str = "") -> None:
        super().__init__(interrupted.sentence(left))


class _Stream:
    """stdout or stderr, which may not take what is printed: then `_fail` decides."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401 - a text stream, or a test's
        self._stream = stream

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except OSError as error:
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        raise NotImplementedError

    def _drop(self) -> None:
        """Send what is left of it nowhere: Python would try again at its end, and complain."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


class _Stdout(_Stream):
    """stdout, which remembers why it does not take what is printed."""

    def __init__(self, stream: Any) -> None:  # noqa: ANN401
        super().__init__(stream)
        self.lost: OSError | None = None
        if hasattr(stream, "reconfigure"):  # names of files need not be text: escaped, as on stderr
            stream.reconfigure(errors="backslashreplace")

    def _fail(self, error: OSError) -> None:
        self.lost = error
        raise error

    def close(self) -> None:
        """Write what is left, for Python would do it last, and complain in its own way."""
        with contextlib.suppress(OSError):
            self.flush()
        if self.lost is not None:
            self._drop()


class _Stderr(_Stream):
    """stderr, which may be lost, as a terminal is that was closed: that costs what would be said
    there, and not the work, the result or its exit code.
    """

    def _fail(self, error: OSError) -> None:
        self._drop()


def exit_code(app: Callable[[], object]) -> int:
    """Run the command line `app`; say what it ends with, and return the exit code."""
    if sys.stdout is None:  # the next file that is opened would be where libraries print to
        return _say(EnvironmentFailed("stdout is closed.", "Send it to /dev/null or a file."))
    stdout = _Stdout(sys.stdout)
    stderr = sys.stderr and cast(TextIO, _Stderr(sys.stderr))
    with (
        contextlib.redirect_stdout(cast(TextIO, stdout)),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            code = _run(app, stdout)
        finally:
            stdout.close()
    return code if stdout.lost is None else _without_stdout(stdout.lost)


def _run(app: Callable[[], object], stdout: _Stdout) -> int:
    with _sigterm_as_interrupt() as came:
        try:
            with _noting_interrupts():
                code = _ended(app, stdout)
        except KeyboardInterrupt as error:
            code = _say(Interrupted(str(error)))
    return TERMINATED if came and code == Interrupted.exit_code else code


def _ended(app: Callable[[], object], stdout: _Stdout) -> int:
    try:
        app()
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except Exception as error:
        return 0 if error is stdout.lost else _say(explained(error))
    return 0


def _say(error: OwlError) -> int:
    echo(str(error))
    return error.exit_code


def echo(sentence: str) -> None:
    """Say why owl ends, on stderr; of several processes one does."""
    with one_voice() as speaks:
        if speaks:
            typer.echo(f"owl: {printable(sentence)}", err=True)


def _without_stdout(lost: OSError) -> int:
    if lost.errno == errno.EPIPE:
        return READER_GONE
    return _say(
        EnvironmentFailed(
            f"stdout cannot be written ({lost.strerror}).",
            "What was to be printed is lost; finished outputs are untouched.",
        )
    )


def explained(error: Exception) -> OwlError:
    """What stopped a command, as the error that says it, where it does not so itself.

    Raises `KeyboardInterrupt` where Ctrl-C came before: it is what stopped it.
    """
    if isinstance(error, OwlError):
        return error
    if os.environ.get("OWL_DEBUG"):
        traceback.print_exception(error)
    if _interrupts:
        raise KeyboardInterrupt from error
    if missing := not_installed(error):
        return missing
    if is_out_of_memory(error):
        return EnvironmentFailed("There is not enough memory.", "Free some, and run again.")
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return BadInput("What was given is too long for the name of a file.", "Give a path.")
    if is_full_disk(error) or (isinstance(error, OSError) and error.errno in _OF_THE_SYSTEM):
        return EnvironmentFailed(f"The system refused: {first_line(error)}.")
    return Defect(
        f"{with_type(error)}.",
        "This is a defect of owl: please report it, with what OWL_DEBUG=1 prints.",
    )


_interrupts: list[bool] = []  # one for each Ctrl-C that raised `KeyboardInterrupt`


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[None]:
    """Until the block ends remember that Ctrl-C came.

    A library that is being imported may catch its `KeyboardInterrupt`, and go on half made until it
    raises something else. Where Ctrl-C is ignored, or whoever called has a use for it, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return

    def note() -> None:
        _interrupts.append(True)
        raise KeyboardInterrupt

    try:
        with on_interrupt(note, once=False):
            yield
    finally:
        _interrupts.clear()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[list[bool]]:
    """Until the block ends SIGTERM does what Ctrl-C would: what is temporary goes, too.

    Containers, schedulers and `kill` end a program by it. What is given holds something once it
    came. Where it has a handler it keeps that one.
    """
    came: list[bool] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield came
        return

    def interrupt(_signal: int, frame: FrameType | None) -> None:
        came.append(True)
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell's background job ignores Ctrl-C
            raise KeyboardInterrupt
        handler(signal.SIGINT, frame)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object], *, once: bool = True) -> Iterator[None]:
    """Until the block ends Ctrl-C calls `act`; with `once` the first does, and the next is as ever.

    Outside the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        if once:
            signal.signal(signal.SIGINT, before)
        act()

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
