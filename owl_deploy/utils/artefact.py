"""Folders that appear whole or not at all, and files of JSON."""

import contextlib
import ctypes
import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.filesize import decimal

from owl_deploy.errors import (
    BadInput,
    EnvironmentFailed,
    first_line,
    full_disk,
    is_full_disk,
    printable,
)
from owl_deploy.utils.lock import STALE_S, Held, holds, lease, outlast

if TYPE_CHECKING:
    import torch

MANIFEST = "owl.json"  # what each artefact holds, see manifest.py
MEASURED = "measured"  # the folder within an artefact that holds what was measured of it
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_FORGOTTEN_S = 4 * 3600.0  # no file of this age is still being written
_OLD = ".owl-old-"  # in the name of what is replaced where that takes several steps
_MOVE_IT_AWAY = "Move it away, then run again: with --resume, where that is an option."


def check_output(destination: Path, force: bool = False) -> None:
    """Refuse a destination that exists, before any work is done.

    With `force` a folder may exist if it is empty or an artefact of ours (it has a manifest): a
    mistyped `-o ~ --force` must not cost a home folder. Of a link, here and elsewhere, what it
    leads to is meant.
    """
    check_parent(destination)
    if not os.path.lexists(destination.resolve()):
        return
    if destination.resolve().is_mount():
        raise BadInput(
            f"{destination} is where a disk is mounted, which nothing can replace.",
            "Choose a folder within it.",
        )
    if not force:
        raise BadInput(f"{destination} exists already.", "Use --force to replace it.")
    if not destination.is_dir() or (any(destination.iterdir()) and not is_artefact(destination)):
        raise BadInput(
            f"{destination} was not written by owl, so --force does not replace it.",
            "Choose another name, or delete it yourself.",
        )


def check_path(path: Path) -> None:
    """Refuse a path that is no text, for libraries in Rust and C++ take none, some after hours; and
    one that leads round in a circle, or to no name.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError as error:
        way_out = "Rename what is not, or choose another."
        if sys.getfilesystemencoding() != "utf-8":
            way_out = "Set LC_ALL=C.UTF-8, if its name is."
        raise BadInput(f"The path {path.absolute()} is not UTF-8.", way_out) from error
    try:
        name = path.resolve().name
    except (OSError, RuntimeError) as error:  # the latter of a loop, before Python 3.13
        raise BadInput(f"{path} cannot be followed ({first_line(error)}).") from error
    if not name:
        raise BadInput(f"{path} is the root of all folders.", "Choose another name.")


def check_parent(destination: Path) -> None:
    """Refuse a path for a file or folder whose own folder is not there, or cannot be written."""
    check_path(destination)
    parent = destination.resolve().parent if destination.is_symlink() else destination.parent
    if not parent.is_dir():
        raise BadInput(f"The folder {parent} does not exist.", "Create it first.")
    if not os.access(parent, os.W_OK):
        raise BadInput(f"The folder {parent} cannot be written.")


def check_apart(destination: Path, *inputs: str | Path) -> None:
    """Refuse an artefact within its own input, which would be read as part of it, or around it.

    `inputs`: files and folders; whatever is not there is the name of something elsewhere.
    """
    output = destination.resolve()
    for source in (one for one in map(Path, inputs) if one.exists()):
        real = source.resolve()
        if output == real:
            raise BadInput(
                f"{destination} is an input itself, which would be replaced.",
                "Choose another output folder.",
            )
        if real in output.parents:
            raise BadInput(
                f"{destination} lies inside the input {source}.",
                "Choose an output folder beside it.",
            )
        if output in real.parents:
            raise BadInput(
                f"The input {source} lies inside {destination}, which would be replaced.",
                "Choose another output folder.",
            )


@contextlib.contextmanager
def only_writer(destination: Path, force: bool = False, *inputs: str | Path) -> Iterator[None]:
    """Let no other run write `destination` meanwhile; refuse one that may not be written at all.

    See `check_output` and, for its `inputs`, `check_apart`. Whoever writes holds the lease
    `.NAME.owl-lock` (lock.py), and loses it if it stands still for long: see `check_writer`. What
    killed runs left is cleared first.
    """
    check_parent(destination)
    check_apart(destination, *inputs)
    destination = destination.resolve()
    with _leased(destination):
        _put_back(destination)
        _remove_stale(destination, folders=True)
        check_output(destination, force)  # as it is now, with nobody else at it
        yield


def wait_for_writer(destination: Path) -> None:
    """Wait until no run writes `destination`; one that was killed elsewhere counts for a while.

    Raises `BadInput` where its folder cannot be written.
    """
    destination = destination.resolve()
    make_folder(destination.parent)
    try:
        with lease(_lock(destination), wait=True):
            pass
    except OSError as error:
        raise _not_writable(destination.parent, error) from error


def _lock(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.owl-lock")


def is_writer(destination: Path) -> bool:
    """Whether this process is the `only_writer` of `destination`, still."""
    return holds(_lock(destination))


def check_writer(destination: Path) -> None:
    """Raise `EnvironmentFailed` unless this process is the `only_writer` of `destination`, still.

    One that was suspended may have lost it to a run of another machine, whose files it then meets.
    """
    if not is_writer(destination):
        raise EnvironmentFailed(
            f"Another run took {destination} over, since this one stood still.", "Run again."
        )


@contextlib.contextmanager
def _leased(destination: Path) -> Iterator[None]:
    lock = _lock(destination)
    with contextlib.ExitStack() as stack:
        try:
            outlast(lock, lambda host: _say_who_is_waited_for(destination, host))
            stack.enter_context(lease(lock))
        except Held as error:
            raise BadInput(
                f"Another run is writing {destination}.",
                "Wait until it is done, or choose another output folder.",
            ) from error
        except OSError as error:
            if is_full_disk(error):
                raise full_disk(destination.parent) from error
            raise _not_writable(destination.parent, error) from error
        yield


def _say_who_is_waited_for(destination: Path, host: str) -> None:
    typer.echo(
        printable(
            f"A run on {host} is writing {destination}, or was killed there: waiting for at most "
            f"{STALE_S:.0f} s for it to show life."
        ),
        err=True,
    )


def check_room(
    folder: Path, needed: float, what: str, else_where: str = "choose another output folder"
) -> None:
    """Refuse `what` when its `needed` bytes do not fit on the disk of `folder`, before any work.

    `else_where`: what to do if no space can be freed.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise BadInput(
            f"{what} needs up to {decimal(int(needed))}, and the disk has {decimal(free)} left.",
            f"Free some space, or {else_where}.",
        )


