"""The driver: a plan's tasks go to Ray, as soon as it starts, and their ends come back."""

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError, TaskCancelledError

from owl_deploy.distributed.cluster import RETRIES, job, nodes
from owl_deploy.distributed.cluster.interrupt import asking_once
from owl_deploy.distributed.cluster.job import Job
from owl_deploy.distributed.cluster.needs import ROWS, Given, Need, needs_of
from owl_deploy.distributed.cluster.show import Board
from owl_deploy.distributed.cluster.store import Store
from owl_deploy.distributed.cluster.stored import StoredPlan, name_of
from owl_deploy.distributed.pipeline import Plan, Task, needs, survey
from owl_deploy.errors import OwlError, first_line, with_type
from owl_deploy.utils.artefact import make_folder
from owl_deploy.utils.progress import error_console
from owl_deploy.utils.record import Record, keep, kept, skipped, with_ending

PATIENCE_S = 300.0  # for a node to come back that alone could run a task
_TICK_S, _STOPPING_S = 1.0, 20.0


def execute(
    plan: Plan,
    folder: Path,
    address: str,
    given: Given,
    model_bytes: int,
    store: str | None = None,
) -> dict[int, Record]:
    """Do what is not done of `plan` on the Ray cluster at `address`, which shares `folder`.

    With a `store`, the address of one, the cluster shares that instead: what is done lies there,
    and results are copied to `folder` at the end.

    `given`: see `read_needs`; `model_bytes`: the size of the dense checkpoint. Leaves a log and a
    record of each task in the folder's `logs`. A task whose worker dies is done again, one that
    fails stops only those that need it: the records of what is left, by its number in the plan, are
    returned. Raises `BadInput` for what can be known before work begins. Ctrl-C cancels all; on a
    terminal it asks once.
    """
    stored = None if store is None else StoredPlan(Store(store), plan, folder)
    states = survey(plan) if stored is None else stored.survey()
    todo = [index for index, state in enumerate(states) if state != "done"]
    left = _execute(plan, todo, folder, address, given, model_bytes, stored) if todo else {}
    if stored is not None:
        stored.take_results()
    return left


def _execute(
    plan: Plan,
    todo: list[int],
    folder: Path,
    address: str,
    given: Given,
    model_bytes: int,
    stored: StoredPlan | None,
) -> dict[int, Record]:
    with nodes.joined(address), contextlib.ExitStack() as stack:
        there = nodes.alive()
        kinds = [_kind(plan[index]) for index in todo]
        wanted = needs_of(kinds, there, given, model_bytes)
        make_folder(folder / "logs")
        jobs = {index: _job(plan[index], folder, wanted) for index in todo}
        if stored is None:
            marker = stack.enter_context(nodes.alike(there, folder, sources(plan)))
            jobs = {index: replace(one, marker=marker) for index, one in jobs.items()}
        else:
            nodes.check_store(there, stored.store)
            shares = stored.shares(todo, [one.log.name for one in jobs.values()])
            jobs = {index: replace(one, share=shares[index]) for index, one in jobs.items()}
        run = _Run(plan, jobs, wanted, stored)
        with _cancelled_at_the_end(run):
            run.follow()
    return {index: one for index, one in sorted(run.records.items()) if one.state != "done"}


def sources(plan: Plan) -> list[Path]:
    """The files and folders that the plan reads and does not make."""
    made = {task.output for task in plan}
    read = dict.fromkeys(Path(one) for task in plan for one in task.reads() if one)
    return [path for path in read if path not in made and path.exists()]


def _kind(task: Task) -> str:
    return str(getattr(task, "task"))  # noqa: B009 - each kind has it, and each of a type of its own


def _job(task: Task, folder: Path, wanted: dict[str, Need]) -> Job:
    kind = _kind(task)
    return Job(
        place=Path.cwd(),
        log=log_of(task, folder),
        cores=wanted[kind].cores,
        alone=ROWS[kind].alone,
        versions=nodes.versions(),
        command=sys.argv,
    )


def log_of(task: Task, folder: Path) -> Path:
    """Where the log of a task lies, without an ending: no two have the same."""
    name = name_of(task, folder).replace("/", "-").removesuffix(".json")
    return folder.absolute() / "logs" / name


