"""What a pruning has finished so far (see `partial`).

Besides `run.json` the folder holds `plan.json` (what the dense pass measured) and one safetensors
file a finished block, each written whole or not at all; where weights were rounded, one with their
scales beside it, and where halves were reconstructed a JSON file of what came of them. Until there
is a plan, what was measured of a block for it lies there likewise. A checkpoint of several shards
takes the blocks' files as they are, so that the disk holds them once.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from owl_deploy.models.manifest import CheckpointManifest, TrainedHalf, read_manifest
from owl_deploy.models.rounded_grid import SCALE
from owl_deploy.utils.artefact import MANIFEST, check_writer, publish
from owl_deploy.utils.resume import ASKED, Partial

PLAN = "plan.json"
_MEASURED = ("*.forward", "*.backward")  # what passes have measured of each block


class Store(Partial):
    """The finished blocks of one pruning."""

    def save(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Write a finished block's tensors (names within the block), durably."""
        named = {f"{name}.{key}": value.contiguous() for key, value in weights.items()}
        scales = {key: named.pop(key) for key in [*named] if key.endswith(f".{SCALE}")}
        if scales:
            self.write_tensors(scales, self._scales_path(name))
        self.write_tensors(named, self.path(name))  # last: with it the block is finished

    def holds(self, name: str) -> bool:
        """Whether a block is finished: its file is there and whole."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(name), framework="pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a block that it holds."""
        tensors = self.read_tensors(self.path(name))
        return {key.removeprefix(f"{name}."): value for key, value in tensors.items()}

    def scales(self, name: str) -> dict[str, torch.Tensor]:
        """The scales of a finished block's rounded weights, by their whole names."""
        path = self._scales_path(name)
        return self.read_tensors(path) if path.is_file() else {}

    def keep(self, name: str, way: str, found: dict[str, torch.Tensor]) -> None:
        """Write what the pass `way` has measured of a block, durably."""
        named = {key: tensor.contiguous() for key, tensor in found.items()}
        self.write_tensors(named, self.folder / f"{name}.{way}")

    def has_measured(self, name: str, way: str) -> bool:
        """Whether the pass `way` has measured a block."""
        return (self.folder / f"{name}.{way}").is_file()

    def measured(self, name: str, way: str) -> dict[str, torch.Tensor]:
        """What the pass `way` has measured of a block."""
        return self.read_tensors(self.folder / f"{name}.{way}")

    def forget_measured(self) -> None:
        """Drop all that was measured, which a plan holds by now."""
        for pattern in _MEASURED:
            for path in self.folder.glob(pattern):
                path.unlink()

    def keep_halves(self, name: str, halves: Mapping[str, TrainedHalf]) -> None:
        """Keep what came of a block's reconstruction; before the block is saved, which ends it."""
        self.write(f"{name}.halves", {key: one.model_dump() for key, one in halves.items()})

    def halves(self, name: str) -> dict[str, TrainedHalf]:
        """What `keep_halves` was given of a finished block; empty where it was not."""
        kept = self.read(f"{name}.halves") or {}
        return {key: TrainedHalf.model_validate(one) for key, one in kept.items()}

    @property
    def has_work(self) -> bool:
        """Whether anything is there that a resumed run would not have to do again."""
        done = (self.folder.glob(pattern) for pattern in (MANIFEST, PLAN, *_MEASURED))
        return any(path.is_file() for paths in done for path in paths)

    def finished(self) -> CheckpointManifest | None:
        """Publish the checkpoint that an earlier run made whole; None where none did."""
        manifest = read_manifest(self.folder, CheckpointManifest)
        if manifest is not None:
            self.finish()
        return manifest

    def finish(self) -> None:
        """Make the folder, in which the checkpoint now lies, the output; drop what is the run's.

        Once the manifest is there nothing else is needed to go on from a stop. What says so goes
        last. Raises as `publish`.
        """
        check_writer(self.output)  # before anything goes
        self.forget_measured()
        for ending in ("block", "scales", "halves"):
            for path in self.folder.glob(f"*.{ending}"):
                path.unlink()
        publish(self.folder, self.output, self.force)
        for name in (PLAN, ASKED):
            (self.output / name).unlink()

    def path(self, name: str) -> Path:
        """The file of the block `name`: a shard of a checkpoint, with the tensors' whole names."""
        return self.folder / f"{name}.block"

    def _scales_path(self, name: str) -> Path:
        return self.folder / f"{name}.scales"