def make_folder(folder: Path) -> None:
    """Make `folder`, and what it lies in; raises `BadInput` where the system does not let us."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_writable(folder.parent, error) from error


def _not_writable(folder: Path, error: OSError) -> BadInput:
    return BadInput(
        f"The folder {folder} cannot be written ({error.strerror}).",
        "Choose another output folder.",
    )


def is_artefact(folder: Path) -> bool:
    """Whether `folder` is one that owl wrote, whole.

    Its manifest says a kind; what tools have made over since, and older versions wrote, a target or
    its files (manifest.py).
    """
    try:
        content = read_object(folder / MANIFEST, "")
    except (BadInput, OSError):
        return False
    return not {"kind", "target", "files"}.isdisjoint(content)


@contextlib.contextmanager
def staged_folder(destination: Path, force: bool = False, *inputs: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that becomes `destination` when the block ends well.

    An exception removes it; a kill leaves a hidden `.NAME.owl-tmp-...` that the next run clears.
    For `inputs`, and for two runs at once, see `only_writer`.
    """
    with only_writer(destination, force, *inputs):
        destination = destination.resolve()
        staging = _temporary(destination)
        make_folder(staging)
        try:
            yield staging
            publish(staging, destination, force)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def publish(staging: Path, destination: Path, force: bool) -> None:
    """Make `staging` appear as `destination`, safely on disk; with `force` for what is there.

    Only for its `only_writer`: raises as `check_writer`, and `EnvironmentFailed` where something is
    there now that it may not replace.
    """
    check_writer(destination)
    for path in staging.glob(".*.owl-tmp-*"):  # files that a kill left half written
        path.unlink()
    all_to_disk(staging)
    if not os.path.lexists(destination):
        staging.rename(destination)
        return
    try:
        check_output(destination, force)  # hours may have passed since it was looked at
    except BadInput as error:
        raise EnvironmentFailed(f"Meanwhile: {error.message}", _MOVE_IT_AWAY) from error
    try:
        _exchange(staging, destination)
    except OSError as error:  # such as EXDEV, of a folder of an image's lower layer
        raise EnvironmentFailed(
            f"{destination} cannot be replaced ({error.strerror}).", _MOVE_IT_AWAY
        ) from error
    old = _temporary(destination)  # which the next run clears, if this one is killed now
    staging.rename(old)
    shutil.rmtree(old)


