"""The table of `owl engines ls`, as wide as the terminal (or COLUMNS), else 80 columns."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from owl_deploy.inference.registry import get_engine
from owl_deploy.utils.progress import result_console


def show(engines: Sequence[dict[str, Any]], console: Console | None = None) -> None:
    """Print what `list_engines` gives."""
    table = Table(box=None, pad_edge=False)
    for column in ("engine", "installed", "opens", "licence"):
        table.add_column(column, overflow="fold")
    for engine in engines:
        how = f": owl engines install {engine['name']}" if engine["environment"] else ""
        installed = engine["version"] or f"no{how}"
        table.add_row(engine["name"], installed, ", ".join(engine["opens"]), engine["licence"])
    console = console or result_console()
    console.print(table)
    for engine in filter(lambda engine: get_engine(engine["name"]).operators, engines):
        name = engine["name"]
        if engine["library"] is None:
            missing = f"`owl engines path {name}` says what is missing"
            console.print(f"Nothing can be exported to {name}: {missing}.")
        elif engine["kernels"] is not None:
            console.print(f"The kernels of {name} on this processor: {engine['kernels']}.")
