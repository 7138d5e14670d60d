"""What a fine-tuning leaves: an adapter in PEFT's format, or a checkpoint with the zeros it had."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from owl_deploy.compression.recipe import RESOLVED
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.finetune.source import CARRIED, Source
from owl_deploy.models.checkpoint import shards, write_compatible
from owl_deploy.models.sparse_linear import nonzero
from owl_deploy.utils.artefact import MANIFEST, copy


def write_adapter(adapted: Any, folder: Path) -> None:  # noqa: ANN401 - peft is untyped
    """Write a trained adapter (a PeftModel) into `folder`."""
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's form, with nothing filled in


def write_checkpoint(
    source: Source, settings: FinetuneSettings, tensors: dict[str, torch.Tensor], folder: Path
) -> None:
    """Write the trained `tensors` and the source's others into `folder`, and check every zero."""
    checkpoint = source.checkpoint

    def all_tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in checkpoint.files:
            yield name, tensors[name] if name in tensors else checkpoint.read(name)

    shards(all_tensors(), folder)
    write_compatible(checkpoint, folder)
    source.check_same_zeros(folder)
    for name in CARRIED:
        if (source.folder / name).is_file():
            copy(source.folder / name, folder / name)
    recipe = source.folder / RESOLVED
    if recipe.is_file():
        merge = ", merged under the mask" if settings.merge else ""
        heading = f"# Then fine-tuned by owl: {settings.method}{merge}; see {MANIFEST}.\n"
        content = recipe.read_text(encoding="utf-8")
        (folder / RESOLVED).write_text(heading + content, encoding="utf-8")


def merged(
    source: Source, deltas: Iterable[tuple[str, torch.Tensor]]
) -> tuple[dict[str, torch.Tensor], int]:
    """The weights with `deltas` added where they are not zero, and how many were kept off zero.

    Both are [out, in] by the checkpoint's names; the result has the checkpoint's dtypes.
    """
    tensors, count = {}, 0
    for name, delta in deltas:
        weight = source.checkpoint.read(name)
        summed = weight.float() + delta.cpu()
        kept, _ = nonzero(summed.to(weight.dtype), weight)
        tensors[name] = kept.masked_fill(weight == 0, 0)
        count += int(((summed.to(weight.dtype) == 0) & (weight != 0)).sum())
    return tensors, count
