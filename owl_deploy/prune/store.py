"""What a pruning has finished so far, on disk beside its output, so that a killed run resumes.

The hidden folder `.NAME.owl-partial` holds `run.json` (what was asked), `plan.json` (what the dense
pass measured) and one safetensors file a finished block, each written whole or not at all.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from owl_deploy.artefact import publish, write_json
from owl_deploy.errors import BadInput


class Store:
    """The partial result of one run; made by the run that starts it, opened by one that resumes.

    Raises `BadInput` when another run uses it, when there is one and `resume` is not asked for (and
    `force` neither), or when the one that is there was started with other arguments.
    """

    def __init__(self, output: Path, asked: dict[str, Any], *, resume: bool, force: bool) -> None:
        output = output.absolute()
        self.output = output
        self.folder = partial_folder(output)
        there = (self.folder / "run.json").is_file()
        if there and not resume and not force:
            raise BadInput(
                f"An earlier run for {output} was interrupted.",
                "Use --resume to continue it, or --force to start again.",
            )
        if resume and not there:
            raise BadInput(f"There is no interrupted run for {output} to resume.")
        self.folder.mkdir(exist_ok=True)
        self._lock = self._take_lock()
        if there and resume:
            try:
                _refuse_other_arguments(self.read("run.json"), asked)
            except BadInput:
                self.close()
                raise
        else:
            self._clear()
            write_json(self.folder / "run.json", asked)
        self.resumed = resume

    def _take_lock(self) -> IO[bytes]:
        lock = (self.folder / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            raise BadInput(f"Another run is writing {self.output}.") from error
        return lock

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def read(self, name: str) -> Any:  # noqa: ANN401 - any JSON value
        """The JSON file `name`, or None when it is not there yet."""
        path = self.folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def write(self, name: str, value: Any) -> None:  # noqa: ANN401 - any JSON value
        """Write a JSON file, durably."""
        write_json(self.folder / name, value)

    def save(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Write a finished block's tensors (names within the block), durably."""
        from safetensors.torch import save_file

        temporary = self.folder / "unfinished"
        named = {f"{name}.{key}": value.contiguous() for key, value in weights.items()}
        save_file(named, temporary, metadata={"format": "pt"})
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(self.path(name))

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """A finished block's tensors, or None when it is not finished."""
        from safetensors.torch import load_file

        path = self.path(name)
        if not path.is_file():
            return None
        return {key.removeprefix(f"{name}."): value for key, value in load_file(path).items()}

    @property
    def has_work(self) -> bool:
        """Whether anything is there that a resumed run would not have to do again."""
        return (self.folder / "plan.json").is_file()

    def finish(self) -> None:
        """Make the folder, in which the checkpoint now lies, the output; drop what is the run's."""
        for path in (*self.folder.glob("*.block"), self.folder / "lock"):
            path.unlink()
        for name in ("run.json", "plan.json"):
            (self.folder / name).unlink()
        publish(self.folder, self.output)
        self._lock.close()

    def discard(self) -> None:
        """Delete it all."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.close()

    def close(self) -> None:
        """Leave it for a run that resumes."""
        self._lock.close()

    def path(self, name: str) -> Path:
        """The file of the block `name`: a shard of a checkpoint, with the tensors' whole names."""
        return self.folder / f"{name}.block"


def partial_folder(output: Path) -> Path:
    """Where the partial result for `output` lies."""
    return output.absolute().with_name(f".{output.name}.owl-partial")


def _refuse_other_arguments(before: dict[str, Any], asked: dict[str, Any]) -> None:
    asked = json.loads(json.dumps(asked))
    differing = _differences(before, asked)
    if differing:
        raise BadInput(
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
