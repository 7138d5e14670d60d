import io
from types import SimpleNamespace

import pytest

pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from rich.console import Console

from owl_deploy.distributed.cluster import show
from owl_deploy.distributed.cluster.show import Board, table
from owl_deploy.utils.record import Record

TITLES = ("Pruning a", "Pruning b", "Exporting a", "Exporting b", "Benchmarking 2 deployments")
ENDED = (
    Record(state="done", title="Pruning a", node="0123456789", started=10.0, ended=14.0),
    Record(state="failed", title="Pruning b", said="[why] it did"),
    Record(state="skipped", title="Exporting b", said="it needs what failed: Pruning b"),
)


def drawn(view):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    console.print(view)
    return console.file.getvalue().splitlines()


def test_the_table_counts_each_kind(monkeypatch):
    monkeypatch.setattr(show, "time", SimpleNamespace(time=lambda: 17.0))
    running = Record(state="running", title="Exporting a", node="89abcdef01", started=14.0)
    lines = drawn(table(TITLES, ENDED, [running]))
    assert [line.split() for line in lines[:4]] == [
        ["running", "waiting", "done", "failed", "skipped"],
        ["Pruning", "1", "1"],
        ["Exporting", "1", "1"],
        ["Benchmarking", "1"],
    ]
    assert lines[2].index("1") < lines[2].rindex("1")
    assert lines[0].index("waiting") <= lines[3].index("1") <= lines[0].index("done")
    assert lines[4] == "Exporting a on 89abcdef, 3 s"


def test_each_end_is_a_line_where_there_is_no_terminal():
    console = Console(file=io.StringIO(), width=80)
    with Board(TITLES, console) as board:
        for record in ENDED:
            board.tell(record)
        board.show(ENDED, [])
    assert console.file.getvalue().splitlines() == [
        "done     Pruning a on 01234567, 4 s",
        "failed   Pruning b: [why] it did",
        "skipped  Exporting b: it needs what failed: Pruning b",
    ]
