"""What a node does for a task whose artefacts lie in a store: fetch, do, publish.

Nothing is shared with the driver but the store. So each path of the driver stands for the same path
under a folder of the node's cache, the mirror's root, and the task is done there: a relative path
means what it means to the driver, and in what is published the root is taken away again.

In the cache's folder `store`, `files` holds what was fetched or made here by its digest, for later
tasks; `work` a folder for each task that has not ended well here. All of it may be deleted.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from owl_deploy.bench.result import FILE as RESULT
from owl_deploy.distributed.cluster.store import LOGS, File, Store, Stored, contents_of
from owl_deploy.distributed.pipeline import Task, agree, digest, do, state
from owl_deploy.errors import EnvironmentFailed, OwlError
from owl_deploy.utils.artefact import (
    MANIFEST,
    check_room,
    link,
    make_folder,
    wait_for_writer,
    write_text,
)
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.lock import lease
from owl_deploy.utils.record import Record, with_ending

_STORE_AGAIN = "Delete it: the same command then stores it again."
_OWLS = (MANIFEST, RESULT)  # files of a folder in which paths are told
_T = TypeVar("_T")


@dataclass(frozen=True)
class Share:
    """What a task has of a store: its address, the artefact's name there, where its log goes.

    `reads`: what the task reads, in its own order, each with what is stored of it: an input, or
    the name of another task's artefact. None for what is named elsewhere, a data set say.
    """

    address: str
    name: str
    log: str
    reads: tuple[tuple[str, Stored | str | None], ...]

    def own(self, *parts: str) -> Path:
        """A path in this node's cache that is only this task's; raises `EnvironmentFailed`."""
        known = sha256(f"{self.address}\n{self.name}".encode()).hexdigest()[:16]
        return cache_dir("store", *parts) / known

    def tell(self, record: Record) -> None:
        """Leave the record of the task in the store, and its log once it has ended.

        Nothing depends on either: what cannot be told is not.
        """
        with contextlib.suppress(OwlError, OSError):
            store = Store(self.address)
            store.write(f"{LOGS}/{self.log}.json", record.model_dump_json(indent=2) + "\n")
            if record.state != "running":
                log = with_ending(self.own("logs"), ".log")
                store.put(log, f"{LOGS}/{self.log}.log")
                log.unlink()


def perform(task: Task, share: Share, place: Path) -> None:
    """Do a task if its artefact is not in the store, and publish it there.

    `place`: the driver's working folder. What a run that was killed here has left is gone on with.
    Raises as `do` and as `Store` do, and `EnvironmentFailed` for what it reads and is not there.
    """
    store = Store(share.address)
    reads = [(one, _found(store, known)) for one, known in share.reads]
    asked = task.asked([one if known is None else known.digest for one, known in reads])
    there = store.stored(share.name)
    if there is not None and there.is_whole and agree(there.asked, asked):
        return
    root = share.own("work").resolve()  # as what is done there tells its paths
    with lease(root.with_name(f".{root.name}.owl-lock"), wait=True):  # nodes may have one cache
        mirror = Mirror(root, place)
        mirror.enter()
        _fill(mirror, store, share, reads)
        moved = mirror.moved(task)
        wait_for_writer(moved.output)
        # A run that was killed before its receipt has not told its paths either.
        if not moved.receipt.is_file() or state(moved) != "done":
            do(moved, lambda: mirror.told(moved))
        _publish(store, share.name, moved, asked)
        os.chdir("/")
        shutil.rmtree(root, ignore_errors=True)


def _fill(
    mirror: "Mirror", store: Store, share: Share, reads: Sequence[tuple[str, Stored | None]]
) -> None:
    """Put what a task `reads` into the mirror; raises as `check_room` and `Store.fetch`."""
    _check_room(share.name, [known for _, known in reads if known is not None])
    for (path, known), (_, name) in zip(reads, share.reads, strict=True):
        if known is not None:
            way_out = store.again(name) if isinstance(name, str) else _STORE_AGAIN
            mirror.fill(path, known, partial(_cached, store, way_out))


def _found(store: Store, known: Stored | str | None) -> Stored | None:
    """What is stored of what a task reads."""
    if not isinstance(known, str):
        return known
    if (stored := store.stored(known)) is None:
        raise EnvironmentFailed(f"{store.place(known)} is not there any more.", "Run again.")
    return stored


def _publish(store: Store, name: str, task: Task, asked: dict[str, Any]) -> None:
    is_folder = task.proof != task.output
    base = task.output if is_folder else task.output.parent
    files = [task.output, task.receipt]
    if is_folder:  # without leases
        files = [path for path in sorted(base.rglob("*")) if path.is_file()]
        files = [path for path in files if not path.name.startswith(".")]
    contents = contents_of(base, files)
    store.publish(
        name,
        base,
        contents,
        is_folder=is_folder,
        digest=digest(task.output),
        asked=asked,
        is_whole=task.is_whole(),
    )
    for path, content in contents.items():  # for later tasks of this node
        kept = cache_dir("store", "files") / content.sha256
        with contextlib.suppress(FileExistsError):
            link(base / path, kept)


@dataclass(frozen=True)
class Mirror:
    """The driver's folders under `root`; `place` is the one that it works in."""

    root: Path
    place: Path

    def enter(self) -> None:
        """Work where the driver does."""
        folder = self.local(".")
        make_folder(folder)
        os.chdir(folder)

    def local(self, path: str) -> Path:
        """Where a path of the driver lies here."""
        return self.root / os.path.normpath(self.place / path).lstrip("/")

    def moved(self, task: Task) -> Task:
        """The task with its absolute paths under the root, and none by way of a folder that is not
        here."""
        return _mapped(task, lambda path: str(self.root) + path)

    def fill(self, path: str, stored: Stored, fetched: Callable[[File], Path]) -> None:
        """Put what is stored of the driver's `path` at its place; `fetched` says where it lies."""
        place = self.local(path)
        if stored.is_folder:
            shutil.rmtree(place, ignore_errors=True)
        for name, file in stored.files.items():
            target = (place if stored.is_folder else place.parent) / name
            make_folder(target.parent)
            target.unlink(missing_ok=True)
            with contextlib.suppress(FileExistsError):  # another task of this node was faster
                link(fetched(file), target)

    def told(self, task: Task) -> None:
        """Tell the paths in what a task has left as the driver knows them."""
        is_folder = task.proof != task.output
        files = [task.output / name for name in _OWLS] if is_folder else [task.output]
        for file in filter(Path.is_file, files):
            text = file.read_text(encoding="utf-8")
            if (changed := text.replace(json.dumps(f"{self.root}/")[1:-1], "/")) != text:
                write_text(file, changed)


