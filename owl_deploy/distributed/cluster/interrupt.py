"""Ctrl-C while a cluster works: hours of many machines are not lost by one key."""

import contextlib
import signal
from collections.abc import Iterator

from rich.console import Console

from owl_deploy.utils.ending import on_interrupt

QUESTION = "Ctrl-C again cancels all tasks; without it they go on."


@contextlib.contextmanager
def asking_once(console: Console) -> Iterator[None]:
    """Until the block ends the first Ctrl-C only asks, on `console`; the next is as it always is.

    Where `console` is no terminal nobody could answer, and the first is as it always is; so it is
    where Ctrl-C is ignored.
    """
    if not (console.is_terminal and callable(signal.getsignal(signal.SIGINT))):
        yield
        return
    with on_interrupt(lambda: console.print(QUESTION)):
        yield
