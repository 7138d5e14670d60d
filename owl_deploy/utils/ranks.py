"""The processes that share one run, as torchrun starts them; a process by itself is a group of one.

All is told by the environment that torchrun makes. A group of one does nothing and costs nothing:
`torch.distributed` is not imported. In a larger one every process (a *rank*) makes the same calls
in the same order; rank 0 leads, which is to say that it alone writes and speaks. On CPUs ranks talk
by gloo, on GPUs by NCCL.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import psutil

from owl_deploy.errors import BadInput, EnvironmentFailed, is_out_of_memory
from owl_deploy.utils import container

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
R = TypeVar("R")

_PATIENCE = timedelta(hours=2)  # for the slowest Linear of a block, and for writing the result
_A_SENTENCE_S = 10.0  # until another rank has said why the run ends
# What each process chooses by the machine that it is on, where the option is left out.
_TO_NAME = {"device": ", and name --device", "dtype": ", and name --dtype"}


@dataclass(frozen=True)
class Ranks:
    """The group, seen by one of its members: rank `rank` of `size`.

    What is called "together" is called by all ranks, and ends in all of them or in none: where one
    of them has died it raises `EnvironmentFailed` in the others.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether it is this one that writes and speaks."""
        return self.rank == 0

    def part(self, rows: "torch.Tensor") -> "torch.Tensor":
        """This rank's share of `rows`: neighbours, one more or less than another rank's."""
        return rows.tensor_split(self.size)[self.rank]

    def reduce(self, tensor: "torch.Tensor", owner: int) -> None:
        """Together: make `tensor` the sum over all ranks on `owner`; elsewhere it is then spent."""
        if self.size > 1:
            import torch.distributed

            with _talking():
                torch.distributed.reduce(tensor, owner)

    def summed(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Together: the sum over all ranks, on each of them with the same bits."""
        if self.size == 1:
            return tensor
        import torch.distributed

        total = tensor.clone()
        with _talking():
            torch.distributed.all_reduce(total)
        return total

    def gathered(self, value: T) -> list[T]:
        """Together: the `value` of every rank, by rank; any that can be pickled."""
        if self.size == 1:
            return [value]
        import torch.distributed

        found: list[Any] = [None] * self.size
        with _talking():
            torch.distributed.all_gather_object(found, value)
        return found

    def check_alike(self, told: Mapping[str, object]) -> None:
        """Together: raise `BadInput` for what is not the same in all processes, by its name.

        What only some of them tell is not.
        """
        seen = self.gathered(dict(told))
        for what in dict.fromkeys(name for one in seen for name in one):
            if any(one.get(what) != seen[0].get(what) for one in seen):
                raise BadInput(
                    f"Not all processes of this run have the same {what}.",
                    f"Give every node the same files and options{_TO_NAME.get(what, '')}.",
                )

    def shared(self, items: Sequence[T], do: Callable[[Sequence[T]], Sequence[R]]) -> list[R]:
        """Together: what `do` makes of each of the `items`, the same on all ranks, in their order.

        `do` is called once, with every `size`-th of them: neighbours are often alike in what they
        cost.
        """
        found = self.gathered(list(do(items[self.rank :: self.size])))
        return [found[index % self.size][index // self.size] for index in range(len(items))]

    def from_leader(self, make: Callable[[], T]) -> T:
        """Together: what `make`, which the leader alone calls, gives there."""
        value: list[Any] = [make() if self.leads else None]
        if self.size > 1:
            import torch.distributed

            with _talking():
                torch.distributed.broadcast_object_list(value, 0)
        found: T = value[0]
        return found

    def merged(
        self, own: "Mapping[str, torch.Tensor]", device: "torch.device"
    ) -> "dict[str, torch.Tensor]":
        """Together: the tensors of all ranks, by names that no two have; on the CPU, as `own` is.

        They travel by `device`.
        """
        if self.size == 1:
            return dict(own)
        import torch

        told = {name: (tensor.shape, tensor.dtype) for name, tensor in own.items()}
        found: dict[str, torch.Tensor] = {}
        for rank, names in enumerate(self.gathered(told)):
            for name, (shape, dtype) in names.items():
                sent = own.get(name)
                if sent is None:
                    sent = torch.empty(shape, dtype=dtype)
                carried = sent.contiguous().flatten().view(torch.uint8).to(device)
                with _talking():
                    torch.distributed.broadcast(carried, rank)
                found[name] = carried.to("cpu").view(dtype).view(shape)
        return found


ALONE = Ranks()


def join(told: Mapping[str, str]) -> Ranks:
    """The group that torchrun started this process in; `ALONE` where it did not.

    `told`: the versions of packages, by name, which have to be the same everywhere: raises
    `BadInput` where they are not. A process joins once, and stays until it ends. Told to end by
    torchrun (SIGTERM), since another has, it then raises `KeyboardInterrupt`.
    """
    if _number("WORLD_SIZE", 1) == 1:
        return ALONE
    import torch.distributed

    if not torch.distributed.is_initialized():
        _start()
    ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size())
    _refuse_unlike(ranks.gathered(dict(told)))
    return ranks


def leads() -> bool:
    """Whether this process is the one that writes and speaks; known before it has joined."""
    return _number("RANK", 0) == 0


def local_rank() -> int | None:
    """Which of its node's processes this one is; None where it is alone."""
    return _number("LOCAL_RANK", 0) if _number("WORLD_SIZE", 1) > 1 else None


def free_memory() -> int:
    """The bytes of memory that this process may count on: its share of what the host has free, or
    of what its container may still take.
    """
    free = min(psutil.virtual_memory().available, container.free_memory())
    return int(free) // _number("LOCAL_WORLD_SIZE", 1)


@contextlib.contextmanager
def one_voice() -> Iterator[bool]:
    """Yield whether it is this process that says why the run ends; the others wait until it has.

    The first to ask, whichever it is; before it has joined, one of each node.
    """
    if not _stores:
        yield not local_rank()
        return
    store = _stores[0]
    try:
        first = store.add("owl/ends", 1) == 1
    except RuntimeError:  # the node that kept count is gone
        first = True
    yield first
    with contextlib.suppress(RuntimeError):
        if first:
            store.set("owl/said", "")
        else:
            store.wait(["owl/said"], timedelta(seconds=_A_SENTENCE_S))


def leave(code: int) -> NoReturn:
    """End this process with the exit `code`; one of a group without the interpreter's own end.

    A training that shards leaves threads of gloo behind (PyTorch's caches of DTensor hold the
    group), and one that sees the interpreter end may call std::terminate, when all is done.
    """
    if not _stores:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed from the start
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone
            stream.flush()
    os._exit(code)


_stores: list[Any] = []  # the key-value store of the group that was joined


def _number(name: str, default: int) -> int:
    """A number of torchrun's environment; `default` where torchrun did not start this process."""
    return int(os.environ.get(name, default)) if "TORCHELASTIC_RUN_ID" in os.environ else default


def _start() -> None:
    # nn first: what is imported after the start has the group as default arguments, whose threads
    # then outlive its end, into the interpreter's, where one of them may call std::terminate.
    import torch.distributed.nn
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _talking():
        store, rank, size = next(iter(rendezvous("env://", timeout=_PATIENCE)))
        _stores.append(store)
        torch.distributed.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE
        )
    atexit.register(torch.distributed.destroy_process_group)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _told_to_end)


