import time
from types import SimpleNamespace

import pytest

from owl_deploy.bench import machine
from owl_deploy.bench.machine import busy_cores, read_bandwidth


def test_the_machine_is_described() -> None:
    here = machine.look()
    assert here.cpu
    assert here.physical_cores <= here.logical_cores
    assert here.memory_bytes > 1e9
    assert here.name.startswith(here.cpu)
    assert 0 <= busy_cores(0.1) <= here.logical_cores + 1


def test_memory_is_read_at_a_believable_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    # By the time that this process has the processor, which others take none of.
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=time.process_time))
    assert 0.2 < read_bandwidth(1, size_bytes=1 << 24, repeats=2) < 2000
