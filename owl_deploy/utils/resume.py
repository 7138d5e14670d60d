"""What a long run has finished so far, on disk beside its output, so that a killed run resumes.

The hidden folder `.NAME.owl-partial` holds `run.json`, what was asked, and whatever the verb keeps.
"""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import (
    BadInput,
    EnvironmentFailed,
    full_disk,
    is_full_disk,
    is_out_of_memory,
)
from owl_deploy.utils.artefact import (
    all_to_disk,
    check_writer,
    is_writer,
    make_folder,
    save_tensors,
    to_disk,
    write_json,
)

if TYPE_CHECKING:
    import torch

    from owl_deploy.utils.ranks import Ranks

ASKED = "run.json"
ROUNDING = "rounding"  # of what is asked: what decides no more than in which order sums are made


class NotThatRun(BadInput):
    """An interrupted run is of other arguments, or damaged: nothing can go on from it."""


class Partial:
    """The partial result of one run; made by the run that starts it, opened by one that resumes.

    That run is the `only_writer` of `output`; other processes of it are sent this object, to read.
    Raises `BadInput` when there is one and `resume` is not asked for (and `force` neither), and
    `NotThatRun` when it was started with other arguments. What `asked` has under `ROUNDING` may
    differ where the number of processes does, which adds up in another order anyhow, and so may the
    batch size, of which there may have been too much memory asked.
    """

    def __init__(self, output: Path, asked: dict[str, Any], *, resume: bool, force: bool) -> None:
        output = output.resolve()
        self.output = output
        self.folder, self.force = partial_folder(output), force
        if self.folder.is_symlink():  # ours never is; what it leads to would be cleared
            raise BadInput(f"{self.folder} is a link, to another folder.", "Delete it.")
        before = asked_before(output, resume=resume, force=force)
        make_folder(self.folder)
        if resume:
            _refuse_other_arguments(before, asked)
        else:
            self._clear()
            write_json(self.folder / ASKED, asked)
        self.resumed = resume

    def _clear(self) -> None:
        self._end()
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def _end(self) -> None:
        """Make it no partial result, before its files go: of half of them no run may go on."""
        (self.folder / ASKED).unlink(missing_ok=True)
        to_disk(self.folder)

    def check_seen(self, ranks: "Ranks") -> None:
        """Together: raise `BadInput` where a process does not see what the leader writes."""
        seen = ranks.gathered(_read(self.folder / ASKED))
        blind = [rank for rank, asked in enumerate(seen) if asked != seen[0]]
        if blind:
            raise BadInput(
                f"Process {blind[0]} does not see what the first one writes in "
                f"{self.output.parent}.",
                "Put the output on a file system that all nodes share.",
            )

    def read(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        """The JSON file `name`, or None when it is not there yet."""
        return _read(self.folder / name)

    def write(self, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Write a JSON file, durably; raises as `check_writer`."""
        check_writer(self.output)
        write_json(self.folder / name, value)

    def write_tensors(self, named: "Mapping[str, torch.Tensor]", path: Path) -> None:
        """Write a safetensors file of the folder, durably, whole or not at all.

        Raises as `check_writer`.
        """
        check_writer(self.output)
        temporary = self.folder / "unfinished"  # of a run that was killed, the next one's takes it
        save_tensors(named, temporary)
        all_to_disk(temporary)
        temporary.replace(path)

    def read_tensors(self, path: Path) -> "dict[str, torch.Tensor]":
        """The tensors of a file that `write_tensors` made; raises `BadInput` for a damaged one."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (FileNotFoundError, SafetensorError) as error:
            raise damaged(path) from error

    def check_unchanged(self, inputs: Callable[[], Mapping[str, Any]]) -> None:
        """Raise `EnvironmentFailed` unless what was asked names the `inputs` as they are now.

        For a run that has read them for hours, before it writes what came of that.
        """
        asked = _read_asked(self.folder)
        try:
            now = json.loads(json.dumps(inputs()))
        except OSError as error:
            raise _mixture(f"{error.filename}") from error
        for name, value in now.items():
            if asked.get(name) != value:
                raise _mixture(f"the {name}")

    @property
    def has_work(self) -> bool:
        """Whether anything is there that a resumed run would not have to do again."""
        raise NotImplementedError

    def discard(self) -> None:
        """Delete it all, if it is this process that writes it, and the run has not lost it."""
        if is_writer(self.output):
            with contextlib.suppress(OSError):
                self._end()
            shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(output: Path) -> Path:
    """Where the partial result for `output` lies."""
    output = output.resolve()
    return output.with_name(f".{output.name}.owl-partial")


def is_interrupted(output: Path) -> bool:
    """Whether a run for `output` was stopped and left a partial result."""
    return (partial_folder(output) / ASKED).is_file()


def asked_before(output: Path, *, resume: bool, force: bool) -> dict[str, Any]:
    """What the run that this one resumes was asked; empty where this one begins.

    Raises `BadInput` where there is none to `resume`, or one and neither `resume` nor `force`: of
    that a verb is told before it tokenizes a text.
    """
    output = output.resolve()
    there = is_interrupted(output)
    if there and not resume and not force:
        raise BadInput(
            f"An earlier run for {output} was interrupted.",
            "Use --resume to continue it, or --force to start again.",
        )
    if resume and not there:
        raise BadInput(f"There is no interrupted run for {output} to resume.")
    return _read_asked(partial_folder(output)) if resume else {}


@contextlib.contextmanager
def kept_for_resuming(partial: Partial, to_save_memory: str) -> Iterator[None]:
    """Keep what is finished when a run is stopped; drop it when it could only fail again.

    What an earlier run has left is kept, whatever becomes of the one that goes on with it: that run
    got over what this one is refused.

    Raises `EnvironmentFailed`, with `to_save_memory`, a sentence, in the way out, for a full disk
    or memory.
    """
    try:
        yield
    except BadInput:
        if not (partial.resumed and partial.has_work):
            partial.discard()
        raise
    except BaseException as error:  # whatever stopped it, what is finished stays
        kept = partial.has_work
        if not kept:
            partial.discard()
        way_out = "then run again with --resume" if kept else "then run again"
        if is_full_disk(error):
            raise full_disk(partial.output.parent, way_out) from error
        if is_out_of_memory(error):
            raise EnvironmentFailed(
                "There is not enough memory.",
                f"Free some, {way_out}. {to_save_memory}",
            ) from error
        if kept and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt("the same command with --resume goes on from here") from error
        raise


def _read(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path) from error


def _read_asked(folder: Path) -> dict[str, Any]:
    found = _read(folder / ASKED)
    if not isinstance(found, dict) or not isinstance(found.get(ROUNDING, {}), dict):
        raise damaged(folder / ASKED)
    return found


def _mixture(what: str) -> EnvironmentFailed:
    return EnvironmentFailed(
        f"While this run read it, {what} was replaced or removed: what came of it is not written.",
        "Run again with --force.",
    )


def damaged(path: Path) -> NotThatRun:
    """What is said of a file of an interrupted run that cannot be gone on from."""
    said = f"What an earlier run left is damaged: {path}."
    return NotThatRun(said, "Use --force to start again.")


def _refuse_other_arguments(before: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))
    rounding = [dict(one.get(ROUNDING) or {}, batch_size=None) for one in (before, asked)]
    if rounding[0].get("processes") != rounding[1].get("processes"):
        rounding = [{}, {}]
    before, asked = (
        one | {ROUNDING: own} for one, own in zip((before, asked), rounding, strict=True)
    )
    differing = _differences(before, asked)
    if differing:
        raise NotThatRun(
            f"The interrupted run was started with other arguments: {'; '.join(differing)}.",
            "Give the same ones, or --force to start again.",
        )


def _differences(before: Any, now: Any, name: str = "") -> list[str]:  # noqa: ANN401 - JSON
    if isinstance(before, dict) and isinstance(now, dict):
        keys = sorted(before.keys() | now.keys())
        return [
            line
            for key in keys
            for line in _differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))
        ]
    return [] if before == now else [f"{name} was {before}, now {now}"]