@dataclass
class _Run:
    """The tasks that Ray has, and the records of those that ended."""

    plan: Plan
    jobs: dict[int, Job]
    wanted: dict[str, Need]
    stored: StoredPlan | None = None
    records: dict[int, Record] = field(default_factory=dict)
    pending: dict[Any, int] = field(default_factory=dict)
    stuck: dict[int, float] = field(default_factory=dict)  # since when no node can run it

    def follow(self) -> None:
        """Hand all tasks to Ray, and show how they stand until all have ended."""
        self._submit()
        console = error_console()
        titles = [self.plan[index].title for index in self.jobs]
        with Board(titles, console) as board, asking_once(console):
            while self.pending:
                ready, _ = ray.wait(list(self.pending), timeout=_TICK_S)
                for reference in sorted(ready, key=self.pending.__getitem__):
                    index = self.pending.pop(reference)
                    self.records[index] = self._end(index, reference)
                    board.tell(self.records[index])
                running = self._running()
                self._give_up_stuck(running)
                board.show(list(self.records.values()), list(running.values()))

    def _submit(self) -> None:
        perform = ray.remote(max_calls=1)(job.perform)  # a process for each: see `perform`
        references: dict[int, Any] = {}
        if self.stored is not None:
            self.stored.forget([one.log.name for one in self.jobs.values()])
        waits = needs(self.plan)
        for index, one in self.jobs.items():
            task = self.plan[index]
            with_ending(one.log, ".json").unlink(missing_ok=True)  # of an earlier run
            references[index] = perform.options(
                **self.wanted[_kind(task)].options(),
                name=task.title,
                max_retries=RETRIES,
                scheduling_strategy="SPREAD",
            ).remote(task, one, *(references[n] for n in waits[index] if n in references))
        self.pending = {reference: index for index, reference in references.items()}

    def _end(self, index: int, reference: Any) -> Record:  # noqa: ANN401 - Ray's type is generic
        """How a task ended that Ray has no more."""
        task = self.plan[index]
        try:
            record = Record.model_validate(ray.get(reference))
            if self.stored is not None and record.started:
                self.stored.take_log(self.jobs[index].log, record)
            return record
        except RayError as error:  # its own, or that of one that it needs
            before = [self.records[n] for n in needs(self.plan)[index] if n in self.records]
            if left := [one for one in before if one.state != "done"]:
                return skipped(task.title, left[0])
            why = _reason(error, self.wanted[_kind(task)])
            log = self.jobs[index].log
            told = kept(log) if self.stored is None else None  # it says that the task runs
            record = (told or Record(state="failed", title=task.title)).now("failed", why, 4)
            with contextlib.suppress(OwlError, OSError):
                keep(log, record)
            return record

    def _running(self) -> dict[int, Record]:
        """The records of the tasks that run; one whose node is lost says so no more."""
        if self.stored is not None:
            found = self.stored.running({n: self.jobs[n].log.name for n in self.pending.values()})
        else:
            told = {index: kept(self.jobs[index].log) for index in self.pending.values()}
            found = {index: one for index, one in told.items() if one is not None}
        there = {node.id for node in nodes.alive()}
        return {i: one for i, one in found.items() if one.state == "running" and one.node in there}

    def _give_up_stuck(self, running: dict[int, Record]) -> None:
        """Cancel what waits for a node that has not come back in `PATIENCE_S`."""
        there = nodes.alive()
        for reference, index in self.pending.items():
            need = self.wanted[_kind(self.plan[index])]
            if index in running or any(need.fits(node) for node in there):
                self.stuck.pop(index, None)
            elif time.monotonic() - self.stuck.setdefault(index, time.monotonic()) > PATIENCE_S:
                ray.cancel(reference)


def _reason(error: RayError, need: Need) -> str:
    if isinstance(error, TaskCancelledError):  # see `_give_up_stuck`
        return f"no node that is left has {need}"
    if isinstance(error, RayTaskError):  # its record could not be kept, say
        return with_type(error.cause)
    return f"its worker died, and did so again {RETRIES} times ({first_line(error)})"


@contextlib.contextmanager
def _cancelled_at_the_end(run: _Run) -> Iterator[None]:
    """Cancel what is still there when the block ends, and let it give its outputs back."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("all tasks are cancelled; the same command goes on") from error
    finally:
        for reference in run.pending:
            ray.cancel(reference)
        if run.pending:
            ray.wait(list(run.pending), num_returns=len(run.pending), timeout=_STOPPING_S)
