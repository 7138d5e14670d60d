"""`owl prune`: walk over the blocks, decide how much of each goes and which weights, write it.

One block is on the device at a time. The passes over the blocks are those that are needed and no
more: one with dense weights where the allocation wants outlier ratios, and one that prunes, in
which each block sees what the pruned blocks before it make of the calibration text.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from owl_deploy import recipe
from owl_deploy.artefact import (
    MANIFEST,
    check_output,
    read_manifest,
    staged_folder,
    versions,
    write_json,
)
from owl_deploy.checkpoint import Checkpoint, open_checkpoint, shards, write_compatible
from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.progress import Advance, bar
from owl_deploy.prune import budget, mask, score
from owl_deploy.prune.calibrate import Activations, InputNorms, Skeleton
from owl_deploy.recipe import PruneSettings
from owl_deploy.text import calibration_windows, load_text, load_tokenizer, tokenize

_TOKENS_A_BATCH = 4096  # more is no faster on a CPU, and costs memory


@dataclass(frozen=True)
class Calibration:
    """The text that the model is run on: `samples` windows of `sequence_length` tokens."""

    source: str
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sequence_length", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} must be at least {least}.")


@dataclass(frozen=True)
class Method:
    """A score, the group of weights within which it compares, and whether it looks at inputs."""

    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    mask: Callable[[torch.Tensor, float], torch.Tensor]
    needs_inputs: bool


METHODS = {
    "wanda": Method(score.wanda, mask.lowest_in_rows, needs_inputs=True),
    "magnitude": Method(score.magnitude, mask.lowest_in_matrix, needs_inputs=False),
}


@dataclass
class BlockReport:
    """What was asked of a block and what came out; `outlier_ratio` in percent."""

    name: str
    outlier_ratio: float | None
    sparsity: float
    achieved: float
    weights: int


def prune(
    model: str | Path,
    output: Path,
    settings: PruneSettings,
    calibration: Calibration | None,
    *,
    device: str = "auto",
    dtype: str = "auto",
    force: bool = False,
) -> dict[str, Any]:
    """Prune `model` (a folder or a Hub name) into the checkpoint folder `output`.

    `calibration` may be None when neither method nor allocation looks at inputs. Returns the
    manifest. Raises `BadInput` before any work for whatever can be known to be wrong by then.
    """
    check_output(output, force)
    started = time.perf_counter()
    checkpoint = open_checkpoint(model)
    run = _Run(checkpoint, settings, calibration, _device(device), dtype)
    with staged_folder(output, force) as folder:
        (folder / "blocks").mkdir()
        run.execute(folder / "blocks")
        _assemble(run, folder)
        layers = {block.name: block.sparsity for block in run.reports}
        comment = _describe(settings)
        (folder / "recipe.yaml").write_text(recipe.dump_resolved(settings.method, layers, comment))
        manifest = _manifest(run, str(model), time.perf_counter() - started)
        write_json(folder / MANIFEST, manifest)
    return manifest


class _Run:
    """One pruning of one model: the plan, and the reports as the blocks are finished."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: PruneSettings,
        calibration: Calibration | None,
        device: torch.device,
        dtype: str,
    ) -> None:
        self.checkpoint, self.settings, self.calibration = checkpoint, settings, calibration
        self.device = device
        _refuse_quantized(checkpoint)
        self.skeleton = Skeleton(checkpoint, _dtype(dtype, checkpoint, device), device)
        self.method = METHODS[settings.method]
        self.count = len(self.skeleton.blocks)
        self.names = [self.skeleton.block_name(index) for index in range(self.count)]
        self.sizes = [
            sum(linear.weight.numel() for linear in self.skeleton.linears(index).values())
            for index in range(self.count)
        ]
        self.windows = self._windows()
        self.reports: list[BlockReport] = []
        self._first_norms: InputNorms | None = None

    @property
    def needs_ratios(self) -> bool:
        return self.settings.allocation == "owl"

    def _windows(self) -> torch.Tensor | None:
        if not (self.method.needs_inputs or self.needs_ratios):
            return None
        calibration = self.calibration
        if calibration is None:
            raise BadInput(
                f"The method {self.settings.method} with the allocation "
                f"{self.settings.allocation} looks at the model's inputs.",
                "Give a text with --calibration.",
            )
        longest = self.checkpoint.config.get("max_position_embeddings")
        if longest and calibration.sequence_length > longest:
            raise BadInput(
                f"The model takes {longest} tokens, not {calibration.sequence_length}.",
                "Give a smaller --sequence-length.",
            )
        tokens = tokenize(load_tokenizer(self.checkpoint.folder), load_text(calibration.source))
        return calibration_windows(
            tokens, calibration.samples, calibration.sequence_length, calibration.seed
        )

    def execute(self, folder: Path) -> None:
        """Prune every block; the finished ones lie in `folder` as BLOCK.safetensors."""
        ratios: list[float | None] = [None] * self.count
        if self.needs_ratios:
            ratios = self._outlier_ratios()
        sparsities = self._allocate(ratios)
        hidden = self._embedded() if self.method.needs_inputs else None
        with bar("Pruning", (2 * self.count - 1) * self._steps()) as advance:
            for index in range(self.count):
                weights = self._prune_block(index, sparsities[index], hidden, advance)
                _save_block(weights, folder / f"{self.names[index]}.safetensors")
                self.reports.append(self._report(index, ratios[index], sparsities[index], weights))

    def _steps(self) -> int:
        return 1 if self.windows is None else -(-len(self.windows) // self._batch())

    def _batch(self) -> int:
        assert self.windows is not None
        return max(1, _TOKENS_A_BATCH // self.windows.shape[1])

    def _embedded(self) -> Activations:
        assert self.windows is not None
        return self.skeleton.embed(self.windows, self._batch())

    @torch.no_grad()
    def _outlier_ratios(self) -> list[float | None]:
        """Each block's outlier ratio under the dense model's own activations, in percent."""
        hidden = self._embedded()
        ratios: list[float | None] = []
        with bar("Measuring outliers", self.count * self._steps()) as advance:
            for index, name in enumerate(self.names):
                with self.skeleton.loaded(name) as block:
                    norms = self._gather(block, index, hidden, advance, keep=index + 1 < self.count)
                    scores = (
                        score.wanda(linear.weight.float(), norms.of(key))
                        for key, linear in self.skeleton.linears(index).items()
                    )
                    ratios.append(
                        budget.outlier_ratio(list(scores), self.settings.outlier_multiple)
                    )
                if index == 0:
                    self._first_norms = norms  # the pruning pass sees the same inputs there
        return ratios

    def _allocate(self, ratios: list[float | None]) -> list[float]:
        settings = self.settings
        if settings.allocation == "list":
            assert settings.layers is not None
            return _explicit(settings.layers, self.names)
        if settings.allocation == "owl":
            known = [ratio for ratio in ratios if ratio is not None]
            return budget.owl(settings.sparsity, self.sizes, known, settings.spread)
        return budget.uniform(settings.sparsity, self.sizes)

    @torch.no_grad()
    def _prune_block(
        self, index: int, sparsity: float, hidden: Activations | None, advance: Advance
    ) -> dict[str, torch.Tensor]:
        """The tensors of a pruned block, by full name, in the checkpoint's dtype."""
        name = self.names[index]
        weights = {f"{name}.{key}": t for key, t in self.checkpoint.read_module(name).items()}
        with self.skeleton.loaded(name) as block:
            norms = None
            if hidden is not None:
                norms = self._pruning_norms(block, index, hidden, advance)
            for key, linear in self.skeleton.linears(index).items():
                dense = weights[f"{name}.{key}.weight"]
                on_device = dense.to(self.device, torch.float32)
                inputs = norms.of(key) if norms is not None else on_device.new_zeros(())
                removed = self.method.mask(self.method.score(on_device, inputs), sparsity)
                linear.weight.masked_fill_(removed, 0)
                weights[f"{name}.{key}.weight"] = dense.masked_fill(removed.to(dense.device), 0)
            if hidden is not None and index + 1 < self.count:
                hidden.through(block, index, advance, keep=True)
            elif hidden is None:
                advance(2 * self._steps())
        return weights

    def _pruning_norms(
        self, block: torch.nn.Module, index: int, hidden: Activations, advance: Advance
    ) -> InputNorms:
        if index == 0 and self._first_norms is not None:
            advance(self._steps())
            return self._first_norms
        return self._gather(block, index, hidden, advance, keep=False)

    def _gather(
        self,
        block: torch.nn.Module,
        index: int,
        hidden: Activations,
        advance: Advance,
        *,
        keep: bool,
    ) -> InputNorms:
        assert self.windows is not None
        norms = InputNorms(self.skeleton.linears(index), len(self.windows))
        with norms.gathering():
            hidden.through(block, index, advance, keep=keep)
        return norms

    def _report(
        self, index: int, ratio: float | None, sparsity: float, weights: dict[str, torch.Tensor]
    ) -> BlockReport:
        name, size = self.names[index], self.sizes[index]
        zeros = sum(
            int((weights[f"{name}.{key}.weight"] == 0).sum())
            for key in self.skeleton.linears(index)
        )
        return BlockReport(name, ratio, sparsity, zeros / size, size)


def _explicit(layers: dict[str, float], names: list[str]) -> list[float]:
    missing = [name for name in names if name not in layers]
    strange = [name for name in layers if name not in names]
    if missing or strange:
        raise BadInput(
            f"The recipe's layers are not the model's: {(strange + missing)[0]} "
            f"{'is not in the model' if strange else 'has no sparsity'}.",
            f"The model has {len(names)} blocks, from {names[0]} to {names[-1]}.",
        )
    return [layers[name] for name in names]


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        raise BadInput(
            f"{checkpoint.folder} is quantized.", "Prune the unquantized model, then quantize."
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise unknown_name("device", name, ("auto", "cpu", "cuda")) from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BadInput("There is no CUDA device that this torch can use.", "Use --device cpu.")
    return device


def _dtype(name: str, checkpoint: Checkpoint, device: torch.device) -> torch.dtype:
    """The dtype to compute in: `auto` is float32 on a CPU, the checkpoint's own on a GPU."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        stored = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
        return torch.float32 if device.type == "cpu" else known.get(str(stored), torch.float32)
    if name not in known:
        raise unknown_name("dtype", name, ("auto", *known))
    return known[name]


def _save_block(weights: dict[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(weights, path)


def _assemble(run: _Run, folder: Path) -> None:
    """Put the finished blocks and the untouched tensors together, as a checkpoint."""
    from safetensors import safe_open

    blocks = folder / "blocks"

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        pruned = set()
        for name in run.names:
            with safe_open(blocks / f"{name}.safetensors", framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    pruned.add(key)
                    yield key, file.get_tensor(key)
        for key in run.checkpoint.files:
            if key not in pruned:
                yield key, run.checkpoint.read(key)

    shards(tensors(), folder)
    for name in run.names:
        (blocks / f"{name}.safetensors").unlink()
    blocks.rmdir()
    write_compatible(run.checkpoint, folder)


def _describe(settings: PruneSettings) -> str:
    lines = [f"Resolved by owl prune: {settings.method}, {settings.allocation}, "]
    lines[0] += f"{settings.sparsity:.4g} of the blocks' weights removed."
    if settings.allocation == "owl":
        lines.append(
            f"OWL: outlier multiple (M) {settings.outlier_multiple:g}, "
            f"spread (lambda) {settings.spread:g}."
        )
    return "\n".join(lines)


def _manifest(run: _Run, source: str, seconds: float) -> dict[str, Any]:
    import hashlib

    total = sum(run.sizes)
    calibration = None
    if run.windows is not None and run.calibration is not None:
        digest = hashlib.sha256(run.windows.numpy().tobytes()).hexdigest()
        calibration = {**asdict(run.calibration), "token_ids_sha256": digest}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "kind": "checkpoint",
        "versions": versions(),
        "command": sys.argv,
        "source": source,
        "source_manifest": read_manifest(run.checkpoint.folder) or None,
        "settings": run.settings.model_dump(),
        "calibration": calibration,
        "device": str(run.device),
        "dtype": str(run.skeleton.dtype).removeprefix("torch."),
        "weights": total,
        "sparsity": {
            "asked": sum(b.sparsity * b.weights for b in run.reports) / total,
            "achieved": sum(b.achieved * b.weights for b in run.reports) / total,
        },
        "blocks": [asdict(block) for block in run.reports],
        "wall_seconds": seconds,
        "peak_memory_bytes": peak_kib * 1024,
        "peak_device_memory_bytes": (
            torch.cuda.max_memory_allocated() if run.device.type == "cuda" else None
        ),
    }
