"""Ctrl-C while a cluster works: hours of many machines are not lost by one key."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from rich.console import Console

QUESTION = "Ctrl-C again cancels all tasks; without it they go on."


@contextlib.contextmanager
def asking_once(console: Console) -> Iterator[None]:
    """Until the block ends the first Ctrl-C only asks, on `console`; the next is as it always is.

    Where `console` is no terminal nobody could answer, and the first is as it always is.
    """
    usual = signal.getsignal(signal.SIGINT)
    here = threading.current_thread() is threading.main_thread()
    if not (console.is_terminal and here and callable(usual)):
        yield
        return

    def ask(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, usual)
        console.print(QUESTION)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
