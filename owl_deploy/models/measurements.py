"""What was measured of an artefact: files in its folder `measured`; its manifest stays."""

import contextlib
import errno
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from owl_deploy.errors import BadInput, invalid
from owl_deploy.models.manifest import Manifest, read_manifest
from owl_deploy.utils.artefact import MANIFEST, MEASURED, read_object, write_json
from owl_deploy.utils.lock import lease

JUDGED_BY = ("pass@1", "acc")  # of a task's metrics, the first that it has; 0 or 1 a document
_MEASURE = "Measure again."


class _Kept(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class _Perplexity(_Kept):
    value: FiniteFloat = Field(gt=0)


class _Metric(_Kept):
    value: FiniteFloat
    stderr: FiniteFloat | None = None


class _Answer(_Kept):
    problem: str
    passed: bool


class _Task(_Kept):
    metrics: dict[str, _Metric] = {}
    documents: int = 0
    window: int | None = None
    every: int | None = None
    answers: tuple[_Answer, ...] = ()
    right: dict[str, bool] = {}


class _Measured(_Kept):
    perplexity: _Perplexity | None = None
    tasks: dict[str, _Task] | None = None


def by_document(right: Mapping[str, bool], answers: Iterable[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each document of a task was answered right, from what is kept of it; empty without.

    By its number, in `right`, or by its problem's name, in `answers`.
    """
    return dict(right) or {one["problem"]: one["passed"] for one in answers}


def keep_measurement(folder: Path, name: str, value: dict[str, Any], *, add: bool = False) -> None:
    """Keep what was measured of an artefact beside its manifest: one file a measurement.

    So a finished manifest is never written again. With `add` what was there stays, but for the keys
    that `value` has; two that measure at once lose nothing. Raises `OSError` where it cannot be
    written, or where a link would lead elsewhere: the folder may be a stranger's.
    """
    file = measurement_file(folder, name)
    lock = file.with_name(f".{name}.owl-lock")
    file.parent.mkdir(exist_ok=True)
    for path in (file.parent, file, lock):
        if path.is_symlink():
            raise OSError(errno.ELOOP, "it is a link", str(path))
    with lease(lock, wait=True):
        earlier: dict[str, Any] | None = None
        if add:
            with contextlib.suppress(BadInput):  # what cannot be read cannot stay
                earlier = measurement(folder, name)
        write_json(file, (earlier or {}) | value)


def measurement(folder: Path, name: str) -> dict[str, Any] | None:
    """What was measured of an artefact, by name ("perplexity", "tasks"); None if it was not.

    Raises `BadInput` for what cannot be read.
    """
    file = measurement_file(folder, name)
    if file.is_file():
        value: dict[str, Any] | None = read_object(file, _MEASURE)
    else:
        manifest = read_manifest(folder, Manifest)
        file, value = folder / MANIFEST, (manifest.measured if manifest else {}).get(name)
    try:
        _Measured.model_validate({name: value})
    except ValidationError as error:
        raise invalid(str(file), error, _MEASURE) from error
    return value


def measurement_file(folder: Path, name: str) -> Path:
    """Where a measurement of the artefact in `folder` is kept."""
    return folder / MEASURED / f"{name}.json"
