"""The driver's side of a plan whose artefacts lie in a store: what is done, what the nodes need."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from owl_deploy.distributed.cluster.mirror import Share
from owl_deploy.distributed.cluster.store import INPUTS, LOGS, Content, Store, Stored, contents_of
from owl_deploy.distributed.pipeline import Bench, Plan, State, Task, agree, digest, needs
from owl_deploy.errors import OwlError
from owl_deploy.models.checkpoint import file_names
from owl_deploy.utils.artefact import make_folder, own, staged_folder, write_json, write_text
from owl_deploy.utils.progress import bar, error_console
from owl_deploy.utils.record import Record, keep, with_ending

ADDRESSES = "store.json"  # in the output folder: where each artefact lies
_LOOK_S = 5.0  # between two looks at the records of what runs


class StoredPlan:
    """A plan whose artefacts lie in `store`, under their names in the output `folder`."""

    def __init__(self, store: Store, plan: Plan, folder: Path) -> None:
        self.store, self._plan, self._folder = store, plan, folder
        self._made = {task.output: name_of(task, folder) for task in plan}
        self._found: dict[str, Stored | None] = {}
        self._running: dict[int, Record] = {}
        self._looked = 0.0

    def survey(self) -> list[State]:
        """As `pipeline.survey`, by the markers in the store."""
        states: list[State] = []
        for task, before in zip(self._plan, needs(self._plan), strict=True):
            name = self._made[task.output]
            found = self._found[name] = self.store.stored(name)
            ready = all(states[number] == "done" for number in before)
            if found is None or not found.is_whole:
                states.append("to do")
            elif ready and agree(found.asked, task.asked(self._digests(task))):
                states.append("done")
            else:
                states.append("outdated")
        return states

    def _digests(self, task: Task) -> list[str]:
        """The digests of what a task reads, of which all that a plan makes is stored."""
        made = [self._found.get(self._made.get(Path(one), "")) for one in task.reads()]
        return [
            digest(one) if known is None else known.digest
            for one, known in zip(task.reads(), made, strict=True)
        ]

    def shares(self, todo: Sequence[int], logs: Sequence[str]) -> dict[int, Share]:
        """What the tasks of these numbers are told; what they read is in the store by then.

        `logs`: the names of their logs.
        """
        inputs: dict[str, Stored] = {}
        files: dict[str, tuple[Path, int]] = {}
        for one in dict.fromkeys(one for index in todo for one in self._plan[index].reads()):
            if one and Path(one) not in self._made and Path(one).exists():
                inputs[str(one)] = _input(Path(one), files)
        self._put(files)
        return {
            index: Share(
                address=self.store.address,
                name=self._made[self._plan[index].output],
                log=log,
                reads=tuple(
                    (str(one), inputs.get(str(one)) or self._made.get(Path(one)))
                    for one in self._plan[index].reads()
                ),
            )
            for index, log in zip(todo, logs, strict=True)
        }

    def _put(self, files: dict[str, tuple[Path, int]]) -> None:
        """Store the `files` that are not there, by their keys, and say how much that is."""
        if not files:
            return
        there = self.store.sizes(INPUTS)
        missing = {key: one for key, one in files.items() if there.get(key) != one[1]}
        size = sum(bytes for _, bytes in missing.values())
        told = f"{len(missing)} of {len(files)} input files are stored now, {size / 1e6:.1f} MB"
        error_console().print(f"{told}; the others are there.", highlight=False, soft_wrap=True)
        if missing:
            with bar("Storing the inputs, MB", size / 1e6) as advance:
                for key, (path, _) in missing.items():
                    self.store.put(path, key, lambda sent: advance(sent / 1e6))

    def forget(self, logs: Sequence[str]) -> None:
        """Remove the records that an earlier run has left."""
        there = self.store.sizes(LOGS)
        keys = [f"{LOGS}/{log}.json" for log in logs]
        self.store.remove(*(key for key in keys if key in there))

    def running(self, logs: dict[int, str]) -> dict[int, Record]:
        """The records of tasks that run, as of some seconds ago; `logs`: of all that may."""
        if time.monotonic() - self._looked > _LOOK_S:
            self._looked = time.monotonic()
            with contextlib.suppress(OwlError):
                self._running = self._look(logs)
        return {index: one for index, one in self._running.items() if index in logs}

    def _look(self, logs: dict[int, str]) -> dict[int, Record]:
        keys = {index: f"{LOGS}/{log}.json" for index, log in logs.items()}
        there = self.store.sizes(LOGS)
        found = {}
        for index, key in keys.items():
            if key in there:
                with contextlib.suppress(ValidationError):
                    found[index] = Record.model_validate_json(self.store.read(key) or "")
        return {index: one for index, one in found.items() if one.state == "running"}

    def take_log(self, log: Path, record: Record) -> None:
        """Keep the record of a task beside its log, and what it has printed in it."""
        keep(log, record)
        with contextlib.suppress(OwlError, OSError):
            text = self.store.read(f"{LOGS}/{log.name}.log")
            if text is not None:
                write_text(with_ending(log, ".log"), text)

    def take_results(self) -> None:
        """Copy the plan's results to their places, and leave there where all else lies."""
        make_folder(self._folder)
        places = {}
        for task in self._plan:
            name = self._made[task.output]
            stored = self.store.stored(name)
            if stored is None:
                continue
            if isinstance(task, Bench):
                self._take(task, name, stored)
            elif stored.is_folder:
                places[name] = self.store.place(f"{name}/{stored.version}")
        write_json(self._folder / ADDRESSES, places)
        if places:
            error_console().print(
                f"Checkpoints and deployments lie in {self.store.address}; "
                f"{self._folder / ADDRESSES} says where each does.",
                highlight=False,
                soft_wrap=True,
            )

    def _take(self, task: Task, name: str, stored: Stored) -> None:
        """Copy an artefact to its place, unless that holds it."""
        if task.is_whole() and digest(task.output) == stored.digest:
            return
        with staged_folder(task.output, force=True) as staging:
            for path, file in stored.files.items():
                (staging / path).parent.mkdir(parents=True, exist_ok=True)
                self.store.fetch(file, staging / path, self.store.again(name))


def name_of(task: Task, folder: Path) -> str:
    """The name of a task's artefact in a store: its path in the output `folder`."""
    output = task.output.absolute()
    if output.is_relative_to(folder.absolute()):
        output = output.relative_to(folder.absolute())
    return "/".join(part for part in output.parts if part != "/")


def _input(path: Path, files: dict[str, tuple[Path, int]]) -> Stored:
    """What is to be stored of a file or a folder, whose own files go into `files` by their keys."""
    is_folder = path.is_dir()
    base = path if is_folder else path.parent
    found = [path / name for name in file_names(path)] if is_folder else [path]
    contents = contents_of(base, map(own, found))
    files.update({_key(one): (base / name, one.bytes) for name, one in contents.items()})
    return Stored(
        is_folder=is_folder,
        digest=digest(path),
        files={name: one.at(_key(one)) for name, one in contents.items()},
    )


def _key(content: Content) -> str:
    return f"{INPUTS}/{content.sha256}"
