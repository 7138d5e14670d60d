"""Weights that are timed lie in memory as the operators hold them."""

import mmap
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from owl_deploy.runtime import pack, timing
from owl_deploy.runtime.value_types import Values
from tests.unit.runtime.conftest import FEW_THREADS, Kernels

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


WITHOUT_EXPANSION = ("avx2", "avxvnni", "avx512f")  # they take longer over sparse int4 or int3


def half_of(weight: np.ndarray) -> np.ndarray:
    return np.where(np.arange(weight.size).reshape(weight.shape) % 2, weight, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the set of processors")
def test_what_a_session_lays_dense(kernels: Kernels) -> None:
    weight = np.random.default_rng(0).standard_normal((64, 256), dtype=np.float32)
    few = len(os.sched_getaffinity(0)) <= FEW_THREADS
    for isa in kernels.isas():
        for values in ("int4", "int3"):
            half = pack.pack(half_of(weight), values)
            assert timing.lies_dense(kernels, isa, half) == (few and isa in WITHOUT_EXPANSION)
        for other in (
            pack.pack(weight, "int4", sparse=False),
            pack.pack(weight, "int3", sparse=False),
            pack.pack(half_of(weight), "int8"),
            pack.pack(np.where(weight > 2, weight, 0), "int4"),  # nearly all zero
        ):
            assert not timing.lies_dense(kernels, isa, other)


@pytest.mark.parametrize("values", ["int4", "int3"])
@pytest.mark.parametrize("dense", [False, True])
def test_it_is_timed_as_it_lies(
    kernels: Kernels, values: Values, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def time_matmul(library, isa, blocks, *_, **__):
        timed.extend(blocks)
        return [1.0]

    monkeypatch.setattr(timing, "time_matmul", time_matmul)
    monkeypatch.setattr(timing, "lies_dense", lambda *_: dense)
    monkeypatch.setattr(timing, "_FILL", 1)
    timing.from_memory(kernels, (64, 256), values, 0.5, scale_columns=32, threads=1)
    found = [(one.sparse, one.values) for one in map(pack.inspect, timed)]
    assert found == [(False, "int4") if dense else (True, values)]
