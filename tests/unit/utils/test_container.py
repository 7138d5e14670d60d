import contextlib
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from owl_deploy.inference import default_threads, process
from owl_deploy.utils import container
from owl_deploy.utils.hardware import on_threads

GIB = 2**30
STAT = "anon 1\nfile 2\ninactive_file {0}\ntotal_inactive_file {0}\n"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Makes the control groups of this process: of each its folder, and what its files say."""

    def made(own: str, folders: dict[str, dict[str, object]]) -> None:
        for folder, files in folders.items():
            (tmp_path / "cgroup" / folder).mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                (tmp_path / "cgroup" / folder / name).write_text(f"{content}\n")
        (tmp_path / "own").write_text(own)
        monkeypatch.setattr(container, "_MOUNTED", tmp_path / "cgroup")
        monkeypatch.setattr(container, "_OWN", tmp_path / "own")

    return made


def limited(most: object, taken: int, files: int = 0) -> dict[str, object]:
    return {"memory.max": most, "memory.current": taken, "memory.stat": STAT.format(files)}


def test_the_narrowest_of_the_groups_counts(groups):
    groups(
        "0::/service/unit\n",
        {
            "": {},
            "service": limited(6 * GIB, 5 * GIB, GIB) | {"cpu.max": "150000 100000"},
            "service/unit": limited(4 * GIB, GIB) | {"cpu.max": "max 100000"},
        },
    )
    assert container.free_memory() == 2 * GIB
    assert container.processors() == 1.5


def test_a_container_sees_its_own_group_as_the_top(groups):
    top = limited(3 * GIB, 4 * GIB) | {"cpu.max": "200000 100000"}
    groups("0::/../outside\n", {"": top})
    assert container.free_memory() == 0
    assert container.processors() == 2


def test_a_group_that_does_not_say_which_pages_are_files(groups):
    groups("0::/\n", {"": limited(3 * GIB, GIB) | {"memory.stat": "anon 1\n"}})
    assert container.free_memory() == 2 * GIB


def test_groups_of_the_first_version(groups):
    groups(
        "4:memory:/docker/a\n2:cpu,cpuacct:/docker/a\n1:name=systemd:/\n",
        {
            "memory/docker/a": {
                "memory.limit_in_bytes": 2 * GIB,
                "memory.usage_in_bytes": GIB,
                "memory.stat": STAT.format(GIB // 2),
            },
            "memory": {"memory.limit_in_bytes": 2**63 - 4096, "memory.usage_in_bytes": 5 * GIB},
            "cpu/docker/a": {"cpu.cfs_quota_us": 250_000, "cpu.cfs_period_us": 100_000},
            "cpu": {"cpu.cfs_quota_us": -1, "cpu.cfs_period_us": 100_000},
        },
    )
    assert container.free_memory() == 1.5 * GIB
    assert container.processors() == 2.5


@pytest.mark.parametrize("own", ["", "0::/\n", None])
def test_where_nothing_limits(groups, monkeypatch, tmp_path, own):
    groups(own or "", {"": {"memory.max": "max", "memory.current": 5, "cpu.max": "max 100000"}})
    if own is None:
        monkeypatch.setattr(container, "_OWN", tmp_path / "no-such-file")
    assert container.free_memory() == container.processors() == math.inf


def test_threads_are_as_many_as_the_quota_keeps_busy(monkeypatch):
    everything = default_threads()
    for quota, threads in ((0.4, 1), (1.0, 1), (everything + 7.5, everything)):
        monkeypatch.setattr(container, "processors", lambda quota=quota: quota)
        assert default_threads() == threads
    monkeypatch.setattr(container, "processors", lambda: 0.4)
    with on_threads(None):
        assert torch.get_num_threads() == 1
    with on_threads(2):  # as the run did that is gone on with
        assert torch.get_num_threads() == 2


def test_of_siblings_in_a_set_of_processors_one_counts(monkeypatch, tmp_path):
    for number, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{number}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    monkeypatch.setattr(process, "_TOPOLOGY", tmp_path)
    monkeypatch.setattr(container, "processors", lambda: math.inf)
    for allowed, cores in (({0, 1, 2, 3}, 2), ({0, 2}, 1), ({1, 2}, 2), ({0, 1, 3}, 2)):
        monkeypatch.setattr(process.os, "sched_getaffinity", lambda _, allowed=allowed: allowed)
        assert default_threads() == cores
    monkeypatch.setattr(process, "_TOPOLOGY", tmp_path / "none")
    monkeypatch.setattr(process.psutil, "cpu_count", lambda logical: 2)
    assert default_threads() == 2


def test_the_kernels_own_groups():
    """In a group that is made for it, of either version."""
    parents = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")]
    group = next((one / f"owl-test-{os.getpid()}" for one in parents if limits_memory(one)), None)
    if group is None:
        pytest.skip("no control group can be made here")
    code = (
        "import os, pathlib, sys\n"
        "group = pathlib.Path(sys.argv[1])\n"
        "(group / 'cgroup.procs').write_text(str(os.getpid()))\n"
        "from owl_deploy.utils import container\n"
        "print(container.free_memory())"
    )
    group.mkdir()
    try:
        limit = next(
            file
            for name in ("memory.max", "memory.limit_in_bytes")
            for file in [group / name]
            if file.exists()
        )
        limit.write_text(str(GIB))
        run = subprocess.run(
            [sys.executable, "-c", code, str(group)], stdout=-1, text=True, check=True
        )
        assert 0.5 * GIB < float(run.stdout) <= GIB
    finally:
        group.rmdir()


def limits_memory(parent: Path) -> bool:
    """Whether a group can be made in `parent` whose memory may be limited."""
    group = parent / f"owl-probe-{os.getpid()}"
    with contextlib.suppress(OSError):
        group.mkdir()
        found = any((group / name).exists() for name in ("memory.max", "memory.limit_in_bytes"))
        group.rmdir()
        return found
    return False
