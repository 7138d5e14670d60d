"""What a pruning leaves: the checkpoint's files, and the manifest that says what was done."""

import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from owl_deploy.artefact import read_manifest, versions
from owl_deploy.checkpoint import shards, write_compatible
from owl_deploy.prune.plan import Plan
from owl_deploy.prune.request import Request
from owl_deploy.prune.store import Store
from owl_deploy.prune.walk import Part


@dataclass(frozen=True)
class LinearReport:
    """The share of a Linear's `weights` that was asked to go, and that went."""

    sparsity: float
    achieved: float
    weights: int


@dataclass(frozen=True)
class BlockReport:
    """What was asked of a block and what came out; `outlier_ratio` in percent.

    `linears`: the same of each of its Linears that is pruned, by name.
    """

    name: str
    outlier_ratio: float | None
    sparsity: float
    achieved: float
    weights: int
    linears: dict[str, LinearReport]


def report(part: Part, linears: Mapping[str, int], ratio: float | None) -> BlockReport:
    """The report of a block whose Linears to prune are `linears`, name to number of weights."""
    zeros = {name: int((part.weights[f"{name}.weight"] == 0).sum()) for name in linears}
    asked = {name: part.sparsities.get(name, 0.0) for name in linears}
    total = sum(linears.values())
    whole = next(iter(asked.values()), 0.0)
    if len(set(asked.values())) > 1:
        whole = sum(asked[name] * size for name, size in linears.items()) / total
    each = {
        name: LinearReport(asked[name], zeros[name] / size, size) for name, size in linears.items()
    }
    achieved = sum(zeros.values()) / max(total, 1)  # a block may be skipped as a whole
    return BlockReport(part.name, ratio, whole, achieved, total, each)


def report_head(part: Part) -> dict[str, Any]:
    """The same of the head, which is one Linear."""
    weight = part.weights["weight"]
    achieved = int((weight == 0).sum()) / weight.numel()
    return {
        "name": part.name,
        "outlier_ratio": None,
        "sparsity": part.sparsities[""],
        "achieved": achieved,
        "weights": weight.numel(),
    }


def assemble(request: Request, store: Store) -> None:
    """Put the finished blocks and the untouched tensors together, as a checkpoint."""
    checkpoint, names, head = request.checkpoint, request.shape.names, request.head
    large = checkpoint.is_large

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names if not large else ():
            weights = store.load(name)
            assert weights is not None
            yield from ((f"{name}.{key}", tensor) for key, tensor in weights.items())
        blocks = tuple(f"{name}." for name in names)
        for key in checkpoint.files:
            # A tied weight may lie there under both names, of which each is written by itself.
            weights = store.load(head) if head and key in request.skeleton.head_weights else None
            if weights:
                yield key, weights["weight"]
            elif not key.startswith(blocks):
                yield key, checkpoint.read(key)

    ready = [store.path(name) for name in names] if large else []
    shards(tensors(), store.folder, ready)
    write_compatible(checkpoint, store.folder)


def describe(
    request: Request, plan: Plan, reports: Sequence[BlockReport], source: str, seconds: float
) -> dict[str, Any]:
    """The manifest of the checkpoint that was pruned from `source` in so many `seconds`."""
    total = sum(block.weights for block in reports)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    skeleton = request.skeleton
    on_gpu = skeleton.device.type == "cuda"
    return {
        "kind": "checkpoint",
        "versions": versions(),
        "command": sys.argv,
        "source": source,
        "source_manifest": read_manifest(request.checkpoint.folder) or None,
        "settings": plan.settings.model_dump(mode="json"),
        "tuning": [asdict(trial) for trial in plan.trials] or None,
        "calibration": request.describe_calibration(),
        "device": str(skeleton.device),
        "dtype": str(skeleton.dtype).removeprefix("torch."),
        "weights": total,
        "sparsity": {
            "asked": sum(b.sparsity * b.weights for b in reports) / total,
            "achieved": sum(b.achieved * b.weights for b in reports) / total,
        },
        "blocks": [asdict(block) for block in reports],
        "wall_seconds": seconds,
        "peak_memory_bytes": peak_kib * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
