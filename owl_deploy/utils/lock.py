"""Who may write an output, on a file system that several machines may share.

A lease is a file that is made where there is none: no file system lets two do that. It names its
holder, who touches it every `BEAT_S` seconds. It is void when its holder is known to be gone (a
process of this machine) or has not touched it for `STALE_S`, by the file system's own clock.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

BEAT_S, STALE_S = 10.0, 60.0
_RETRY_S = 0.1


class Held(Exception):
    """Another run has the lease."""


@contextlib.contextmanager
def lease(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lease `path`; where another does, raise `Held`, or with `wait` wait for it.

    A holder that stood still for longer than `STALE_S` may lose it to another machine: see `holds`.
    Raises `OSError` where the file cannot be made.
    """
    mine = _me()
    while not _take(path, mine):
        if not wait:
            raise Held
        time.sleep(_RETRY_S)
    done = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, done), daemon=True)
    heart.start()
    try:
        yield
    finally:
        done.set()
        heart.join()
        if _read(path) == mine:
            path.unlink(missing_ok=True)


def outlast(path: Path, tell: Callable[[str], object]) -> None:
    """Wait until the lease `path` is void, as long as its holder shows no life.

    One of another machine cannot be asked: it is watched, until it touches the lease or that is
    `STALE_S` old. `tell` is called first, with its host. Raises `Held` for a holder that lives.
    """
    found, before = _read(path), _touched(path)
    if before is None or _is_void(path):
        return
    if _is_known(found):
        raise Held
    tell(str(found.get("host", "another machine")))
    while (now := _touched(path)) is not None and not _is_void(path):
        if now != before:
            raise Held
        time.sleep(BEAT_S / 10)


def holds(path: Path) -> bool:
    """Whether this process holds the lease `path`, still."""
    found = _read(path)
    return found.get("process") == os.getpid() and found.get("of") == _here()["of"]


def _me() -> dict[str, Any]:
    return {
        **_here(),
        "process": os.getpid(),
        "started": _started(os.getpid()),
        "user": os.getuid(),
        "time": time.time(),
        "token": secrets.token_hex(8),
    }


def _here() -> dict[str, Any]:
    """What tells which processes a process number is one of: machine, boot, container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return {
            "host": socket.gethostname(),
            "of": [boot, str(Path("/proc/self/ns/pid").readlink())],
        }
    return {"host": socket.gethostname(), "of": [psutil.boot_time()]}


def _take(path: Path, mine: dict[str, Any]) -> bool:
    """Make the lease; False if another holds it. One that is void is cleared first."""
    try:
        made = path.open("x", encoding="utf-8")
    except FileExistsError:
        return _clear(path) and _take(path, mine)
    try:
        with made as file:
            json.dump(mine, file)
    except OSError:  # of a full disk: a lease that says nothing holds others up
        path.unlink(missing_ok=True)
        raise
    return True


def _clear(path: Path) -> bool:
    """Remove the lease if it is void; False if it is not, or another is at it."""
    if not _is_void(path):
        return False
    # Who found it void a while ago may meet a new one: only one clears at a time, and looks again.
    guard = path.with_name(f"{path.name}-clearing")
    try:
        guard.touch(exist_ok=False)
    except FileExistsError:
        if _age_s(guard) <= STALE_S:
            return False
        guard.unlink(missing_ok=True)  # of one that was killed
        return _clear(path)
    try:
        if _is_void(path):
            path.unlink(missing_ok=True)
    finally:
        guard.unlink(missing_ok=True)
    return True


def _is_void(path: Path) -> bool:
    found = _read(path)
    if _is_known(found):
        return not _lives(found)
    age_s = _age_s(path)
    return age_s > STALE_S or (age_s < -1 and _stands_still(path))


def _is_known(found: dict[str, Any]) -> bool:
    """Whether it can be told if a lease's holder lives: a process of this machine, of the same boot
    and container, and seen from here.

    A lease that says nothing is nobody's. Other users' processes may be hidden (proc(5), hidepid):
    one that is not seen need not be gone.
    """
    here = _here()
    if {name: found.get(name) for name in here} != here:
        return False
    mine = os.getuid() in (0, found.get("user"))
    return mine or Path(f"/proc/{found.get('process')}").exists()


def _stands_still(path: Path) -> bool:
    """Whether nobody touches a file that is of a time to come, for a clock was set back, say."""
    before = _touched(path)
    time.sleep(2 * BEAT_S)
    return before is not None and _touched(path) == before


def _touched(path: Path) -> int | None:
    """When a lease was touched last, in nanoseconds; None where it was given back.

    It is opened for that: NFS may remember what it knows of a file, and asks for one that is.
    """
    with contextlib.suppress(OSError), path.open("rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return None


def _age_s(path: Path) -> float:
    """The seconds since a file was touched, by the clock of its own file system."""
    probe = path.with_name(f"{path.name}-{secrets.token_hex(4)}")
    try:
        probe.touch(exist_ok=False)
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:  # given back meanwhile
        return 0.0
    finally:
        probe.unlink(missing_ok=True)


def _lives(found: dict[str, Any]) -> bool:
    try:
        number = int(found["process"])
        alive = psutil.Process(number).status() != psutil.STATUS_ZOMBIE
        return alive and abs(_started(number) - float(found["started"])) < 1
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, KeyError, TypeError):
        return False


def _started(process: int) -> float:
    """When a process began: in ticks since boot where Linux tells, which no clock that is set
    moves, as it does the seconds that others have."""
    try:
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return psutil.Process(process).create_time()
    return float(told.rpartition(")")[2].split()[19])  # proc_pid_stat(5): field 22


def _beat(path: Path, mine: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT_S):
        with contextlib.suppress(OSError):
            if _read(path) == mine:
                os.utime(path)


def _read(path: Path) -> dict[str, Any]:
    """What a lease says; empty where there is none, or one that is being written."""
    with contextlib.suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}
