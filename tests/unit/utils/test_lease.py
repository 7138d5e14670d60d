import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from owl_deploy.utils import lock as leases
from owl_deploy.utils.lock import STALE_S, Held, holds, lease, outlast

HOLDER = """
import sys, pathlib
from owl_deploy.utils.lock import lease
with lease(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".out.owl-lock"


def holder(path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=-1, stdout=-1, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def left(path):
    return sorted(one.name for one in path.parent.iterdir())


def elsewhere(path, age_s):
    """A lease of another machine, whose holder was last heard of `age_s` ago."""
    content = leases._me() | {"host": "node-7", "of": ["another boot", "pid:[1]"]}
    path.write_text(json.dumps(content))
    os.utime(path, (time.time() - age_s,) * 2)


def test_one_at_a_time(path):
    with lease(path):
        assert holds(path)
        with pytest.raises(Held), lease(path):
            pass
        assert holds(path)
    assert not holds(path)
    assert left(path) == []


def test_a_killed_process_of_this_machine_hinders_nobody(path):
    with holder(path) as process:
        with pytest.raises(Held), lease(path):
            pass
        assert not holds(path)
        process.kill()
    with lease(path):
        assert left(path) == [path.name]
    assert left(path) == []


def test_a_process_that_stands_still_is_no_dead_one(path):
    with holder(path) as process:
        process.send_signal(signal.SIGSTOP)
        os.utime(path, (0, 0))
        with pytest.raises(Held), lease(path):
            pass
        process.kill()


def test_another_process_of_the_same_number(path):
    """After a reboot, or a while: the number is taken again, the process began at another time."""
    path.write_text(json.dumps(leases._me() | {"started": 1.0}))
    with lease(path):
        assert holds(path)


@pytest.mark.parametrize("age", [0.0, STALE_S - 20])
def test_another_machine_that_was_heard_of(path, age):
    elsewhere(path, age)
    with pytest.raises(Held), lease(path):
        pass
    assert left(path) == [path.name]


def test_another_machine_that_was_not_heard_of_for_long(path):
    elsewhere(path, STALE_S + 20)
    with lease(path):
        assert holds(path)
    assert left(path) == []


def test_a_lease_of_a_time_to_come_is_void_if_nobody_touches_it(path, monkeypatch):
    """A clock was set back, or a stranger left it: its age would never come."""
    monkeypatch.setattr(leases, "BEAT_S", 0.2)
    elsewhere(path, -3600)
    with lease(path):
        assert holds(path)
    elsewhere(path, -3600)
    meanwhile = SimpleNamespace(time=time.time, sleep=lambda _: elsewhere(path, -3601))
    monkeypatch.setattr(leases, "time", meanwhile)
    with pytest.raises(Held), lease(path):
        pass


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "STALE_S", 2.0)


def test_another_machine_that_shows_no_life_is_outlasted(path, quick):
    told, began = [], time.monotonic()
    elsewhere(path, 0)
    outlast(path, told.append)
    assert time.monotonic() - began > 1.5
    assert told == ["node-7"]
    with lease(path):
        assert holds(path)


def test_another_machine_that_shows_life_is_not(path):
    elsewhere(path, 1)
    with pytest.raises(Held):
        outlast(path, lambda _: os.utime(path))  # when it has said whom it watches
    assert left(path) == [path.name]


def test_a_lease_that_is_given_back_need_not_get_old(path, quick, monkeypatch):
    monkeypatch.setattr(leases, "STALE_S", STALE_S)
    elsewhere(path, 0)
    threading.Timer(0.2, path.unlink).start()
    outlast(path, lambda _: None)
    assert left(path) == []


def test_nobody_is_watched_who_can_be_asked(path):
    told = []
    outlast(path, told.append)  # there is no lease
    elsewhere(path, STALE_S + 20)
    outlast(path, told.append)
    path.unlink()
    with holder(path) as process:
        with pytest.raises(Held):
            outlast(path, told.append)
        process.kill()
    outlast(path, told.append)
    assert told == []


def test_a_file_that_says_nothing_is_judged_by_its_age(path):
    """One that is being written, or the lock of an earlier version."""
    path.touch()
    with pytest.raises(Held), lease(path):
        pass
    os.utime(path, (0, 0))
    with lease(path):
        pass


def test_the_holder_is_heard_of_again_and_again(path, monkeypatch):
    monkeypatch.setattr(leases, "BEAT_S", 0.02)
    with lease(path):
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_who_waits_gets_it_next(path):
    with holder(path) as process:
        threading.Timer(0.5, process.kill).start()
        with lease(path, wait=True):
            assert process.wait() == -signal.SIGKILL


class Contest:
    """Eight threads that all want it at once; `most`: how many had it at a time."""

    def __init__(self, path):
        self.path, self.inside, self.most = path, [], 0
        self.start = threading.Barrier(8)
        threads = [threading.Thread(target=self.contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def contend(self):
        self.start.wait()
        with lease(self.path, wait=True):
            self.inside.append(1)
            self.most = max(self.most, len(self.inside))
            time.sleep(0.001)
            self.inside.pop()


def test_of_many_that_find_it_void_one_gets_it(path, monkeypatch):
    monkeypatch.setattr(leases, "_RETRY_S", 0.002)
    for _ in range(10):
        elsewhere(path, STALE_S + 20)
        assert Contest(path).most == 1
        assert left(path) == []


def test_a_clock_that_is_set_takes_nothing_from_a_process_that_lives(path, monkeypatch):
    """What psutil knows of a start moves with the clock; boot_time is what moves."""
    psutil = leases.psutil
    with holder(path) as process:
        boot = psutil.boot_time()
        for place in (psutil, psutil._psplatform):
            monkeypatch.setattr(place, "boot_time", lambda: boot + 5)
        with pytest.raises(Held), lease(path):
            pass
        process.kill()
        process.wait()
        with lease(path):
            pass


def test_a_process_that_is_hidden_from_us_may_live(path, monkeypatch):
    """As another user's where /proc is mounted with hidepid=2: no such number is seen."""
    path.write_text(json.dumps(leases._me() | {"user": 12345, "process": 2**22 + 1}))
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(Held), lease(path):
        pass
    os.utime(path, (time.time() - STALE_S - 20,) * 2)
    with lease(path):
        assert holds(path)


def test_one_that_was_killed_while_it_cleared_hinders_nobody_for_long(path):
    elsewhere(path, STALE_S + 20)
    guard = path.with_name(f"{path.name}-clearing")
    guard.touch()
    with pytest.raises(Held), lease(path):
        pass
    os.utime(guard, (time.time() - STALE_S - 20,) * 2)
    with lease(path):
        assert holds(path)
    assert left(path) == []


def test_a_lease_that_cannot_be_written_is_none(path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(leases.json, "dump", full)
    with pytest.raises(OSError, match="No space"), lease(path):
        pass
    assert left(path) == []
