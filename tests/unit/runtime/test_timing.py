"""Weights that are timed lie in memory as the operators hold them."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from owl_deploy.runtime import timing

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kilobytes(address: int) -> int:
    """Of the mapping that holds `address`: what lies in huge pages."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        bounds = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if bounds:
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin <= address < end
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError("no mapping holds it")


def test_they_lie_in_huge_pages() -> None:
    if not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this system gives no huge pages")
    memory = timing.huge_memory(32 << 20)
    memory[:] = 1
    assert huge_kilobytes(memory.ctypes.data + memory.size // 2) > 0


def test_a_system_without_them_gives_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(timing.mmap, "mmap", Old)
    memory = timing.huge_memory(1 << 20)
    memory[:] = 1
    assert int(memory.sum(dtype=np.int64)) == 1 << 20
