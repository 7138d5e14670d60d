"""The arithmetic behind docs/scaling.md on a case by hand, and the page's tables from its data."""

import json
from pathlib import Path

import pytest

from benchmarks import scaling
from benchmarks.scaling import A100, OPT_175B, Machine, Shape, memory, reckon

# Inputs and outputs: q 4 x 4, k and v 4 x 2, o 4 x 4, gate and up 4 x 8, down 8 x 4: 144 weights.
SHAPE = Shape(layers=2, width=4, inner=8, kv=2)
MACHINE = Machine(
    forward=1e3, single=1e2, solve=1e1, column=0.5, near=64, far=32, a_node=2, disk=16, itemsize=2
)
# SparseGPT, FLOP: 2/3 of 4^3 = 42.67 and of 8^3 = 341.33, and outputs x inputs^2.
QKV, OUT, GATE_UP, DOWN = 42.67 + 8 * 16, 42.67 + 4 * 16, 42.67 + 16 * 16, 341.33 + 4 * 64


def test_one_rank_by_hand() -> None:
    found = reckon(SHAPE, MACHINE, 1, tokens=10, length=5)
    assert found == pytest.approx(
        {
            "read": 2 * 2 * 2 * 144 / 16,  # layers, passes but the last, bytes
            "forward": 2 * 3 * (2 * 144 * 10 + 2 * 10 * 5 * 4) / 1e3,
            "statistics": 2 * 10 * (3 * 16 + 64) / 1e2,
            "solve": 2 * ((QKV + OUT + GATE_UP + DOWN) / 10 + (12 + 4 + 8 + 8) * 0.5),
            "talk": 0,
            "write": 2 * 2 * 144 / 16,
        },
        rel=1e-4,
    )


def test_more_ranks_divide_the_text_and_the_linears_but_the_largest() -> None:
    one = reckon(SHAPE, MACHINE, 1, tokens=10, length=5)
    two = reckon(SHAPE, MACHINE, 2, tokens=10, length=5)
    assert two["forward"] == one["forward"] / 2
    assert two["statistics"] == one["statistics"] / 2
    assert (two["read"], two["write"]) == (one["read"], one["write"])
    # q, k, v and o are one rank's, gate, up and down the other's (compression/partition.py).
    assert two["solve"] == pytest.approx(2 * ((GATE_UP + DOWN) / 10 + 16 * 0.5), rel=1e-4)
    assert two["talk"] == 2 * (4 * 112 + 2 * 144) / 64
    four = reckon(SHAPE, MACHINE, 4, tokens=10, length=5)
    assert four["talk"] == 2 * two["talk"]  # from node to node
    assert four["solve"] == pytest.approx(2 * (DOWN / 10 + 8 * 0.5), rel=1e-4)
    assert reckon(SHAPE, MACHINE, 64)["solve"] == four["solve"]


def test_memory_by_hand() -> None:
    assert memory(SHAPE, MACHINE, 2, tokens=10) == {
        "block": 2 * 144,
        "statistics": 4 * 112,
        "factor": 3 * 4 * 64,
        "hidden": 5 * 4 * 2,
    }


def test_the_papers_own_run_comes_out() -> None:
    """SparseGPT's authors say "under 4.5 hours" of OPT-175B on one A100 (arXiv 2301.00774)."""
    found = reckon(OPT_175B, A100, 1, passes=2)
    assert 2 < sum(found.values()) / 3600 < 4.5


def test_the_page_has_the_tables_of_its_data() -> None:
    result = json.loads(Path("benchmarks/results/scaling.json").read_text())
    page = Path("docs/scaling.md").read_text()
    for table in scaling.tables(result):
        assert table in page
