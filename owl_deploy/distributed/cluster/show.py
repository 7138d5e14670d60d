"""How a plan stands on a cluster: one table that changes on a terminal, else a line an end."""

import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from owl_deploy.utils.record import Record

_COLUMNS = ("running", "waiting", "done", "failed", "skipped")


class Board:
    """Shows the tasks of a plan, by their `titles`, until the block ends."""

    def __init__(self, titles: Sequence[str], console: Console) -> None:
        self._titles, self._console = titles, console
        self._live = Live(console=self._console, auto_refresh=False, transient=True)

    def __enter__(self) -> "Board":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._live.stop()

    def tell(self, record: Record) -> None:
        """Print how a task ended."""
        took = f", {record.ended - record.started:.0f} s" if record.ended else ""
        where = f" on {record.node[:8]}" if record.node else ""
        why = f": {record.said}" if record.said else ""
        line = f"{record.state:8} {record.title}{where}{took}{why}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def show(self, ended: Sequence[Record], running: Sequence[Record]) -> None:
        """Draw the table, where there is a terminal to draw it on."""
        if self._console.is_terminal:
            self._live.update(table(self._titles, ended, running), refresh=True)


def table(titles: Sequence[str], ended: Sequence[Record], running: Sequence[Record]) -> Group:
    """How many tasks of each kind (the first word of a title) stand how, and what runs where."""
    counts = {word: Counter[str]() for word in map(_kind, titles)}
    for record in (*ended, *running):
        counts[_kind(record.title)][record.state] += 1
    whole = Counter(map(_kind, titles))
    view = Table(box=None, pad_edge=False)
    for name in ("", *_COLUMNS):
        view.add_column(name, justify="right" if name else "left")
    for word, found in counts.items():
        found["waiting"] = whole[word] - found.total()
        view.add_row(word, *(str(found[name] or "") for name in _COLUMNS))
    now = time.time()
    lines = [
        escape(f"{one.title} on {one.node[:8]}, {max(0.0, now - one.started):.0f} s")
        for one in running
    ]
    return Group(view, *lines)


def _kind(title: str) -> str:
    return title.partition(" ")[0]
