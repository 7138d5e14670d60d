"""LoRA adapters in PEFT's format, and which checkpoint each belongs to."""

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import BadInput, first_line
from owl_deploy.models.checkpoint import Checkpoint
from owl_deploy.models.digests import digest
from owl_deploy.models.manifest import AdapterManifest, read_manifest
from owl_deploy.utils.artefact import read_object

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def weights_digest(checkpoint: Checkpoint) -> str:
    """One digest of a checkpoint's weight files, whatever its folder is called."""
    files = sorted(set(checkpoint.files.values()))
    return hashlib.sha256(
        b"".join(f"{one.name} {digest(one)}\n".encode() for one in files)
    ).hexdigest()


def check_adapter(folder: Path) -> None:
    """Raise `BadInput` for a folder without an adapter's files."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise BadInput(f"{folder} has no {name}.", "Give a folder that holds a PEFT adapter.")


def with_adapter(model: Any, checkpoint: Checkpoint, folder: Path) -> Any:  # noqa: ANN401
    """`model`, loaded from `checkpoint`, with the adapter in `folder` applied (a PeftModel).

    Raises `BadInput` for a folder without an adapter, one that is not LoRA's, or was trained on
    another model: by the digest in our manifest, and for every adapter by the names and shapes of
    its tensors.
    """
    import peft
    from safetensors import safe_open

    check_adapter(folder)
    config = read_object(folder / CONFIG, "Get the adapter again.")
    if (kind := config.get("peft_type")) != "LORA":  # of others some read what they name
        raise BadInput(f"The adapter in {folder} is of PEFT's type {kind!r}.", "Give a LoRA one.")
    if config.get("megatron_config"):  # for it PEFT imports the module `megatron_core`
        raise BadInput(f"The adapter in {folder} is for Megatron.", "Give one for Transformers.")
    manifest = read_manifest(folder, AdapterManifest)
    trained_on = manifest.finetune.checkpoint if manifest and manifest.finetune else None
    if trained_on and trained_on.weights_sha256 != weights_digest(checkpoint):
        raise _for_another(folder, checkpoint, f"it was trained on {trained_on.path}")
    beside = _of_model(folder / WEIGHTS, model)
    try:
        with _older_names():
            adapted = peft.PeftModel.from_pretrained(model, str(folder))
    except Exception as error:  # peft's and torch's complaints about what does not fit: many types
        raise _for_another(folder, checkpoint, first_line(error)) from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        there = set(file.keys())
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Without one peft would leave a layer at its random start, in silence.
    if odd := (wanted - there) | (there - wanted - beside):
        raise _for_another(folder, checkpoint, f"{len(odd)} tensors have no counterpart")
    return adapted


def _of_model(file: Path, model: Any) -> set[str]:  # noqa: ANN401
    """The tensors in `file` that the model has itself, as PEFT saves embeddings that it adapts."""
    import torch
    from safetensors import SafetensorError, safe_open

    own = dict(model.named_parameters(remove_duplicate=False))  # tied ones by both names
    same = set()
    with contextlib.suppress(SafetensorError), safe_open(file, framework="pt") as held:
        for key in held.keys():  # noqa: SIM118 - it is no dict
            name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
            if (mine := own.get(name)) is not None:
                given = held.get_tensor(key).to(mine.device, mine.dtype)
                same |= {key} if torch.equal(given, mine) else set()
    return same


def new_adapter(model: Any, **lora: Any) -> Any:  # noqa: ANN401 - peft and transformers are untyped
    """`model` with a fresh adapter that adds nothing yet (a PeftModel); `lora`: LoraConfig's."""
    import peft

    with _older_names():
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **lora))


@contextlib.contextmanager
def _older_names() -> Iterator[None]:
    """PEFT 0.21 asks transformers 5.24 for things by names that warn of their end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def deltas(
    adapted: Any,  # noqa: ANN401 - peft is untyped
) -> Iterator[tuple[str, "torch.Tensor"]]:
    """What a LoRA adapter adds to each weight, [out, in], with the base model's parameter name.

    One after the other: together they would be as large as the weights in float32.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            yield f"{name}.weight", _delta(module).detach().float()


def _delta(layer: Any) -> "torch.Tensor":  # noqa: ANN401 - peft's types know no such method
    delta: torch.Tensor = layer.get_delta_weight(layer.active_adapters[0])
    return delta


def _for_another(folder: Path, checkpoint: Checkpoint, why: str) -> BadInput:
    return BadInput(
        f"The adapter in {folder} is not for {checkpoint.folder}: {why}.",
        "Give the checkpoint that it was trained on.",
    )
