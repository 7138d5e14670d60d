"""What control groups leave a container, a pod or a service of its host's memory and processors.

Both versions of them (kernel documentation, cgroup-v2 and cgroup-v1). Neither psutil nor torch nor
ONNX Runtime looks there: they see the host's.
"""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

_MOUNTED, _OWN = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Of a group: its limit, what it takes, and which of that are files' pages that nobody used lately.
_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> float:
    """The bytes that the narrowest limit leaves; infinite without one."""
    left = math.inf
    for folder in _groups("memory"):
        for limit, taken, files in _MEMORY:
            with contextlib.suppress(OSError, ValueError):  # "max", or of the other version
                free = int(_read(folder / limit)) - int(_read(folder / taken))
                left = min(left, max(free + _counted(folder / "memory.stat", files), 0))
    return left


def processors() -> float:
    """As many as compute all the time within the narrowest quota; infinite without one."""
    least = math.inf
    for folder in _groups("cpu"):
        with contextlib.suppress(OSError, ValueError):
            quota, period = map(int, _read(folder / "cpu.max").split())
            least = min(least, quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota = int(_read(folder / "cpu.cfs_quota_us"))
            if quota > 0:
                least = min(least, quota / int(_read(folder / "cpu.cfs_period_us")))
    return least


def _groups(controller: str) -> Iterator[Path]:
    """The folders of this process's group and of those above it, as far as they are seen."""
    try:
        lines = _OWN.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, named, path = line.split(":", 2)
        if named and controller not in named.split(","):
            continue
        top = _MOUNTED / controller if named else _MOUNTED
        own = top / path.lstrip("/")
        yield from (one for one in (own, *own.parents) if one.is_relative_to(top))


def _counted(stat: Path, key: str) -> int:
    """What a file of names and numbers says of `key`; 0 where it says nothing."""
    lines = _read(stat).splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key} ")), 0)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8")
