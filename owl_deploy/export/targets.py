"""`owl export`: a checkpoint becomes a deployment for one of the targets in the table below."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from owl_deploy.data.calibration import Calibration, as_calibration
from owl_deploy.data.text import source_files
from owl_deploy.errors import BadInput, EnvironmentFailed, is_full_disk, unknown_name
from owl_deploy.export import describe, genai, gguf, parity, tables, traced
from owl_deploy.export.grid import Grid
from owl_deploy.export.rewriter import Head
from owl_deploy.export.source import Progress, Source
from owl_deploy.inference.registry import MODEL
from owl_deploy.models import checkpoint
from owl_deploy.models.families import unbuilt
from owl_deploy.models.manifest import BlockShares, DeploymentManifest, versions
from owl_deploy.runtime import kernels, library_path
from owl_deploy.runtime.value_types import TRAITS, Values
from owl_deploy.utils import artefact

# Weights above this lie in a file of their own: copies of the graph (DeepSparse rewrites the one
# it is given) are then small, and the data is mapped or linked. A graph file ends at 2 GB anyway.
EXTERNAL_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Request:
    """What a target's function is asked for: write `source` into `folder`.

    `precision` is one of the target's; `head` how its head is stored, None as usual; `calibration`:
    the text that what is rounded is weighed by, if there is one.
    """

    source: Source
    folder: Path
    precision: str
    head: Head | None
    calibration: Calibration | None
    progress: Progress


@dataclass(frozen=True)
class Precision:
    """What a target's deployments hold their weights in.

    Attributes: `peak_bytes`, what a weight takes on the disk when the export takes most, copies
    that are removed again included; `tolerance`, the largest difference from PyTorch over the
    largest logit, None where it is only reported; `usual`, a difference beyond which that is said;
    `needs_text`, whether it cannot be had without calibration text; `built`, nor without
    onnxruntime-genai's model builder.
    """

    peak_bytes: float
    tolerance: float | None = None
    usual: float = math.inf
    needs_text: bool = False
    built: bool = False


@dataclass(frozen=True)
class Target:
    """One road from a checkpoint to a deployment.

    Attributes: `build`, which writes the model and returns what the manifest says of it;
    `precisions`, by name, the default first; `engine`, whose parity is checked where it is
    installed, and which the deployment is for; `heads`, the ways to store the head if there is a
    choice; `weighs`, whether it weighs what it rounds by calibration text.
    """

    build: Callable[[Request], dict[str, Any]]
    precisions: Mapping[str, Precision]
    engine: str
    heads: tuple[str, ...] = ()
    weighs: bool = False


def _traced(request: Request) -> dict[str, Any]:
    request.progress("Tracing the model")
    facts = traced.build(request.source, request.folder, EXTERNAL_BYTES)
    checkpoint.write_compatible(request.source.checkpoint, request.folder)
    return facts


def _genai(request: Request) -> dict[str, Any]:
    try:
        return genai.build(request.source, request.folder, request.precision, request.progress)
    except genai.FamilyNotBuilt as error:
        what = _unknown(request.source, error)
        if request.precision != "fp32":
            raise _not_built("onnxruntime", request.precision, what) from error
        note = f"onnxruntime-genai's builder does not know {what}: traced, for ONNX Runtime only"
        return {**_traced(request), "opens_in_genai": False, "note": note}


def _unknown(source: Source, error: genai.FamilyNotBuilt) -> str:
    """What the builder does not know, for a sentence."""
    return f"{source.config['model_type']!r}{error.detail}"


def _not_built(target: str, precision: str, what: str) -> BadInput:
    """The refusal of a road that begins with the builder, which does not know `what`."""
    why, way_out = f"so there is no {precision} for it", "Use --precision fp32."
    if target == "owl":
        why = "and the target 'owl' starts from it"
        way_out = "Use --target deepsparse, or --target onnxruntime in fp32."
    return BadInput(f"onnxruntime-genai's model builder does not know {what}, {why}.", way_out)


def _owl(request: Request) -> dict[str, Any]:
    """The builder's graph with this package's operators in it."""
    library_path()  # to hear now that it is missing, and not after minutes
    kernels()  # or that OWL_ISA is wrong
    Grid.read(request.source.folder)  # or that its grid is none: packing reads it again
    sparsify = {"precision": request.precision, "head": request.head}
    try:
        built = genai.build(request.source, request.folder, "fp32", request.progress, sparsify)
    except genai.FamilyNotBuilt as error:
        what = _unknown(request.source, error)
        raise _not_built("owl", request.precision, what) from error
    bits = TRAITS[cast(Values, request.precision)].stored_bits
    if bits < 8 and not built["packing"]["weights_on_grid"]:
        less = f"owl quantize --bits {bits} loses less, and an export keeps it"
        built["note"] = f"the weights were rounded to nearest; {less}"
    return built


def _gguf(request: Request) -> dict[str, Any]:
    return gguf.build(
        request.source, request.folder, request.precision, request.progress, request.calibration
    )


# 0.05 to 0.16 of those whose perplexity stayed; fewer bits differ by anything up to 0.7.
_USUAL_INT8 = 0.3

# The table: whoever adds a row, here or from outside, has another target in all verbs.
TARGETS: dict[str, Target] = {
    "deepsparse": Target(
        build=_traced,
        precisions={"fp32": Precision(4, 1e-3)},
        engine="deepsparse",
    ),
    "onnxruntime": Target(
        build=_genai,
        # With the scale and the zero point that each block of quantized weights has.
        precisions={
            "fp32": Precision(4, 1e-3),
            "int8": Precision(1.2, usual=_USUAL_INT8, built=True),
            "int4": Precision(0.9, built=True),
        },
        engine="onnxruntime",
    ),
    "owl": Target(
        build=_owl,
        # bf16 rounds activations too: most models stay below 2e-2, a pruned one may not, and
        # yet lose nothing in perplexity (2.8e-2 seen at OWL 50 %).
        # Integers are reported only, as they are for the dense exports.
        precisions={
            "bf16": Precision(2, 5e-2, built=True),
            "int8": Precision(1.1, usual=_USUAL_INT8, built=True),
            "int4": Precision(0.6, built=True),
            "int3": Precision(0.5, built=True),
            "fp32": Precision(4, 1e-3, built=True),
        },
        engine="owl",
        heads=get_args(Head),
    ),
    "llama.cpp": Target(
        build=_gguf,
        # On the disk: the converter's fp32 copy, then the quantized one beside it, as llama.cpp
        # tells it of a 7B. The copy is held to PyTorch; what the quantizer makes of it is reported
        # only, as it is for int8 and int4: Q8_0 of a 1.5B differs by 0.11.
        precisions={
            "Q8_0": Precision(4 + 1.1),
            "Q4_K_M": Precision(4 + 0.65),
            "Q4_0": Precision(4 + 0.6),
            "IQ4_XS": Precision(4 + 0.6),
            "Q3_K_M": Precision(4 + 0.55),
            "IQ3_M": Precision(4 + 0.5),
            "Q2_K": Precision(4 + 0.45),
            "IQ2_M": Precision(4 + 0.4, needs_text=True),
        },
        engine="llama.cpp",
        weighs=True,
    ),
}


def export(
    folder: str | Path,
    destination: str | Path,
    *,
    target: str,
    precision: str | None = None,
    head: str | None = None,
    calibration: Calibration | str | Path | None = None,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> DeploymentManifest:
    """Export the checkpoint in `folder` to `destination`, and return the deployment's manifest.

    `target`: a row of `TARGETS`. Without `precision` it has the target's default. `head`, for
    targets with a choice of it, is `screened` (usual for integers, unless the head was rounded to
    fewer than 8 bits itself) or `whole`. `calibration`, or its source alone, is for llama.cpp's
    types, which then round what counts most on that text most exactly. `force` replaces a
    destination that is there; `progress` is told each step. The deployment appears whole, after its
    parity with PyTorch was checked, or not at all. Raises `BadInput`, `ParityFailed`,
    `EngineFailed`, `EnvironmentFailed`.
    """
    folder, destination = Path(folder), Path(destination)
    precision = precision_of(target, precision)
    row, calibration = TARGETS[target], as_calibration(calibration)
    _check_head(head, row)
    _check_calibration(calibration, row, precision)
    started = time.monotonic()
    read = [folder, *(source_files(str(calibration.source)) if calibration and force else ())]
    with _disk_errors(destination), artefact.staged_folder(destination, force, *read) as staging:
        progress("Loading the checkpoint")
        source = Source(folder)
        artefact.check_room(staging, _peak_bytes(source, row.precisions[precision]), "The export")
        summary, chosen = _source_summary(source), cast(Head | None, head)
        facts = row.build(Request(source, staging, precision, chosen, calibration, progress))
        tables.check(staging, source.skeleton.model)
        progress("Computing PyTorch's logits")
        facts |= {
            "target": target,
            "precision": precision,
            "engine": row.engine if facts.get("opens_in_genai", True) else None,
            "source": summary,
        }
        reference = source.reference
        # A screened head rounds as int8 does.
        tolerance = None if head == "screened" else row.precisions[precision].tolerance
        del source  # its weights are as large as what the engine loads next
        facts["parity"] = parity.check(
            staging,
            reference,
            tolerance=tolerance,
            engine=facts["engine"],
            progress=progress,
        )
        if facts["parity"]["relative_difference"] > row.precisions[precision].usual:
            facts["note"] = (
                "its logits differ from PyTorch's by more than 8 bits explain; `owl eval` tells "
                "whether that matters"
            )
        progress("Counting and digesting")
        manifest = DeploymentManifest.model_validate(facts | _contents(staging, started))
        manifest.write(staging)
    return manifest


def precision_of(target: str, precision: str | None = None) -> str:
    """The `precision` asked for, as `target` spells it, or its default.

    Raises `BadInput` for a target, or a precision of it, that there is not.
    """
    if target not in TARGETS:
        raise unknown_name("target", target, TARGETS)
    own = TARGETS[target].precisions
    if precision is None:
        return next(iter(own))
    if (found := _spelled(precision, own)) is None:
        there = {name: _spelled(precision, row.precisions) for name, row in TARGETS.items()}
        others = {name: spelled for name, spelled in there.items() if spelled}
        spelled = next(iter(others.values()), "")
        elsewhere = f"; --target {' or '.join(others)} has {spelled}" if others else ""
        raise BadInput(
            f"The target {target!r} has no precision {precision!r}.",
            f"It has: {', '.join(own)}{elsewhere}.",
        )
    return found


def check_built(config: Mapping[str, Any], target: str, precision: str) -> None:
    """Raise `BadInput` where onnxruntime-genai's builder is known to lack what `precision` needs.

    `config`: the model's config.json. An export asks the builder itself, once all else is done.
    """
    if TARGETS[target].precisions[precision].built and (what := unbuilt(config)):
        raise _not_built(target, precision, what)


def _spelled(precision: str, known: Iterable[str]) -> str | None:
    """The one of `known` that is meant: people write INT4, and q4_k_m."""
    return next((name for name in known if name.lower() == precision.lower()), None)


def _check_head(head: str | None, row: Target) -> None:
    if head is None:
        return
    if not row.heads:
        some = " or ".join(name for name, target in TARGETS.items() if target.heads)
        raise BadInput(
            f"Only --target {some} has a choice of heads.", "Use it, or leave --head out."
        )
    if head not in row.heads:
        raise unknown_name("head", head, row.heads)


def _check_calibration(calibration: Calibration | None, row: Target, precision: str) -> None:
    if calibration is not None and not row.weighs:
        some = " or ".join(name for name, target in TARGETS.items() if target.weighs)
        raise BadInput(
            f"Only an export to {some} rounds by calibration text.",
            "For owl, round with owl prune --bits first; an export keeps what it made.",
        )
    if calibration is None and row.precisions[precision].needs_text:
        raise BadInput(
            f"{precision} weighs what it rounds by how much it counts on a text.",
            "Give one with --calibration.",
        )


def _peak_bytes(source: Source, precision: Precision) -> float:
    """The most that the export has on the disk at once."""
    config = source.skeleton.model.config
    head: int = 4 * config.vocab_size * config.hidden_size  # a tied one may be there twice
    return precision.peak_bytes * source.checkpoint.weights() + head


@contextlib.contextmanager
def _disk_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if not is_full_disk(error):
            raise
        raise EnvironmentFailed(
            f"The disk became full while {destination} was written; nothing was left there.",
            "Free some space, or choose another output folder.",
        ) from error


def _source_summary(source: Source) -> dict[str, Any]:
    """Where the deployment comes from: the folder, and what its manifest says of the pruning."""
    whole = source.manifest.to_json() if source.manifest else {}
    told = {key: value for key, value in whole.items() if _is_short(value)}
    # For whoever has the deployment and not the checkpoint, a node that benches it, say.
    shares = BlockShares.model_fields
    blocks = [
        {key: value for key, value in block.items() if key in shares}
        for block in whole.get("blocks", ())
    ]
    return {
        "path": str(source.folder),
        "model_type": source.config["model_type"],
        "parameters": sum(map(math.prod, source.skeleton.stored_shapes().values())),
        "manifest": told or None,
        **({"blocks": blocks} if blocks else {}),
    }


def _is_short(value: Any) -> bool:  # noqa: ANN401 - any JSON value
    return value is None or isinstance(value, str | int | float | bool)


def _contents(folder: Path, started: float) -> dict[str, Any]:
    files = describe.files(folder)
    return {
        **describe.graph(folder / MODEL),
        "files": files,
        "bytes": sum(row["bytes"] for row in files.values()),
        "versions": versions(),
        "seconds": round(time.monotonic() - started, 1),
    }
