"""`owl export`: a checkpoint becomes a deployment for one of the targets in the table below."""

import contextlib
import errno
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast, get_args

from owl_deploy import artefact, checkpoint
from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.export import describe, genai, parity, sparse, traced
from owl_deploy.export.source import Progress, Source
from owl_deploy.runtime import kernels, library_path

# Weights above this lie in a file of their own: copies of the graph (DeepSparse rewrites the one
# it is given) are then small, and the data is mapped or linked. A graph file ends at 2 GB anyway.
EXTERNAL_BYTES = 64 * 2**20
_BYTES_A_WEIGHT = {"fp32": 4, "int8": 1, "int4": 0.5}


@dataclass(frozen=True)
class Request:
    """What a target's function is asked for: write `source` into `folder`.

    `precision` is one of the target's; `values` one of its value types, None if it has none;
    `head` how its head is stored, None as usual.
    """

    source: Source
    folder: Path
    precision: str
    values: str | None
    head: sparse.Head | None
    progress: Progress


@dataclass(frozen=True)
class Target:
    """One road from a checkpoint to a deployment.

    Attributes: `build`, which writes the graph and returns what the manifest says of it;
    `precisions`; `engine`, whose parity is checked where it is installed, and which the
    deployment is for; `tolerances`, the largest difference from PyTorch over the largest logit by
    precision (by value type for a target that has those), reported only when it is not there;
    `purpose`, one line for people; `values`, the value types of a target that packs weights;
    `least_context`, the smallest cache in tokens that the engine takes.
    """

    build: Callable[[Request], dict[str, Any]]
    precisions: tuple[str, ...]
    engine: str
    tolerances: Mapping[str, float]
    purpose: str
    values: tuple[str, ...] = ()
    least_context: int = 0


def _traced(request: Request) -> dict[str, Any]:
    request.progress("Tracing the model")
    facts = traced.build(request.source, request.folder, EXTERNAL_BYTES)
    checkpoint.write_compatible(request.source.checkpoint, request.folder)
    return facts


def _genai(request: Request) -> dict[str, Any]:
    try:
        return genai.build(request.source, request.folder, request.precision, request.progress)
    except genai.FamilyNotBuilt as error:
        name = request.source.config["model_type"]
        if request.precision != "fp32":
            raise BadInput(
                f"onnxruntime-genai's model builder does not know {name!r}, so there is no "
                f"{request.precision} for it.",
                "Use --precision fp32.",
            ) from error
        note = f"onnxruntime-genai's builder does not know {name!r}: traced, for ONNX Runtime only"
        return {**_traced(request), "opens_in_genai": False, "note": note}


def _owl(request: Request) -> dict[str, Any]:
    """The builder's graph with this package's operators in it."""
    assert request.values is not None
    library_path()  # to hear now that it is missing, and not after minutes
    kernels()  # or that OWL_ISA is wrong
    with tempfile.TemporaryDirectory(
        dir=request.folder.parent, prefix=f"{request.folder.name}-"
    ) as scratch:
        dense = Path(scratch)
        try:
            facts = genai.build(request.source, dense, "fp32", request.progress)
        except genai.FamilyNotBuilt as error:
            raise BadInput(
                f"onnxruntime-genai's model builder does not know "
                f"{request.source.config['model_type']!r}, and the target 'owl' starts from it.",
                "Use --target deepsparse or onnxruntime.",
            ) from error
        request.progress("Packing the weights")
        values = cast(sparse.Values, request.values)
        statistics = sparse.sparsify_deployment(dense, request.folder, values, head=request.head)
    return {**facts, "packing": statistics}


TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "deepsparse": Target(
            build=_traced,
            precisions=("fp32",),
            engine="deepsparse",
            tolerances={"fp32": 1e-3},
            # A chunk of 64 tokens in a cache of 128 or less comes out as NaN (tried on 1.8).
            least_context=192,
            purpose="DeepSparse 1.8 with its KV cache (evaluation only); any ONNX Runtime",
        ),
        "onnxruntime": Target(
            build=_genai,
            precisions=("fp32", "int8", "int4"),
            engine="onnxruntime",
            tolerances={"fp32": 1e-3},
            purpose="stock onnxruntime-genai, production",
        ),
        "owl": Target(
            build=_owl,
            precisions=("fp32",),
            engine="owl",
            # int8 is reported only, as it is for the dense exports.
            # bf16 rounds activations too: most models stay below 2e-2, a pruned one may not, and
            # yet lose nothing in perplexity (2.8e-2 seen at OWL 50 %).
            tolerances={"fp32": 1e-3, "bf16": 5e-2},
            values=("bf16", "int8", "fp32"),
            purpose="stock onnxruntime-genai with this package's sparse operators, production",
        ),
    }
)