def _check_room(name: str, reads: Iterable[Stored]) -> None:
    folder = cache_dir("store", "files")
    every = {file.sha256: file.bytes for one in reads for file in one.files.values()}
    needed = sum(size for known, size in every.items() if not (folder / known).exists())
    check_room(folder, needed, f"What {name} reads", "set OWL_CACHE to a folder with more of it")


def _cached(store: Store, way_out: str, file: File) -> Path:
    """Where a file lies in the cache, by its digest; it is fetched where it does not yet."""
    path = cache_dir("store", "files") / file.sha256
    with lease(path.with_name(f".{path.name}.owl-lock"), wait=True):  # several tasks may want it
        if not (path.is_file() and path.stat().st_size == file.bytes):
            store.fetch(file, path, way_out)
    return path


def _mapped(value: _T, change: Callable[[str], str]) -> _T:
    """`value`, a model, with every absolute path in it changed, and paths back (..) left out."""
    found: Any = value
    if isinstance(found, BaseModel):
        changed = {name: _mapped(one, change) for name, one in found}
        update = {name: one for name, one in changed.items() if one != getattr(found, name)}
        found = found.model_copy(update=update)
    elif isinstance(found, tuple):
        found = tuple(_mapped(one, change) for one in found)
    elif isinstance(found, str | Path) and (str(found).startswith("/") or "/../" in str(found)):
        path = os.path.normpath(found)
        found = type(found)(change(path) if path.startswith("/") else path)
    return found  # type: ignore[no-any-return]
