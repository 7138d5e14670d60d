"""What a pruning leaves: the checkpoint's files, and the manifest that says what was done."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from owl_deploy.compression.plan import Plan
from owl_deploy.compression.request import Request
from owl_deploy.compression.sequential import Part
from owl_deploy.compression.store import Store
from owl_deploy.inference.worker import peak_bytes
from owl_deploy.models.checkpoint import shards, write_compatible
from owl_deploy.models.manifest import Block, Cost, Linear, Manifest, read_manifest, versions
from owl_deploy.models.rounded_grid import write_grid
from owl_deploy.utils.hardware import name_of


def report(
    part: Part,
    outlier_ratio: float | None,
    costs: Mapping[str, Sequence[Cost]] = MappingProxyType({}),
) -> Block:
    """What was asked of a block, or of the head, and what came out; the ratio is in percent.

    `costs`: of its Linears in each format that a budget chose from, by their names.
    """
    sizes = part.linears
    zeros = {name: int((part.weight(name) == 0).sum()) for name in sizes}
    asked = {name: part.sparsities.get(name, 0.0) for name in sizes}
    total = sum(sizes.values())
    whole = next(iter(asked.values()), 0.0)
    if len(set(asked.values())) > 1:
        whole = sum(asked[name] * size for name, size in sizes.items()) / total
    return Block(
        name=part.name,
        outlier_ratio=outlier_ratio,
        sparsity=whole,
        achieved=sum(zeros.values()) / max(total, 1),  # a block may be skipped as a whole
        weights=total,
        linears={
            name: Linear.model_validate(
                {"sparsity": asked[name], "achieved": zeros[name] / size, "weights": size}
                | ({"bits": part.bits[name]} if part.bits[name] else {})
                | ({"whole": True} if name in part.whole else {})
                | ({"costs": costs[name]} if name in costs else {})
            )
            for name, size in sizes.items()
            if name
        },
        **({"halves": dict(part.halves)} if part.halves else {}),
    )


def assemble(request: Request, plan: Plan, store: Store) -> None:
    """Put the finished blocks and the untouched tensors together, as a checkpoint."""
    checkpoint, names, head = request.checkpoint, request.shape.names, plan.head(request.skeleton)
    large = checkpoint.is_large

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in names if not large else ():
            yield from ((f"{name}.{key}", tensor) for key, tensor in store.load(name).items())
        for key in checkpoint.outside(names):
            # A tied weight may lie there under both names, of which each is written by itself.
            weights = store.load(head) if head and key in request.skeleton.head_weights else None
            yield key, weights["weight"] if weights else checkpoint.read(key)

    if request.settings.rounds:
        _write_grid(request, plan, store)
    ready = [store.path(name) for name in names] if large else []
    shards(tensors(), store.folder, ready)
    write_compatible(checkpoint, store.folder)


def _write_grid(request: Request, plan: Plan, store: Store) -> None:
    """The scales of all rounded weights, and what they are scales of."""
    names, head = request.shape.names, plan.head(request.skeleton)
    parts = [*names, *([head] if head else [])]
    scales = {key: value for name in parts for key, value in store.scales(name).items()}
    bits = {
        f"{block}.{name}": number
        for index, block in enumerate(names)
        for name in request.shape.linears[index]
        if (number := plan.bits_of(index, name))
    }
    if head and plan.bits_of_head:
        bits[head] = plan.bits_of_head
    settings, same = request.settings, {*bits.values()}
    assert settings.bits_group is not None
    alike = settings.budget is None and len(same) == 1
    write_grid(store.folder, scales, same.pop() if alike else bits, settings.bits_group)


def describe(request: Request, plan: Plan, reports: Sequence[Block], source: str) -> dict[str, Any]:
    """The manifest's fields for the checkpoint that was pruned from `source`.

    `reports`: of every block, then of the head if it was pruned.
    """
    blocks = reports[: len(request.shape.names)]
    total = sum(block.weights for block in blocks)
    skeleton, device = request.skeleton, request.skeleton.device
    of_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    before = read_manifest(request.checkpoint.folder, Manifest)
    return {
        "versions": versions(),
        "command": sys.argv,
        "source": source,
        "source_manifest": before.to_json() if before else None,
        "settings": plan.settings.model_dump(mode="json"),
        "calibration": request.describe_calibration(),
        "processes": request.ranks.size,
        "device": str(device),
        "dtype": name_of(skeleton.dtype),
        "weights": total,
        "sparsity": {
            "asked": sum(b.sparsity * b.weights for b in blocks) / total,
            "achieved": sum(b.achieved * b.weights for b in blocks) / total,
        },
        "blocks": blocks,
        "head": reports[-1] if plan.settings.changes_head else None,
        "spent": plan.spent,
        "peak_memory_bytes": peak_bytes(),
        "peak_device_memory_bytes": of_gpu,
    }
