"""The artefacts of a plan at an address of fsspec's: `owl sweep --store s3://BUCKET/FOLDER`.

Under the address lie

    NAME/VERSION/...      the files of the artefact NAME; the version is made of their digests, so
                          that nothing is written over, whoever else makes the same artefact
    NAME/stored.json      its marker, written last: what the files are, and what was asked
    inputs/SHA256         each file that a plan reads and does not make
    logs/                 the record of each task, and what it printed

What has no marker is not there: an upload that was killed is not seen. A store writes an object
whole or not at all; in a folder (file://) a temporary name and a rename do so for the markers.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Self
from urllib.parse import urlsplit

from fsspec import available_protocols
from fsspec.callbacks import Callback
from fsspec.core import url_to_fs
from pydantic import BaseModel, ConfigDict, Field, model_validator

from owl_deploy.errors import (
    BadInput,
    EnvironmentFailed,
    OwlError,
    full_disk,
    is_full_disk,
    unknown_name,
    with_type,
)
from owl_deploy.models import digests
from owl_deploy.utils.artefact import make_folder, replaced, write_text
from owl_deploy.utils.progress import Advance

MARKER, INPUTS, LOGS = "stored.json", "inputs", "logs"
_PIECE_BYTES = 1 << 22


@dataclass(frozen=True)
class Content:
    """What a file holds: its size and its SHA-256."""

    bytes: int
    sha256: str

    def at(self, key: str) -> "File":
        """The object `key`, which holds that."""
        return File(key=key, bytes=self.bytes, sha256=self.sha256)


class File(BaseModel):
    """A file in a store: the object `key` under its address, and what that holds."""

    model_config = ConfigDict(frozen=True)

    key: str
    bytes: int
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # it names a file of a node's cache


class Stored(BaseModel):
    """What a marker says of an artefact, or what is known of an input.

    `files`: by their paths in the folder, or beside the file, that it is. `digest`: what those who
    read it know it by (`pipeline.digest`). `asked`: what decides it (`Task.asked`); an input has
    neither that nor a `version`. `is_whole`: whether its task is done; a benchmark in which an
    engine failed is not.
    """

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = 1
    version: str = ""
    is_folder: bool
    digest: str
    files: dict[str, File]
    asked: dict[str, Any] = {}
    is_whole: bool = True

    @model_validator(mode="after")
    def _stay_within(self) -> Self:
        for name in (
            self.version or "none",
            *self.files,
            *(one.key for one in self.files.values()),
        ):
            if not {"", ".", ".."}.isdisjoint(name.split("/")):
                raise ValueError(f"{name!r} leads elsewhere")
        return self


class Store:
    """A folder of a file system that fsspec knows; its `address` means the same on every node.

    Raises `BadInput` for an address that is none, and `EnvironmentFailed` where a package is
    missing. Every method raises the one where there is no such bucket, or no right to it, and the
    other for whatever else the store refuses.
    """

    def __init__(self, address: str) -> None:
        scheme, mark, _ = address.partition("://")
        if not mark:
            raise BadInput(
                f"--store {address} is no address.", "Write it as s3://BUCKET/FOLDER, say."
            )
        if scheme not in available_protocols():
            raise unknown_name("scheme in --store", scheme, available_protocols())
        try:
            password = urlsplit(address).password
        except ValueError as error:
            raise BadInput(f"--store {address} is no address ({error}).") from error
        if password:  # which would be in every log
            raise BadInput(
                "--store has a password in it.", "Give it as the scheme's package looks for it."
            )
        self._is_local = scheme in ("file", "local")
        self.address = address.rstrip("/")
        more = {"auto_mkdir": True} if self._is_local else {}
        try:
            with self._asked():
                self._files, root = url_to_fs(address, use_listings_cache=False, **more)
        except EnvironmentFailed as error:
            raise _not_installed(scheme, error.__cause__) or error from error
        self._root = root.rstrip("/")
        if self._is_local:  # which may be written without a leading /
            self.address = f"file://{self._root}"

    def place(self, key: str) -> str:
        """The whole address of an object."""
        return f"{self.address}/{key}"

    def read(self, key: str) -> str | None:
        """The text of an object; None where there is none."""
        with self._asked():
            try:
                return str(self._files.cat_file(self._path(key)).decode("utf-8", "replace"))
            except (FileNotFoundError, IsADirectoryError):
                return None

    def write(self, key: str, text: str) -> None:
        """Make an object of `text`, or make it anew: readers see the old or the new one."""
        with self._asked():
            if self._is_local:
                path = Path(self._path(key))
                make_folder(path.parent)
                write_text(path, text)
            else:
                self._files.pipe_file(self._path(key), text.encode())

    def remove(self, *keys: str) -> None:
        """Remove objects, or all that lies under their names; those that are not there, too."""
        for key in keys:
            with self._asked(), contextlib.suppress(FileNotFoundError):
                self._files.rm(self._path(key), recursive=True)

    def sizes(self, folder: str) -> dict[str, int]:
        """The bytes of each object under `folder`, by key."""
        with self._asked():
            found = self._files.find(self._path(folder), detail=True)
        start = len(self._path(""))
        return {path[start:]: int(about["size"]) for path, about in found.items()}

    def put(self, path: Path, key: str, advance: Advance = lambda _: None) -> None:
        """Store a file; `advance` is told the bytes as they go."""
        with self._asked(), _Bytes(path.stat().st_size, advance) as callback:
            self._files.put_file(str(path), self._path(key), callback=callback)

    def fetch(self, file: File, path: Path, way_out: str) -> None:
        """Write what an object holds to `path`, whole or not at all, verified on the way.

        Raises `BadInput`, with the `way_out`, for an object that is not there or holds other bytes,
        and `EnvironmentFailed` for a full disk.
        """
        try:
            with replaced(path) as temporary:
                self._copy(file, temporary, way_out)
        except OSError as error:  # this machine's: those of the store are said by now
            if is_full_disk(error):
                raise full_disk(path.parent) from error
            raise EnvironmentFailed(
                f"The folder {path.parent} cannot be written ({error.strerror})."
            ) from error

    def _copy(self, file: File, path: Path, way_out: str) -> None:
        found, size = hashlib.sha256(), 0
        with path.open("wb") as target:
            for piece in self._pieces(file, way_out):
                found.update(piece)
                size += target.write(piece)
        if (size, found.hexdigest()) != (file.bytes, file.sha256):
            raise BadInput(
                f"{self.place(file.key)} is damaged: its digest is another.",
                way_out,
            )

    def _pieces(self, file: File, way_out: str) -> Iterator[bytes]:
        """What an object holds; only what the store does is said of it."""
        with self._asked():
            try:
                source = self._files.open(self._path(file.key), "rb")
            except FileNotFoundError as error:
                raise BadInput(f"{self.place(file.key)} is missing.", way_out) from error
        with source:
            while True:
                with self._asked():
                    piece = source.read(_PIECE_BYTES)
                if not piece:
                    return
                yield piece

    def stored(self, name: str) -> Stored | None:
        """What the marker of the artefact `name` says; None where there is none.

        Raises `BadInput` for a marker that cannot be read.
        """
        key = f"{name}/{MARKER}"
        if (text := self.read(key)) is None:
            return None
        try:
            stored = Stored.model_validate_json(text)
            if not stored.version:  # whose folder would be that of every version, and of more
                raise ValueError("it names no version")
        except ValueError as error:
            raise BadInput(
                f"{self.place(key)} is no marker of owl's, or a damaged one.", self.again(name)
            ) from error
        return stored

    def again(self, name: str) -> str:
        """What to do about an artefact that is damaged."""
        return f"Delete {self.place(f'{name}/{MARKER}')}: the same command then makes it again."

    def publish(
        self,
        name: str,
        base: Path,
        contents: Mapping[str, Content],
        *,
        is_folder: bool,
        digest: str,
        asked: dict[str, Any],
        is_whole: bool = True,
    ) -> Stored:
        """Store the files of an artefact, which lie in `base`, and at last its marker (`Stored`).

        Where somebody else has published what answers the same question meanwhile, that stays:
        others may be reading it.
        """
        before = self.stored(name)
        if before is not None and before.is_whole and before.asked == asked:
            return before
        version = version_of(contents)
        files = {path: one.at(f"{name}/{version}/{path}") for path, one in contents.items()}
        for path, file in files.items():
            self.put(base / path, file.key)
        stored = Stored(
            version=version,
            is_folder=is_folder,
            digest=digest,
            files=files,
            asked=asked,
            is_whole=is_whole,
        )
        self.write(f"{name}/{MARKER}", stored.model_dump_json(indent=2) + "\n")
        if before is not None and before.version != version:  # of other settings or inputs, say
            self.remove(f"{name}/{before.version}")
        return stored

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    @contextlib.contextmanager
    def _asked(self) -> Iterator[None]:
        """Say in one sentence what the store refuses; each library has errors of its own."""
        try:
            yield
        except OwlError:
            raise
        except Exception as error:
            if is_full_disk(error):
                raise
            # No such bucket, no right to it; whatever else there is broke on the way.
            asked_wrongly = isinstance(error, FileNotFoundError | PermissionError)
            kind = BadInput if asked_wrongly else EnvironmentFailed
            raise kind(
                f"The store {self.address} cannot be used ({with_type(error).rstrip('.')}).",
                "Check the address, and what this machine may do there.",
            ) from error


def _not_installed(scheme: str, error: BaseException | None) -> EnvironmentFailed | None:
    """The error for a package that fsspec misses; None for any other."""
    package = getattr(error.__cause__, "name", None) if isinstance(error, ImportError) else None
    if package is None:
        return None
    return EnvironmentFailed(
        f"A store at {scheme}:// needs the package {package}, which is not installed.",
        f"Run: pip install {package}, on this machine and on every node.",
    )


def version_of(contents: Mapping[str, Content]) -> str:
    """What tells these files from others, in a few digits."""
    return digests.of_files((path, one.sha256) for path, one in sorted(contents.items()))[:12]


def contents_of(base: Path, files: Iterable[Path]) -> dict[str, Content]:
    """What the `files` in the folder `base` hold, by their paths there."""
    return {
        str(PurePosixPath(path.relative_to(base))): Content(
            path.stat().st_size, digests.digest(path)
        )
        for path in files
    }


class _Bytes(Callback):  # type: ignore[misc]
    """Tells of the bytes of one file as they go, and of those not told of when it is over."""

    def __init__(self, size: int, advance: Callable[[float], None]) -> None:
        super().__init__()
        self._left, self._advance = size, advance

    def relative_update(self, inc: int = 1) -> None:
        """`inc` more bytes have gone."""
        self._left -= inc
        self._advance(inc)

    def close(self) -> None:
        """All have."""
        self.relative_update(self._left)
