"""What is evaluated: a checkpoint or a deployment, and where what came out is kept."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.inference import engine_for, get_engine
from owl_deploy.inference.deployment import Deployment, open_deployment, text_of
from owl_deploy.inference.loading import Folder
from owl_deploy.models.adapter import CONFIG, WEIGHTS, check_adapter, with_adapter
from owl_deploy.models.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.models.digests import state_of
from owl_deploy.models.manifest import DeploymentManifest, Manifest, read_manifest
from owl_deploy.models.measurements import keep_measurement, measurement
from owl_deploy.utils.artefact import is_artefact, sha256
from owl_deploy.utils.hardware import name_of
from owl_deploy.utils.progress import error_console


def is_deployment(folder: Path) -> bool:
    """Whether it is one: owl says so, or there is what an engine opens and no checkpoint's weights.

    A stranger's deployment has no manifest.
    """
    if read_manifest(folder, Manifest) is not None:
        return read_manifest(folder, DeploymentManifest) is not None
    return Folder(folder).has_model and not any(folder.glob("*.safetensors"))


def engine_of(deployment: Deployment, asked: str | None) -> str:
    """The engine to evaluate a deployment in: the one `asked` for, or the fastest that opens it."""
    if asked is None:
        own = engine_for(deployment.target)
        return own.evaluated_in or own.name
    if deployment.target not in get_engine(asked).targets:
        raise BadInput(
            f"The engine {asked!r} does not open {deployment.path}, which was exported for "
            f"{deployment.target}.",
            f"Leave --engine away, or export again with --target {asked}.",
        )
    return asked


def check_subject(folder: Path, asked: EvaluationSettings) -> None:
    """Raise `BadInput` for a folder that could not be evaluated, before others are for hours."""
    model: Deployment | Checkpoint
    if is_deployment(folder):
        refuse_adapter(asked.adapter)
        model = open_deployment(folder, trust_library=asked.trust_library)
        engine_of(model, asked.engine)
    else:
        model = open_checkpoint(folder)
        folder = model.folder
        if asked.adapter is not None:
            check_adapter(Path(asked.adapter))
    if asked.text is not None:
        model.check_length(asked.window, "--window")
    load_tokenizer(folder)


def refuse_adapter(adapter: str | Path | None) -> None:
    """Raise `BadInput` if there is one, for a deployment."""
    if adapter is not None:
        raise BadInput("--adapter goes with a checkpoint; a deployment is as it was exported.")


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, adapter: str | Path | None
) -> Any:  # noqa: ANN401 - transformers is untyped
    """The whole model, with a LoRA adapter if there is one, for inference.

    Raises `BadInput` for weights that are incomplete or not finite, and for an adapter that is
    not for them.
    """
    model = checkpoint.load(dtype)
    if adapter is not None:
        model = with_adapter(model, checkpoint, Path(adapter)).get_base_model()
    return model.to(device).eval()


def deciding(
    checkpoint: Checkpoint, adapter: str | Path | None, dtype: torch.dtype, device: torch.device
) -> dict[str, object]:
    """What decides the figures of a checkpoint, whatever is asked: see `Ranks.check_alike`."""
    files = [] if adapter is None else [Path(adapter) / name for name in (CONFIG, WEIGHTS)]
    return {
        "model": checkpoint.identity(),
        "adapter": [sha256(file) for file in files if file.is_file()],
        "device": device.type,
        "dtype": name_of(dtype),
    }


def no_model_has(what: str) -> BadInput:
    """The error for a figure that is no number, or infinite."""
    return BadInput(
        f"{what}, which no model has.", "Its weights are damaged, or its engine computes wrongly."
    )


def keep(
    folder: Path,
    key: str,
    value: dict[str, Any],
    *,
    add: bool = False,
    measured: list[list[Any]] | None = None,
) -> None:
    """Keep a result beside what was measured (`add`: to it), if `folder` is an artefact of ours.

    What it replaces is said where that was measured on more, or on something else. A folder that
    cannot be written costs a remark, not the result, and so does one that is no longer what was
    `measured` (`state_of` it before).
    """
    if not is_artefact(folder):
        return
    if measured is not None and measured != state_of(folder):
        remark = f"{folder} was replaced meanwhile, and does not keep the result."
        error_console().print(remark, highlight=False)
        return
    lost = _lost(folder, key, value)
    try:
        keep_measurement(folder, key, value, add=add)
    except OSError as error:
        error_console().print(f"{folder} does not keep the result ({error}).", highlight=False)
        return
    for what in lost:
        error_console().print(f"{folder}: {what}.", highlight=False)


def _lost(folder: Path, key: str, value: dict[str, Any]) -> list[str]:
    """Sentences, without a full stop, for what `value` replaces and does not make up for."""
    earlier: dict[str, Any] = {}
    with suppress(BadInput, OSError):  # what cannot be read is no loss
        earlier = measurement(folder, key) or {}
    if key == "perplexity":
        return [_replaced(value, earlier)] if earlier and _is_less(value, earlier) else []
    return [
        f"{name} on {_asked(row)} replaces what was kept, on {_asked(earlier[name])}"
        for name, row in value.items()
        if name in earlier and _is_fewer(row, earlier[name])
    ]


def _is_less(now: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether a perplexity is of less than an `earlier` one, or of other text or windows."""
    if (on := text_of(earlier)) and on == text_of(now):  # whatever the text's file is called
        return False
    same = all(now.get(name) == earlier.get(name) for name in ("text", "window"))
    return not same or _count(now, "windows") <= _count(earlier, "windows")


def _replaced(now: dict[str, Any], earlier: dict[str, Any]) -> str:
    def read(one: dict[str, Any]) -> str:
        return f"over {_count(one, 'windows')} windows of {_count(one, 'window')} tokens"

    # Not by its name, which in a stranger's folder may be anything.
    other = "" if now.get("text") == earlier.get("text") else " of other text"
    return (
        f"perplexity {read(now)} replaces what was kept, {earlier['value']:.4g} "
        f"{read(earlier)}{other}"
    )


def _is_fewer(now: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Whether a task was asked fewer documents than before, or as many others."""
    was, is_now = _count(earlier, "documents"), _count(now, "documents")
    others = _count(earlier, "every", 1) != _count(now, "every", 1)
    return is_now < was or (is_now == was and others)


def _asked(row: dict[str, Any]) -> str:
    every = _count(row, "every", 1)
    return f"{_count(row, 'documents')} documents" + (f", one of {every}" if every > 1 else "")


def _count(row: dict[str, Any], name: str, usual: int = 0) -> int:
    found = row.get(name)
    return found if isinstance(found, int) else usual
