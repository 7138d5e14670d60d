"""What is asked of a pruning, checked before any work: which model, how, on what text, where."""

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from owl_deploy.compression import reconstruct
from owl_deploy.compression.allocation.rules import ALLOCATIONS
from owl_deploy.compression.allocation.sparsities import Shape, select
from owl_deploy.compression.methods import METHODS, Method
from owl_deploy.compression.quantization import budget
from owl_deploy.compression.recipe import merged
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.data.text import check_source, token_digest
from owl_deploy.errors import BadInput
from owl_deploy.models.batch import find_batch
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import Checkpoint, check_links, open_checkpoint, stored_dtype
from owl_deploy.models.manifest import Manifest, read_manifest, versions
from owl_deploy.utils.hardware import (
    Hardware,
    find_device,
    find_dtype,
    find_training_dtype,
    name_of,
)
from owl_deploy.utils.ranks import ALONE, Ranks
from owl_deploy.utils.resume import ROUNDING

MEASURED_TOKENS = 4096  # that losses are measured by, in whole windows


@dataclass(frozen=True)
class Request:
    """One pruning of one model.

    `skeleton`: the model, a block at a time. `shape`: its Linears that are pruned. `windows`: ids
    [samples, length], None where nothing looks at inputs; `held_out`: others, by which a
    reconstruction, the formats of a budget and an allocation by losses are judged. `batch`: windows
    that go through a block together. `room`: what a budget leaves to the pruned Linears, where
    there is one. `training_dtype`: of the products in a reconstruction. `ranks`: the processes that
    share it.
    """

    skeleton: Skeleton
    settings: PruneSettings
    shape: Shape
    calibration: Calibration | None
    windows: torch.Tensor | None
    held_out: torch.Tensor | None
    batch: int
    room: budget.Room | None = None
    training_dtype: torch.dtype = torch.float32
    ranks: Ranks = ALONE

    @property
    def checkpoint(self) -> Checkpoint:
        """The model's files."""
        return self.skeleton.checkpoint

    @property
    def method(self) -> Method:
        """The row of the method."""
        return METHODS[self.settings.method]

    @property
    def own_windows(self) -> torch.Tensor:
        """This process's part of the windows, where there are any."""
        assert self.windows is not None
        return self.ranks.part(self.windows)

    @property
    def measured_by(self) -> torch.Tensor:
        """The windows of `held_out` that losses are measured by, whatever else is judged by it."""
        assert self.held_out is not None
        return self.held_out[: _measuring(self.held_out.shape[1])]

    @property
    def reconstructed_by(self) -> torch.Tensor:
        """The windows of `held_out` that a reconstruction is judged by: as many by any allocation,
        so that the recipe of a result repeats it.
        """
        assert self.held_out is not None
        return self.held_out[: _reconstructing(self.samples, self.held_out.shape[1])]

    @property
    def samples(self) -> int:
        """The windows of all processes; 1 where there are none."""
        return 1 if self.windows is None else len(self.windows)

    @property
    def steps(self) -> int:
        """Those of a pass over a block in this process, as progress counts them."""
        return 1 if self.windows is None else len(self.own_windows)

    def describe_calibration(self) -> dict[str, Any] | None:
        """The calibration text, with a digest of the token ids that were used; None without."""
        if self.windows is None or self.calibration is None:
            return None
        return self.calibration.describe(self.windows)

    def deciding(self) -> dict[str, Any]:
        """What decides the result: a run that resumes must be asked the same."""
        return {
            "model": self.checkpoint.identity(),
            "settings": self.settings.model_dump(mode="json"),
            "calibration": self.describe_calibration(),
            "held_out": None if self.held_out is None else token_digest(self.held_out),
            "device": self.skeleton.device.type,
            "dtype": name_of(self.skeleton.dtype),
            "training_dtype": name_of(self.training_dtype),
            ROUNDING: {
                "processes": self.ranks.size,
                "threads": torch.get_num_threads(),
                "batch_size": self.batch,
            },
            "versions": versions(),
        }


