"""Progress on stderr: one bar for each long step, with the time left."""

import contextlib
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

Advance = Callable[[float], None]


def error_console() -> Console:
    """A console on stderr, where all progress and remarks go; stdout is for results."""
    return Console(stderr=True, soft_wrap=False)


@contextlib.contextmanager
def bar(description: str, total: float) -> Iterator[Advance]:
    """Show a bar until the block ends; yield the function that moves it by some units of `total`.

    Without a terminal only the description is printed, once, with the time it took.
    """
    console = error_console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(description, total=total)
        yield lambda units: progress.advance(task, units)
        if not console.is_terminal:
            ended = "done in" if progress.finished else "stopped after"
            console.print(f"{description}: {ended} {progress.tasks[0].elapsed or 0.0:.1f} s")


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
