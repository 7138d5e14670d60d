"""SHA-256, in hexadecimal, of files and of what tells one thing from another.

A file's is kept in the cache folder for as long as the file is the one that was read. It counts
as that while its device and inode, its size, and the times at which its content and its inode last
changed are what they were; the last of these no program can set. So opening a deployment does not
read all of it first. What rots on the disk without being written is found by `owl verify`, which
always reads every byte.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from owl_deploy.errors import OwlError
from owl_deploy.utils.artefact import read_object, sha256, write_json
from owl_deploy.utils.cache import cache_dir, cache_path

_LEAST_BYTES = 1 << 24  # a smaller file is read as fast as its record
# A change within one tick of the file system's clock would leave the times as they are: what has
# changed just now is not recorded.
_SETTLED_S = 2.0


def digest(path: Path, *, again: bool = False) -> str:
    """The digest of a file; with `again` it is read whatever is known of it."""
    before = path.stat()
    if before.st_size < _LEAST_BYTES:
        return sha256(path)
    name = f"{before.st_dev:x}-{before.st_ino:x}.json"
    if not again and (known := _known(name, before)):
        return known
    found = sha256(path)
    after = path.stat()
    if _state(after) == _state(before) and time.time() - after.st_ctime > _SETTLED_S:
        with contextlib.suppress(OwlError, OSError):  # a cache that cannot be written costs time
            write_json(cache_dir("digests") / name, {"state": _state(after), "sha256": found})
    return found


def of_json(value: object) -> str:
    """One digest of a value as JSON, whatever the order of its keys; what JSON lacks, as text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def of_files(known: Iterable[tuple[str, str]]) -> str:
    """One digest of files in order, of each its name and its digest."""
    lines = "".join(f"{digest}  {name}\n" for name, digest in known)
    return hashlib.sha256(lines.encode()).hexdigest()


def state_of(folder: Path) -> list[list[Any]]:
    """Which files lie in `folder`, with size and time of the last change (ns)."""

    def files() -> Iterator[list[Any]]:
        for path in sorted(folder.iterdir()):
            if path.is_file():
                about = path.stat()
                yield [path.name, about.st_size, about.st_mtime_ns]

    return [[str(folder.resolve())], *files()]


def _state(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _known(name: str, status: os.stat_result) -> str | None:
    with contextlib.suppress(OwlError, OSError):
        record = read_object(cache_path() / "digests" / name, "")
        if record.get("state") == _state(status) and isinstance(record.get("sha256"), str):
            return str(record["sha256"])
    return None
