"""The checkpoint that is fine-tuned: checked, loaded, and its mask compared with its manifest."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from owl_deploy.compression.recipe import RESOLVED
from owl_deploy.compression.settings import is_named
from owl_deploy.data.text import load_tokenizer
from owl_deploy.data.tokens import load_tokens
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import GRID, Checkpoint, check_links, open_checkpoint
from owl_deploy.models.manifest import Block, CheckpointManifest, read_manifest
from owl_deploy.models.rounded_grid import SCALE, KeptGrid, read_grid
from owl_deploy.models.sparse_linear import SPARSE_FROM, LinearGrid
from owl_deploy.utils.artefact import MANIFEST
from owl_deploy.utils.ending import Defect

_HELD_OUT = (20, 8)  # one window in so many, and so many at most, for the held-out loss

CARRIED = ("sparsity.svg", GRID)  # what of a checkpoint is still true of what is trained of it


class Source:
    """A checkpoint of a supported family, and where its blocks are.

    `blocks`: their names; `matrices`: by block, the names within it of its weight matrices;
    `manifest`: owl's, or one that says nothing; `zeros` of `weights`: what was removed from the
    blocks, and stays so. `whole`: the Linears that were rounded, and lost nothing before.
    Raises `BadInput` for a checkpoint whose zeros are not those that its manifest tells of.
    """

    def __init__(self, model: str | Path) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.folder = self.checkpoint.folder
        check_links(self.folder, (*CARRIED, RESOLVED))
        self.manifest = read_manifest(self.folder, CheckpointManifest) or CheckpointManifest()
        self.blocks = self.checkpoint.blocks
        self.matrices: dict[str, list[str]] = {}
        self.zeros = self.weights = 0
        self.whole = {name for name, one in self.manifest.linears.items() if one.whole}
        self._check_mask()
        there = {f"{block}.{name}" for block in self.blocks for name in self.matrices[block]}
        for name in sorted(self.whole):
            if f"{name}.weight" not in there:
                raise BadInput(
                    f"{self.folder / MANIFEST} tells of {name}, which the model has not.",
                    "Make the checkpoint again, or remove the file.",
                )

    def _check_mask(self) -> None:
        told = {block.name: block.achieved for block in self.manifest.blocks}
        skip = self.manifest.settings.skip
        for block in self.blocks:
            zeros = weights = 0
            self.matrices[block] = []
            for name in self.checkpoint.names(block):
                tensor = self.checkpoint.read(f"{block}.{name}")
                if tensor.ndim != 2:
                    continue
                self.matrices[block].append(name)
                linear = f"{block}.{name.removesuffix('.weight')}"
                if not any(is_named(linear, one) for one in skip):
                    found = int((tensor == 0).sum())
                    zeros += found
                    self.zeros += 0 if linear in self.whole else found
                    weights += tensor.numel()
            if block in told and zeros != round(told[block] * weights):
                raise BadInput(
                    f"{block} in {self.folder} has {zeros} zeros, and its manifest says "
                    f"{told[block]:.2%} of {weights}: the weights were changed since.",
                    "Prune again, or remove owl.json if the zeros that are there are to be kept.",
                )
            self.weights += weights

    def recounted(self, written: Path) -> dict[str, Any]:
        """This one's manifest as JSON, with the zeros of the checkpoint in `written`.

        They are others where nothing was removed: training moves weights to zero and off it.
        """
        manifest = self.manifest
        if not self.whole:
            return manifest.to_json()
        result = Checkpoint(written)
        blocks = tuple(self._recounted(block, result) for block in manifest.blocks)
        share = sum(one.achieved * one.weights for one in blocks) / max(manifest.weights, 1)
        sparsity = manifest.sparsity.model_copy(update={"achieved": share})
        return manifest.model_copy(update={"blocks": blocks, "sparsity": sparsity}).to_json()

    def _recounted(self, block: Block, result: Checkpoint) -> Block:
        linears = dict(block.linears)
        for name, one in block.linears.items():
            if (linear := f"{block.name}.{name}") in self.whole:
                weight = result.read(f"{linear}.weight")
                share = 1 - weight.count_nonzero().item() / weight.numel()
                linears[name] = one.model_copy(update={"achieved": share})
        zeros = sum(one.achieved * one.weights for one in linears.values())
        share = zeros / max(block.weights, 1)  # it may be skipped
        return block.model_copy(update={"linears": linears, "achieved": share})

    def refuse_dense(self, what: str) -> None:
        """Raise `BadInput` when there is no mask that `what` could keep."""
        if not self.manifest.blocks and self.zeros < SPARSE_FROM * self.weights:
            raise BadInput(
                f"{self.folder} is dense ({self.zeros / self.weights:.1%} zeros), and {what} "
                "keeps a sparse model's zeros.",
                "Prune it first with owl prune, or use --method lora without --merge.",
            )

    def refuse_rounded(self) -> None:
        """Raise `BadInput` for weights on a grid of a few bits, which an adapter would leave."""
        if (self.folder / GRID).is_file():
            raise BadInput(
                f"{self.folder} is rounded to a few bits, and an adapter that is merged would move "
                "its weights off their grid.",
                "Use --method masked, or --method lora without --merge.",
            )

    @functools.cached_property
    def _grid(self) -> KeptGrid | None:
        return read_grid(self.folder)

    def grids(self, block: str) -> dict[str, LinearGrid]:
        """The grids of the Linears of `block` that were rounded, by their names within it.

        Raises `BadInput` for scales that are not those of the weights.
        """
        kept = self._grid
        if kept is None:
            return {}
        found = {}
        for name in self.matrices[block]:
            linear = f"{block}.{name}".removesuffix(".weight")
            if linear not in kept.scales:
                continue
            whole = linear in self.whole
            grid = LinearGrid(kept.bits[linear], kept.group, kept.scales[linear], whole)
            rows, columns = self.checkpoint.shape(f"{block}.{name}")
            fits = list(grid.scales.shape) == [rows, -(-columns // grid.group)]
            if not (fits and _lies_on(self.checkpoint.read(f"{block}.{name}"), grid)):
                raise BadInput(
                    f"In {self.folder / GRID} {linear}.{SCALE} does not fit its weight.",
                    "Round the model again.",
                )
            found[name.removesuffix(".weight")] = grid
        return found

    def load(self, dtype: torch.dtype) -> Any:  # noqa: ANN401 - transformers is untyped
        """The model, frozen, in `dtype`."""
        return self.checkpoint.load(dtype)

    def windows(self, text: Sequence[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Windows to train on and held-out ones from the text's end, int32 ids [windows, length].

        `text`: SOURCEs. Raises `BadInput` for a text with fewer than two windows, or a model that
        takes less.
        """
        self.checkpoint.check_length(length, "--sequence-length")
        tokens = load_tokens(self.folder, text)
        self.checkpoint.check_ids(tokens)
        count = len(tokens) // length
        if count < 2:
            raise BadInput(
                f"The text holds {count} windows of {length} tokens, and fine-tuning needs two: "
                "one to train on and one to hold out.",
                "Give a longer text or a smaller --sequence-length.",
            )
        held_out = max(1, min(count // _HELD_OUT[0], _HELD_OUT[1]))
        windows = tokens[: count * length].view(count, length)
        return windows[:-held_out], windows[-held_out:]

    def check_same_zeros(self, written: Path) -> None:
        """Raise unless the checkpoint in `written` has its zeros exactly where this one has.

        Where nothing was removed they are integers like others.
        """
        result = Checkpoint(written)
        for block in self.blocks:
            for name in self.matrices[block]:
                if f"{block}.{name}".removesuffix(".weight") in self.whole:
                    continue
                before = self.checkpoint.read(f"{block}.{name}")
                after = result.read(f"{block}.{name}")
                if after.dtype != before.dtype or not torch.equal(before == 0, after == 0):
                    raise Defect(
                        f"The zeros of {block}.{name} are not those before the fine-tuning.",
                        "This is a fault of owl: please report it.",
                    )


def load_teacher(
    student: Source, teacher: Checkpoint, dtype: torch.dtype, *, like: bool = False
) -> tuple[Any, list[nn.Module]]:
    """The model `teacher`, frozen, in `dtype`, and its blocks.

    Raises `BadInput` when its vocabulary is not the student's and, where it has to be `like` it,
    when it has other blocks.
    """
    shapes = [
        (len(one.blocks), one.config.get("hidden_size")) for one in (student.checkpoint, teacher)
    ]
    if like and shapes[0] != shapes[1]:
        raise BadInput(
            f"--feature-weight compares blocks, and the teacher has {shapes[1][0]} of width "
            f"{shapes[1][1]}, the student {shapes[0][0]} of width {shapes[0][1]}.",
            "Give the dense model this one was pruned from, or leave --feature-weight out.",
        )
    sizes = [one.config.get("vocab_size") for one in (student.checkpoint, teacher)]
    words = [load_tokenizer(one.folder).get_vocab() for one in (student.checkpoint, teacher)]
    if sizes[0] != sizes[1] or words[0] != words[1]:
        raise BadInput(
            f"The teacher {teacher.folder} has another vocabulary than {student.folder} "
            f"({sizes[1]} entries and {sizes[0]}).",
            "A teacher must read the same tokens: give the dense model this one was pruned from.",
        )
    loaded = teacher.load(dtype)
    return loaded, [loaded.get_submodule(name) for name in teacher.blocks]


def _lies_on(weight: torch.Tensor, grid: LinearGrid) -> bool:
    """Whether a `weight` [out, in] is integers times its scales, to what its dtype rounds."""
    scales = grid.scales.repeat_interleave(grid.group, dim=1)[:, : weight.shape[1]]
    scales = scales.abs().where(scales != 0, 1)  # of no scale all weights are zero
    places = weight.float() / scales
    told = torch.finfo(weight.dtype)
    coarse = told.smallest_normal * told.eps / 2 / scales  # half of the smallest number
    allowed = torch.maximum(places.abs() * told.eps + 1e-3, coarse.clamp(max=0.25))
    return bool(((places - places.round()).abs() <= allowed).all())