def _told_to_end(_signal: int, _frame: FrameType | None) -> None:
    """End as Ctrl-C does: nothing takes that for an error of its own and drops what is done."""
    raise KeyboardInterrupt("torchrun ended this process, which had finished nothing yet")


def _ended() -> EnvironmentFailed:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already, and has said why
    return EnvironmentFailed(
        "Another process of this run has ended or does not answer.",
        "torchrun says which one; a run that has kept something goes on with --resume, and answers "
        "to tasks are kept.",
    )


@contextlib.contextmanager
def _talking() -> Iterator[None]:
    """Make a sentence of what torch says when another rank has gone."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise _ended() from error


@contextlib.contextmanager
def talking() -> Iterator[None]:
    """Make a sentence of another rank's end, where a library talks to it that computes as well."""
    try:
        yield
    except RuntimeError as error:
        words = str(error).lower()
        if any(backend in words for backend in ("gloo", "nccl")):
            raise _ended() from error
        raise


def _refuse_unlike(told: list[dict[str, str]]) -> None:
    for rank, versions in enumerate(told):
        for name in sorted(told[0].keys() | versions.keys()):
            first, other = told[0].get(name, "none"), versions.get(name, "none")
            if first != other:
                raise BadInput(
                    f"The processes of this run are unlike: rank 0 has {name} {first}, "
                    f"rank {rank} {other}.",
                    "Install the same on every node.",
                )
