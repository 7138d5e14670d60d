"""How the tasks of a plan stand or ended, wherever they ran."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from owl_deploy.errors import OwlError
from owl_deploy.utils.artefact import write_text


class Record(BaseModel):
    """How a task stands or ended: on which node, from when to when (UTC, seconds), and why."""

    model_config = ConfigDict(frozen=True)

    state: Literal["running", "done", "failed", "skipped"]
    title: str
    said: str = ""
    code: int = 0  # the exit code of what failed
    node: str = ""
    process: int = 0
    started: float = 0.0
    ended: float | None = None

    def now(self, state: Literal["done", "failed"], said: str = "", code: int = 0) -> "Record":
        """The same, ended now."""
        update = {"state": state, "said": said, "code": code, "ended": time.time()}
        return self.model_copy(update=update)


def skipped(title: str, left: Record) -> Record:
    """The record of a task that needs what was `left` undone."""
    why = left.said if left.state == "skipped" else f"it needs what failed: {left.title}"
    return Record(state="skipped", title=title, said=why)


def with_ending(log: Path, ending: str) -> Path:
    """The file of a task's `log` with this `ending`; its name may have dots of its own."""
    return log.with_name(log.name + ending)


def keep(log: Path, record: Record) -> None:
    """Leave the record of a task beside its log."""
    write_text(with_ending(log, ".json"), record.model_dump_json(indent=2) + "\n")


def kept(log: Path) -> Record | None:
    """The record that a task has left beside its log; None where there is none."""
    with contextlib.suppress(OSError, ValueError):
        return Record.model_validate_json(with_ending(log, ".json").read_text(encoding="utf-8"))
    return None


class Unfinished(OwlError):
    """Some tasks of a plan failed, or were skipped for that; the exit code is that of the first."""

    def __init__(self, left: Sequence[Record], tasks: int, where: Path) -> None:
        """`left`: what is not done of so many `tasks`, in their order; `where` tells more of it."""
        failed = [one for one in left if one.state == "failed"]
        skipped = len(left) - len(failed)
        told = "; ".join(f"{one.title}: {one.said}".rstrip(".") for one in failed)
        also = f", and {skipped} that need them were skipped" if skipped else ""
        super().__init__(
            f"{len(failed)} of {tasks} tasks failed{also}. {told}.",
            f"See {where}; the same command goes on from here.",
        )
        self.exit_code = failed[0].code
