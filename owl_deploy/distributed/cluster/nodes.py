"""The nodes of a Ray cluster: joining it, and what has to be alike on all before work begins."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from owl_deploy.distributed.cluster.needs import Need, Node
from owl_deploy.distributed.cluster.store import Store
from owl_deploy.errors import BadInput, OwlError, first_line
from owl_deploy.models import manifest
from owl_deploy.utils.artefact import write_text

UNSHARED = "does not share the output folder with this machine"  # the driver's
_ANSWER_S = 300.0  # a node that is busy takes its time to start a process


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Be the driver of a job on the cluster at `address` ("local" makes one) until the block ends.

    SIGTERM raises `KeyboardInterrupt` until then, as Ctrl-C does: a scheduler ends a job so.
    Raises `BadInput` where there is no cluster, or Ray does not let this Python join it.
    """
    _refuse_silence(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # owl sends nothing anywhere
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address,
            include_dashboard=False if address == "local" else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _no_cluster(address, first_line(error)) from error
    try:
        _at_sigterm(signal.default_int_handler)  # not Ray's, which prints its stack, and aborts
        yield
    finally:
        ray.shutdown()
        _at_sigterm(before)


def _at_sigterm(handler: Any) -> None:  # noqa: ANN401 - what `signal.getsignal` gives
    """Let SIGTERM call `handler`, if there is one that Python knows.

    Outside the main thread, which alone gets signals, nothing changes.
    """
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _refuse_silence(address: str) -> None:
    """Refuse an address that nothing listens at: Ray itself tries for five minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", address)
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise BadInput(f"--ray {address} is no address.", "It is auto, local or HOST:PORT.")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError, ValueError) as error:  # the last of a host that none can be
        raise _no_cluster(address, first_line(error)) from error


def _no_cluster(address: str, why: str) -> BadInput:
    return BadInput(
        f"owl cannot join a Ray cluster at {address}: {why.rstrip('.')}.",
        "Start one with `ray start --head`, or use --ray local.",
    )


def alive() -> list[Node]:
    """The nodes that can take tasks; a head that was started with no CPU is none of them."""
    return [
        Node(node["NodeID"], _name(node), _amounts(node["Resources"]))
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    ]


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"


def _amounts(resources: dict[str, float]) -> Need:
    return Need(int(resources["CPU"]), int(resources.get("memory", 0)), resources.get("GPU", 0.0))


def versions() -> dict[str, str]:
    """The versions here that a result may depend on, and Ray's."""
    return manifest.versions() | {"ray": version("ray")}


def difference(there: dict[str, str], here: dict[str, str]) -> str | None:
    """In words, the first version that differs; None where all agree."""
    for name, own in here.items():
        if there.get(name) != own:
            return f"has {name} {there.get(name, 'none')}, and this machine has {own}"
    return None


@dataclass(frozen=True)
class Sight:
    """What a node sees: its versions, the marker's text, and those of the inputs that it lacks.

    `refused`: what it was told instead of the marker's text, where that is in a store.
    """

    versions: dict[str, str]
    marker: str | None
    missing: tuple[str, ...] = ()
    refused: str = ""


def look(place: Path, marker: Path, sources: Sequence[Path], name: str) -> Sight:
    """What is seen from the node that this runs on; leaves a file `name` beside the `marker`."""
    enter(place)
    text = None
    with contextlib.suppress(OSError):
        text = marker.read_text(encoding="utf-8")
        marker.with_name(name).touch()
    return Sight(versions(), text, tuple(str(one) for one in sources if not one.exists()))


def look_in_store(address: str, marker: str, name: str) -> Sight:
    """As `look`, of a store: the `marker` and the `name` are objects there."""
    try:
        store = Store(address)
        text = store.read(marker)
        store.write(name, "")
    except OwlError as error:
        return Sight(versions(), None, refused=str(error))
    return Sight(versions(), text)


def enter(place: Path) -> None:
    """Work where the driver does, so that a path means the same; absolute ones do without."""
    if place.is_dir():
        os.chdir(place)


@contextlib.contextmanager
def alike(nodes: Sequence[Node], folder: Path, sources: Sequence[Path]) -> Iterator[Path]:
    """Refuse a cluster with a node of other versions, or that does not see what is shared.

    That is the output `folder`, in which each node has to read and to write, and the `sources`.
    Yields a file in it that is there until the block ends, for nodes that join later to look for.
    Raises `BadInput`.
    """
    token = secrets.token_hex(8)
    marker = folder.absolute() / f".owl-shared-{token}"
    write_text(marker, token)
    try:
        shown = (Path.cwd(), marker, tuple(sources))
        for node, sight in _sights(nodes, look, shown, marker.name):
            answered = marker.with_name(f"{marker.name}-{node.id}").exists()
            _refuse(node, refusal(sight, versions(), token, answered=answered))
        yield marker
    finally:
        for path in marker.parent.glob(f"{marker.name}*"):
            path.unlink(missing_ok=True)


def check_store(nodes: Sequence[Node], store: Store) -> None:
    """As `alike`, where each node has to read and to write a store.

    Raises `BadInput`, and as `Store` does.
    """
    token = secrets.token_hex(8)
    marker = f".owl-shared-{token}"
    store.write(marker, token)
    try:
        for node, sight in _sights(nodes, look_in_store, (store.address, marker), marker):
            answered = store.read(f"{marker}-{node.id}") is not None
            _refuse(node, refusal(sight, versions(), token, answered=answered, store=store.address))
    finally:
        store.remove(marker, *(f"{marker}-{node.id}" for node in nodes))


def _refuse(node: Node, why: tuple[str, str] | None) -> None:
    if why is not None:
        message, way_out = why
        raise BadInput(f"The node {node.name} {message}.", way_out)


def _sights(
    nodes: Sequence[Node], look: Callable[..., Sight], shown: tuple[Any, ...], name: str
) -> Iterator[tuple[Node, Sight]]:
    """What each node sees that does `look` at what is `shown`; it answers by `name` and its id."""
    asked = [
        ray.remote(look)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        )
        .remote(*shown, f"{name}-{node.id}")
        for node in nodes
    ]
    for node, one in zip(nodes, asked, strict=True):
        try:
            yield node, ray.get(one, timeout=_ANSWER_S)
        except (RayError, ImportError) as error:
            raise BadInput(
                f"The node {node.name} cannot run owl: {first_line(error)}.",
                "Install the same version of owl-deploy on every node.",
            ) from error


def refusal(
    sight: Sight, here: dict[str, str], token: str, *, answered: bool, store: str | None = None
) -> tuple[str, str] | None:
    """What is wrong with a node by what it sees, and a way out; None for nothing.

    `here`: the versions of the driver; `token`: what it wrote in the marker; `answered`: whether it
    sees what the node wrote; `store`: where that is in one.
    """
    if differs := difference(sight.versions, here):
        return differs, "Install the same versions on every node."
    if sight.refused:
        return f"cannot use the store: {sight.refused.rstrip('.')}", ""
    if (sight.marker != token or not answered) and store is not None:
        return (
            f"does not share {store} with this machine",
            "Choose a store that means the same on every node.",
        )
    if sight.marker != token or not answered:
        return (
            UNSHARED,
            "Choose one that every node mounts at the same path, or a --store.",
        )
    if sight.missing:
        return (
            f"does not see {sight.missing[0]}",
            "Put it where every node sees it, at the same path.",
        )
    return None
