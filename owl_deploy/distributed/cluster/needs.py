"""What a kind of task needs of a node, and whether there is one that has it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from owl_deploy.errors import BadInput, unknown_name

GIB = 2**30


@dataclass(frozen=True)
class Need:
    """What a task has for itself while it runs: cores, bytes of memory, GPUs."""

    cores: int = 1
    memory: int = 0
    gpus: float = 0

    def __str__(self) -> str:
        parts = [f"{self.cores} cpu"]
        parts += [f"{self.memory / GIB:.1f} GiB"] if self.memory else []
        parts += [f"{self.gpus:g} gpu"] if self.gpus else []
        return ", ".join(parts)

    def fits(self, node: "Node") -> bool:
        """Whether the node, were it idle, has that much."""
        has = node.has
        return self.cores <= has.cores and self.memory <= has.memory and self.gpus <= has.gpus

    def options(self) -> dict[str, Any]:
        """The same in Ray's words."""
        return {"num_cpus": self.cores, "memory": self.memory, "num_gpus": self.gpus}


@dataclass(frozen=True)
class Node:
    """A node of the cluster: its name, and what Ray may give away of it."""

    id: str
    name: str
    has: Need

    def __str__(self) -> str:
        return f"{self.name} has {self.has}"


@dataclass(frozen=True)
class Row:
    """What a kind of task needs where the user says nothing, as far as a node has it.

    `memory` is in times of the dense checkpoint's size. `alone`: all cores of its node.
    """

    cores: int
    memory: float = 0
    gpus: float = 0
    alone: bool = False


# Rough, to pack nodes by. In float32 a deployment is twice a checkpoint in bfloat16: `evaluate` has
# it in memory, `export` as it is checked. `prune` holds a block, and what goes into it.
ROWS = {
    "prune": Row(cores=4, memory=1, gpus=1),
    "export": Row(cores=2, memory=3),
    "evaluate": Row(cores=4, memory=3),
    "bench": Row(cores=1, alone=True),
}
_LEAST_GPU = 1e-4  # Ray counts in these
_MOST = 1e9  # of cores, GPUs, or TB
_PART = re.compile(r"(\d+(?:\.\d+)?)\s*(cpu|gpu|([MGT])(i?)B)", re.IGNORECASE)

# For each kind, what the user said of it: values of `Need` by their names.
Given = Mapping[str, Mapping[str, Any]]


def read_needs(lines: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The needs in lines such as "prune=4cpu,16GB,1gpu", by kind; raises `BadInput`."""
    found: dict[str, dict[str, Any]] = {}
    for line in lines:
        kind, _, said = line.partition("=")
        if kind not in ROWS:
            raise unknown_name("kind of task in --needs", kind, ROWS)
        found.setdefault(kind, {}).update(_read_part(line, part) for part in said.split(","))
        if ROWS[kind].alone and "cores" in found[kind]:
            raise BadInput(f"--needs {line}: a {kind} has all cores of its node.", "Leave cpu out.")
    return found


def _read_part(line: str, part: str) -> tuple[str, int | float]:
    match = _PART.fullmatch(part.strip())
    if match is None:
        raise BadInput(
            f"--needs {line}: {part!r} is not an amount.", "Write it as prune=4cpu,16GB,1gpu."
        )
    amount, unit = float(match[1]), match[2].lower()
    if amount > _MOST:
        raise BadInput(f"--needs {line}: no node has so much.")
    if unit == "gpu":
        if 0 < amount < _LEAST_GPU or (amount > 1 and not amount.is_integer()):
            raise BadInput(
                f"--needs {line}: a task has whole GPUs, or {_LEAST_GPU:g} of one or more."
            )
        return "gpus", amount
    if unit == "cpu":
        if amount < 1 or not amount.is_integer():
            raise BadInput(f"--needs {line}: a task has a whole number of cores, 1 or more.")
        return "cores", int(amount)
    base = 1024 if match[4] else 1000
    return "memory", int(amount * base ** ("MGT".index(match[3].upper()) + 2))


def needs_of(
    kinds: Iterable[str], nodes: Sequence[Node], given: Given, model_bytes: int
) -> dict[str, Need]:
    """What each of the `kinds` needs on these nodes, for a dense checkpoint of `model_bytes`.

    A default is cut to what the node that suits it best has; what is `given` is not. Raises
    `BadInput` where no node has that much.
    """
    found = {}
    for kind in dict.fromkeys(kinds):
        need = replace(_default(ROWS[kind], nodes, model_bytes), **given.get(kind, {}))
        if not any(need.fits(node) for node in nodes):
            told = "; ".join(map(str, nodes)) or "there is none"
            raise BadInput(
                f"No node can {kind}, which needs {need}: {told}.",
                f"Ask for less, as in --needs {kind}=1cpu, or add a node.",
            )
        found[kind] = need
    return found


def _default(row: Row, nodes: Sequence[Node], model_bytes: int) -> Need:
    if row.alone:  # no node has more, so wherever it runs nothing has a core beside it
        return Need(max((node.has.cores for node in nodes), default=row.cores))
    asked = Need(row.cores, int(row.memory * model_bytes), row.gpus)
    cut = [_cut(asked, node.has) for node in nodes]
    return max(cut, key=lambda need: (need.gpus, need.cores, need.memory), default=asked)


def _cut(need: Need, has: Need) -> Need:
    there = asdict(has)
    return Need(**{name: min(value, there[name]) for name, value in asdict(need).items()})
