"""The table of `owl engines ls`, as wide as the terminal (or COLUMNS), else 80 columns."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(engines: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print what `list_engines` gives."""
    table = Table(box=None, pad_edge=False)
    for column in ("engine", "installed", "opens", "licence"):
        table.add_column(column, overflow="fold")
    for engine in engines:
        how = f": owl engines install {engine['name']}" if engine["environment"] else ""
        installed = engine["version"] or f"no{how}"
        table.add_row(engine["name"], installed, ", ".join(engine["opens"]), engine["licence"])
    console = console or Console(highlight=False)
    console.print(table)
    owl = next(engine for engine in engines if engine["name"] == "owl")
    if owl["library"] is None:
        console.print(
            "Nothing can be exported to owl: `owl engines path owl` says what is missing."
        )
    elif owl["kernels"] is not None:
        console.print(f"The kernels of owl on this processor: {owl['kernels']}.")
