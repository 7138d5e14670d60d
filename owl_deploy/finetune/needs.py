"""What a training takes, reckoned before it begins: steps, memory, and room on the disk."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.filesize import decimal

from owl_deploy.errors import BadInput
from owl_deploy.finetune.logits import TeacherCache, cache_bytes
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.finetune.source import Source
from owl_deploy.finetune.train import KEPT_CHECKPOINTS
from owl_deploy.models.checkpoint import Checkpoint
from owl_deploy.utils.artefact import check_room
from owl_deploy.utils.hardware import find_device
from owl_deploy.utils.ranks import free_memory
from owl_deploy.utils.resume import partial_folder

# Of the Trainer's checkpoints: bytes a trained number, with Adam's two moments; at once at most.
_SAVED_BYTES, _SAVED = 12, KEPT_CHECKPOINTS + 1
_IN_MEMORY_BYTES = 16  # of a trained number: itself, its gradient and those moments


@dataclass(frozen=True)
class Needs:
    """What `settings` ask of this machine for the checkpoint `source`.

    `targets`: the Linears that LoRA adapts. So many `processes` read so many `windows`.
    """

    source: Source
    settings: FinetuneSettings
    teacher: Checkpoint | None
    targets: list[str]
    windows: int
    processes: int

    @property
    def groups(self) -> int:
        """Of blocks, that are trained one after another."""
        blocks = len(self.source.blocks)
        return math.ceil(blocks / (self.settings.block_group or blocks))

    @property
    def steps_a_pass(self) -> int:
        """Over the text."""
        windows = self.settings.batch_size * self.settings.gradient_accumulation * self.processes
        return math.ceil(self.windows / windows)

    @property
    def cache_bytes(self) -> int:
        """What a process keeps of the teacher; nothing where no window comes again."""
        top = self.settings.teacher_top
        steps = self.settings.max_steps or self.steps_a_pass
        if top is None or (self.groups == 1 and steps <= self.steps_a_pass):
            return 0
        return cache_bytes(self.windows, self.settings.sequence_length - 1, top)

    def check_steps(self) -> None:
        """Refuse fewer steps than there are groups of blocks, each of which takes one at least."""
        steps = self.settings.max_steps
        if steps is not None and steps < self.groups:
            raise BadInput(
                f"--max-steps gives {steps} step{'s' * (steps > 1)}, and {self.groups} groups of "
                "blocks take one each at least.",
                "Give more --max-steps, or a larger --block-group.",
            )

    def check_memory(self, dtype: torch.dtype) -> None:
        """Refuse what cannot fit: the system would end it, after hours perhaps, without a word.

        `dtype`: what is computed in.
        """
        if self.processes > 1 or find_device("auto").type != "cpu":
            return
        models = [self.source.checkpoint, *([self.teacher] if self.teacher else [])]
        tokens = self.settings.batch_size * self.settings.sequence_length
        logits = tokens * self.source.checkpoint.config.get("vocab_size", 0)
        half = torch.bfloat16.itemsize  # what is frozen may be held in
        least = half * sum(one.weights() for one in models) + _IN_MEMORY_BYTES * self._trained
        least += 4 * logits * (1 + len(models))  # and their gradient
        if self.settings.method == "masked":
            whole = math.ceil(self._share * self.source.weights)
            least += (dtype.itemsize - half) * whole
            fewer = "fewer blocks at a time (--block-group)"
        else:
            fewer = "an adapter of a smaller --rank"
        free = free_memory()
        if least > free:
            raise BadInput(
                f"This training takes at least {decimal(int(least))} of memory, and "
                f"{decimal(free)} are free.",
                f"Train {fewer}, or smaller batches (--batch-size).",
            )

    def check_disk(self, output: Path, *, resume: bool) -> None:
        """Refuse what cannot fit before minutes or hours are spent on it.

        What an earlier run for `output` has left there is free where this one drops it: all, or of
        one that this resumes the teacher's cache.

        A checkpoint takes its size, and its trained tensors lie beside it meanwhile, unless an
        earlier run has written them. An adapter takes little. What is trained is saved on the way,
        each time before an older one goes.
        """
        folder, left = output.resolve().parent, partial_folder(output)
        dropped = left.glob(TeacherCache.FILES) if resume else left.rglob("*")
        freed = sum(path.stat().st_size for path in dropped if path.is_file())
        needed = (1 if resume else _SAVED) * _SAVED_BYTES * self._trained
        if self.settings.writes_weights:
            files = set(self.source.checkpoint.files.values())
            needed += (1 if resume else 2) * sum(path.stat().st_size for path in files)
        needed -= freed
        check_room(folder, needed, "The result, with what is saved on the way,")
        if cache := self.cache_bytes * self.processes:
            what = "The teacher's cache for --teacher-top, and the result,"
            check_room(folder, needed + cache, what)

    @property
    def _share(self) -> float:
        """Of the blocks, those that are trained at once."""
        blocks = len(self.source.blocks)
        return min(1.0, (self.settings.block_group or blocks) / blocks)

    @property
    def _trained(self) -> int:
        """About how many numbers are trained at once."""
        if self.settings.method == "masked":
            return math.ceil(self._share * (self.source.weights - self.source.zeros))
        sides = (
            sum(self.source.checkpoint.shape(f"{block}.{name}"))
            for block, names in self.source.matrices.items()
            for name in names
            if name.removesuffix(".weight").rpartition(".")[2] in self.targets
        )
        return (self.settings.rank or 0) * sum(sides)
