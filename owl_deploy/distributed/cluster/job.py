"""One task of a plan, on the node that it was given: what Ray runs there."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ray

from owl_deploy.distributed.cluster import mirror
from owl_deploy.distributed.cluster.mirror import Share
from owl_deploy.distributed.cluster.nodes import UNSHARED, alive, difference, enter, versions
from owl_deploy.distributed.pipeline import Task, do, state
from owl_deploy.errors import EnvironmentFailed, is_out_of_memory
from owl_deploy.utils.artefact import wait_for_writer
from owl_deploy.utils.ending import explained
from owl_deploy.utils.record import Record, keep, skipped, with_ending


@dataclass(frozen=True)
class Job:
    """What a node is told beside the task: the driver's folder, where the log goes (a path without
    an ending), the cores that the task has, whether those are to be all, the driver's versions and
    its command line; the file by which a node knows that it sees the driver's folder; its share of
    a store where there is one, and then there is no such file, and the log goes there.
    """

    place: Path
    log: Path
    cores: int
    alone: bool
    versions: dict[str, str]
    command: list[str]
    marker: Path | None = None
    share: Share | None = None


def perform(task: Task, job: Job, *before: Record) -> Record:
    """Do a task if it is not done, once those `before` it are; how it ended, whatever that is.

    A worker is for one task: what it printed is in the task's log, what it held is given back.
    """
    if left := [one for one in before if one.state != "done"]:
        return skipped(task.title, left[0])
    sys.argv = job.command  # which an artefact tells; Ray's own says where its node is
    node = ray.get_runtime_context().get_node_id()
    record = Record(
        state="running", title=task.title, node=node, process=os.getpid(), started=time.time()
    )
    if job.share is None:
        enter(job.place)
    if job.marker is not None and not job.marker.exists():  # what is written here nobody would see
        return record.now("failed", f"A node joined that {UNSHARED}.", 4)
    _tell(job, record)
    log = job.log if job.share is None else job.share.own("logs")
    with logged(with_ending(log, ".log")):
        record = _ended(task, job, record)
    _tell(job, record)
    return record


def _tell(job: Job, record: Record) -> None:
    if job.share is None:
        keep(job.log, record)
    else:
        job.share.tell(record)


def _ended(task: Task, job: Job, record: Record) -> Record:
    try:
        _refuse_other_node(job, record.node)
        task = _with_threads(task, job.cores)
        if job.share is not None:
            mirror.perform(task, job.share, job.place)
        else:
            # Whoever was at it before, and was lost with its node, holds the output for a while.
            wait_for_writer(task.output)
            if state(task) != "done":
                do(task)
    except Exception as error:
        why = explained(error)
        if why is not error:
            traceback.print_exception(error)
        if is_out_of_memory(error):
            why = EnvironmentFailed("There was not enough memory.", "See --needs.")
        return record.now("failed", str(why), why.exit_code)
    return record.now("done")


def _refuse_other_node(job: Job, node: str) -> None:
    """Nodes may join after the driver has looked at them all: see `nodes.alike`."""
    if differs := difference(versions(), job.versions):
        raise EnvironmentFailed(f"A node joined that {differs}.")
    (here,) = (one for one in alive() if one.id == node)
    if job.alone and here.has.cores > job.cores:
        raise EnvironmentFailed(
            f"A larger node joined, {here.name}, on which the benchmark would not be alone.",
            "Run again.",
        )


def _with_threads(task: Task, cores: int) -> Task:
    """The task with as many threads as it has cores, if it can be told and was not."""
    if getattr(task, "threads", cores) is not None:
        return task
    return task.model_copy(update={"threads": cores})


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """Add what this process and its children print to `file`, until the block ends."""
    with (
        file.open("a", encoding="utf-8", errors="replace", buffering=1) as log,
        contextlib.redirect_stdout(log),
        contextlib.redirect_stderr(log),
    ):
        saved = [os.dup(number) for number in (1, 2)]
        try:
            for number in (1, 2):
                os.dup2(log.fileno(), number)
            yield
        finally:
            for number, before in zip((1, 2), saved, strict=True):
                os.dup2(before, number)
                os.close(before)
