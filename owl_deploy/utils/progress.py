"""Progress on stderr: one bar for each long step, with the time left."""

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from owl_deploy.utils.ranks import leads

Advance = Callable[[float], None]
LOG_EVERY_S = 30.0  # where there is no terminal to draw a bar on


def result_console(width: int | None = None) -> Console:
    """A console on stdout, `width` columns wide, or as the terminal is.

    All is plain text: a path may hold brackets, and the numbers of a table have one colour.
    """
    if width is None and os.environ.get("COLUMNS") == "0":  # rich would print nothing
        width = shutil.get_terminal_size().columns
    return Console(width=width, highlight=False, markup=False)


def error_console() -> Console:
    """A console on stderr, where all progress and remarks go; stdout is for results.

    Of the processes of one run, one speaks. All is plain text.
    """
    return Console(stderr=True, soft_wrap=False, markup=False, quiet=not leads())


def _nothing() -> str:
    return ""


@contextlib.contextmanager
def bar(description: str, total: float, note: Callable[[], str] = _nothing) -> Iterator[Advance]:
    """Show a bar until the block ends; yield the function that moves it by some units of `total`.

    `note` is asked for what stands behind the time left, a speed perhaps.

    Without a terminal a line is printed every half minute, with what is done and the time left,
    and one at the end with the time it took.
    """
    console = error_console()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("and"),
        TimeRemainingColumn(),
        TextColumn("left"),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total, note="")
        if console.is_terminal:
            yield lambda units: progress.update(task, advance=units, note=note())
            return
        yield _log_lines(progress, console, note)
        done = progress.tasks[0]
        # Shares of a time add up to the whole but for what floating point loses.
        is_whole = math.isclose(done.completed, total)
        ended = "done in" if is_whole or progress.finished else "stopped after"
        console.print(f"{description}: {ended} {done.elapsed or 0.0:.1f} s")


def _log_lines(progress: Progress, console: Console, note: Callable[[], str]) -> Advance:
    """Move the one task of `progress`, and tell of it in lines of a log."""
    told = time.monotonic()

    def advance(units: float) -> None:
        nonlocal told
        task = progress.tasks[0]
        progress.advance(task.id, units)
        if progress.finished or not task.completed or time.monotonic() - told < LOG_EVERY_S:
            return
        told = time.monotonic()
        said = note()
        done, total, elapsed = task.completed, task.total or 0.0, task.elapsed or 0.0
        console.print(
            f"{task.description}: {done:g} of {total:g}, {elapsed:.0f} s, "
            f"{elapsed * (total - done) / done:.0f} s left" + (f", {said}" if said else ""),
            highlight=False,
        )

    return advance


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the terminal: ours go there."""
    import transformers

    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