def _exchange(a: Path, b: Path) -> None:
    """Swap two folders, in one step where the system can (Linux), so that `b` is never missing."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is not None:
        result = renameat2(
            _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
        )
        if result == 0:
            return
    aside = b.with_name(f".{b.name}{_OLD}{secrets.token_hex(4)}")
    b.rename(aside)
    try:
        a.rename(b)
    except OSError:
        aside.rename(b)
        raise
    aside.rename(a)


def _put_back(destination: Path) -> None:
    """Undo an exchange that was ended between its steps: for the only writer of `destination`."""
    for old in destination.parent.glob(f".{glob.escape(destination.name)}{_OLD}*"):
        if os.path.lexists(destination):
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(destination)


def _temporary(path: Path) -> Path:
    """A hidden name beside `path` that nobody else has, on whatever machine."""
    return path.with_name(f".{path.name}.owl-tmp-{secrets.token_hex(4)}")


def _remove_stale(destination: Path, *, folders: bool) -> None:
    """Clear what runs that were killed left beside `destination`; its only writer, `folders` too.

    What writes JSON leaves files, and needs no lease: one that is hours old is nobody's, whatever
    the clock of the file system.
    """
    for path in destination.parent.glob(f".{glob.escape(destination.name)}.owl-tmp-*"):
        with contextlib.suppress(OSError):
            if not path.is_dir():
                if time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                    path.unlink()
            elif folders:
                shutil.rmtree(path)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the file that the block writes there becomes it, safely on disk.

    `path` holds the old or the new content, never a part; of a link, what it leads to does. Raises
    `OSError` for what is no file, such as /dev/null, whose place a file is not to take.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is no file", str(path))
    _remove_stale(path, folders=False)
    temporary = _temporary(path)
    try:
        yield temporary
        to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def all_to_disk(path: Path) -> None:
    """Make sure that a file, or a folder and all that is in it, outlives a power failure."""
    for one in [*path.rglob("*"), path]:
        to_disk(one)


def to_disk(path: Path) -> None:
    """Make sure that what a file or a folder itself holds outlives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write `text` as UTF-8; `path` holds the old or the new content, never a part.

    Half a letter, which a path may hold, becomes a question mark.
    """
    with replaced(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="replace")


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write `value` as JSON; `path` holds the old or the new content, never a part."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def save_tensors(tensors: "Mapping[str, torch.Tensor]", path: Path, **metadata: str) -> None:
    """Write a safetensors file, for whoever may read the files that this process makes.

    Of equal tensors and metadata it is equal, byte for byte.
    """
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata={"format": "pt", **metadata})
    path.chmod(mode)  # it is its maker's alone otherwise
    if metadata:
        _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put a safetensors file's metadata, which lie in another order each time, in that of names.

    Its header is JSON behind the eight bytes of its length, filled up with spaces.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        sorted_ = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(sorted_) <= length  # what is behind it is the tensors
        file.seek(8)
        file.write(sorted_.ljust(length))


def read_object(path: Path, way_out: str) -> dict[str, Any]:
    """The JSON object in a file; raises `BadInput`, with `way_out`, where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # too long a number, nested too deep
        raise BadInput(f"{path} is not valid JSON ({first_line(error)}).", way_out) from error
    if not isinstance(value, dict):
        raise BadInput(f"{path} does not hold a JSON object.", way_out)
    return value


def link(source: Path, target: Path) -> None:
    """Make `target` a second name of the file `source`, or a copy where the disk has no such names.

    Raises `FileExistsError` if it is there.
    """
    try:
        target.hardlink_to(source)
    except FileExistsError:
        raise
    except OSError:
        shutil.copyfile(source, target)


def end_line(path: Path) -> None:
    """End the last line of the file `path`, which a kill may have cut short, so that what is
    appended begins another; make the file where there is none.
    """
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def copy(source: Path, target: Path) -> None:
    """Copy a file of a folder that a stranger may have packed; raises `BadInput` as `own` does."""
    shutil.copyfile(own(source), target)


def own(path: Path) -> Path:
    """`path`, unless it is a link to a file of another name, which may be its reader's secret.

    Those of the Hub's cache lead to blobs, whose names are digests.
    """
    found = path.resolve()
    if path.is_symlink() and path.name != found.name and found.parent.name != "blobs":
        raise BadInput(f"{path} is a link to {found}.", "If you want that file, copy it there.")
    return path


def sha256(path: Path) -> str:
    """The digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