def export(
    folder: str | Path,
    destination: str | Path,
    *,
    target: str,
    precision: str = "fp32",
    values: str | None = None,
    head: str | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Export the checkpoint in `folder` to `destination`, and return the deployment's manifest.

    `target`: a row of `TARGETS`, which says what it has of `precision` (of the dense weights) and
    of `values` (of the non-zeros that it packs; None for the first). `head`, for targets with
    values, is `screened` (usual for int8) or `whole`. `force` replaces a destination that is there;
    `progress` is told each step. The deployment appears whole, after its parity with PyTorch was
    checked, or not at all. Raises `BadInput`, `ParityFailed`, `EngineFailed`, `EnvironmentFailed`.
    """
    folder, destination = Path(folder), Path(destination)
    row = _row(target, precision, values)
    if row.values and values is None:
        values = row.values[0]
    _check_head(head, row)
    started = time.monotonic()
    with _disk_errors(destination), artefact.staged_folder(destination, force, folder) as staging:
        progress("Loading the checkpoint")
        source = Source(folder)
        _check_disk(source, staging, precision)
        chosen = cast(sparse.Head | None, head)
        request = Request(source, staging, precision, values, chosen, progress)
        facts = row.build(request)
        progress("Computing PyTorch's logits")
        manifest = {
            "kind": "deployment",
            "target": target,
            "precision": precision,
            "values": values,
            "engine": row.engine if facts.get("opens_in_genai", True) else None,
            **facts,
            "source": _source_summary(source),
        }
        reference = source.reference
        # A screened head rounds as int8 values do.
        tolerance = None if head == "screened" else row.tolerances.get(values or precision)
        del source  # its weights are as large as what the engine loads next
        manifest["parity"] = parity.check(
            staging,
            reference,
            tolerance=tolerance,
            engine=manifest["engine"],
            least_context=row.least_context,
            progress=progress,
        )
        progress("Counting and digesting")
        manifest |= _contents(staging, started)
        artefact.write_json(staging / artefact.MANIFEST, manifest)
    return manifest


def _row(target: str, precision: str, values: str | None) -> Target:
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    row = TARGETS[target]
    if precision not in row.precisions:
        raise BadInput(
            f"The target {target!r} has no precision {precision!r}.",
            f"Use --values {precision}."
            if precision in row.values
            else f"It has: {', '.join(row.precisions)}.",
        )
    if values is not None and values not in row.values:
        offered = f"It has: {', '.join(row.values)}." if row.values else "--values is for owl."
        if values in row.precisions:
            offered = f"Use --precision {values}, or --target owl."
        raise BadInput(f"The target {target!r} has no value type {values!r}.", offered)
    return row


def _check_head(head: str | None, row: Target) -> None:
    if head is None:
        return
    if head not in get_args(sparse.Head):
        raise unknown_name("head", head, get_args(sparse.Head))
    if not row.values:
        raise BadInput("Only --target owl has a choice of heads.", "Use it, or leave --head out.")


def _check_disk(source: Source, folder: Path, precision: str) -> None:
    """Refuse what cannot fit before minutes are spent on it."""
    config = source.model.config
    head = 4 * config.vocab_size * config.hidden_size  # a tied one may be there twice
    needed = _BYTES_A_WEIGHT[precision] * source.parameters() + head
    artefact.check_room(folder, needed, "The export")


@contextlib.contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise BadInput(
            f"The disk became full while {destination} was written; nothing was left there.",
            "Free some space, or choose another output folder.",
        ) from error


def _source_summary(source: Source) -> dict[str, Any]:
    """Where the deployment comes from: the folder, and what its manifest says of the pruning."""
    told = {key: value for key, value in source.manifest.items() if _is_short(value)}
    return {
        "path": str(source.folder),
        "model_type": source.config["model_type"],
        "parameters": sum(parameter.numel() for parameter in source.model.parameters()),
        "manifest": told or None,
    }


def _is_short(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return value is None or isinstance(value, str | int | float | bool)


def _contents(folder: Path, started: float) -> dict[str, Any]:
    graph = describe.graph(folder / "model.onnx")
    files = describe.files(folder)
    return {
        **graph,
        "files": files,
        "bytes": sum(row["bytes"] for row in files.values()),
        "versions": artefact.versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