def check(
    model: str | Path,
    settings: PruneSettings,
    calibration: Calibration | None,
    hardware: Hardware,
    *,
    ranks: Ranks = ALONE,
    planned: bool = False,
) -> Request:
    """The request, or `BadInput` for whatever can be known to be wrong before any work.

    `planned`: what a budget leaves to each Linear is known already, from the run that this resumes.
    """
    checkpoint = open_checkpoint(model)
    device = find_device(hardware.device)
    skeleton = Skeleton(
        checkpoint, find_dtype(hardware.dtype, stored_dtype(checkpoint.config), device), device
    )
    _check_rest(skeleton)
    sizes = [
        {name: linear.weight.numel() for name, linear in skeleton.linears(index).items()}
        for index in range(len(skeleton.names))
    ]
    shape = select(skeleton.names, sizes, settings.skip)
    _check_groups(settings, skeleton, shape)
    chooses = settings.budget is not None and not planned
    room = budget.room(settings, skeleton, shape) if chooses else None
    windows = _windows(checkpoint, settings, calibration)
    held_out = None
    if windows is not None and calibration is not None:
        windows, held_out = windows[: calibration.samples], windows[calibration.samples :]
    if windows is not None and len(windows) < ranks.size:
        raise BadInput(
            f"There are {ranks.size} processes, and {len(windows)} windows of calibration text.",
            "Give more --samples, or start fewer processes.",
        )
    if ranks.size > 1:
        _check_alone(settings, ranks.size)
    own = windows if windows is None else ranks.part(windows)
    # The same everywhere, and so again when the run resumes.
    batch = min(ranks.gathered(find_batch(hardware.batch_size, own, skeleton)))
    training_dtype = find_training_dtype(hardware.dtype, device)
    return Request(
        skeleton,
        settings,
        shape,
        calibration,
        windows,
        held_out,
        batch,
        room,
        training_dtype,
        ranks,
    )


def as_settings(given: PruneSettings | dict[str, Any]) -> PruneSettings:
    """The settings that are `given`, perhaps as a dict; raises `BadInput` for anything else."""
    if isinstance(given, dict):
        return merged(None, given)
    if not isinstance(given, PruneSettings):
        raise BadInput(
            f"The settings of a pruning are {reprlib.repr(given)}, which are none.",
            "Give PruneSettings, a dict, or what prune_settings makes of a recipe.",
        )
    return given


def _check_alone(settings: PruneSettings, processes: int) -> None:
    """Raise `BadInput` for what several processes cannot share."""
    for asked, given in (("--budget", settings.budget), ("--reconstruct", settings.reconstruct)):
        if given:
            raise BadInput(f"{asked} takes one process, and there are {processes}.", "Start one.")


def _measuring(length: int) -> int:
    """How many windows of `length` tokens losses are measured by."""
    return max(MEASURED_TOKENS // length, 1)


def _reconstructing(samples: int, length: int) -> int:
    """How many windows a reconstruction by so many others is judged by."""
    return max(reconstruct.held_out_windows(samples), _measuring(length))


def _windows(
    checkpoint: Checkpoint, settings: PruneSettings, calibration: Calibration | None
) -> torch.Tensor | None:
    """The windows to prune by, and after them those to judge by."""
    if not settings.calibrates:
        if calibration is not None:  # of no use, but a path that is wrong is a mistake
            check_source(str(calibration.source))
        return None
    if calibration is None and settings.reconstruct:
        raise BadInput(
            "A reconstruction trains what is left on a text.", "Give one with --calibration."
        )
    if calibration is None and settings.rounds:
        bits = f"to {settings.bits} bits" if settings.bits else "within a budget"
        raise BadInput(
            f"Rounding {bits} looks at the model's inputs.",
            "Give a text with --calibration.",
        )
    if calibration is None:
        refit = ", with a refit," if settings.refit else ""
        raise BadInput(
            f"The method {settings.method}{refit} with the allocation {settings.allocation} looks "
            "at the model's inputs.",
            "Give a text with --calibration.",
        )
    held_out = 0
    if settings.reconstruct:
        held_out = _reconstructing(calibration.samples, calibration.sequence_length)
    if settings.budget or ALLOCATIONS[settings.allocation].losses:
        held_out = max(held_out, _measuring(calibration.sequence_length))
    return calibration.windows(checkpoint, held_out)


def _check_rest(skeleton: Skeleton) -> None:
    """Raise `BadInput` for a checkpoint that lacks something, or of which something outside the
    blocks could not be read when those are done.
    """
    checkpoint = skeleton.checkpoint
    checkpoint.check_shapes(skeleton.stored_shapes())
    read_manifest(checkpoint.folder, Manifest)
    check_links(checkpoint.folder)
    for name in checkpoint.outside(skeleton.names):
        checkpoint.read(name)


def _check_groups(settings: PruneSettings, skeleton: Skeleton, shape: Shape) -> None:
    if settings.group is None:
        return
    linears = {
        f"{block}.{name}": skeleton.linears(index)[name]
        for index, (block, own) in enumerate(zip(shape.names, shape.linears, strict=True))
        for name in own
    }
    if settings.head_sparsity is not None:
        linears[skeleton.family.head] = skeleton.head
    for name, linear in linears.items():
        if linear.in_features % settings.group[1]:
            raise BadInput(
                f"{name} has {linear.in_features} inputs, no multiple of {settings.group[1]}.",
                "Choose another structure, or leave that layer dense.",
            )
