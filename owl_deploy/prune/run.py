"""`owl prune`: walk over the blocks, decide how much of each goes and which weights, write it.

One block is on the device at a time. The passes over the blocks are those that are needed and no
more: one with dense weights where the allocation looks at scores, and one that prunes, in which
each block sees what the pruned blocks before it make of the calibration text.
"""

import hashlib
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

from owl_deploy import recipe
from owl_deploy.allocation import ALLOCATIONS
from owl_deploy.artefact import only_writer
from owl_deploy.blocks import Activations, Skeleton
from owl_deploy.checkpoint import Checkpoint, open_checkpoint, shards, write_compatible
from owl_deploy.errors import BadInput
from owl_deploy.hardware import (
    ANY_HARDWARE,
    Hardware,
    find_batch,
    find_device,
    find_dtype,
)
from owl_deploy.manifest import CheckpointManifest, Manifest, read_manifest, versions
from owl_deploy.partial import kept_for_resuming
from owl_deploy.progress import Advance, bar
from owl_deploy.prune import plan, score, sparsegpt, tune
from owl_deploy.prune.calibrate import InputStatistics
from owl_deploy.prune.methods import methods
from owl_deploy.prune.picture import sparsity_svg
from owl_deploy.prune.store import Store
from owl_deploy.recipe import PruneSettings
from owl_deploy.text import calibration_windows, load_text, load_tokenizer, tokenize


@dataclass(frozen=True)
class Calibration:
    """The text that the model is run on: `samples` windows of `sequence_length` tokens.

    `source`: a text file, "wikitext", "c4", "ptb", or "hf:NAME:CONFIG:SPLIT:COLUMN". `seed`: of the
    draw of windows. Raises `BadInput` for fewer than one window, or than two tokens.
    """

    source: str
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("sequence_length", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"--{name.replace('_', '-')} must be at least {least}.")


@dataclass(frozen=True)
class BlockReport:
    """What was asked of a block (or the head) and what came out; `outlier_ratio` in percent."""

    name: str
    outlier_ratio: float | None
    sparsity: float
    achieved: float
    weights: int


class Plan(BaseModel):
    """What is known before the first block is pruned: the settings, tuned if that was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: PruneSettings
    statistics: list[plan.BlockStatistics] | None = None
    trials: list[tune.Trial] = []


def prune(
    model: str | Path,
    output: str | Path,
    settings: PruneSettings,
    calibration: Calibration | None = None,
    hardware: Hardware = ANY_HARDWARE,
    *,
    tune_allocation: bool = False,
    force: bool = False,
    resume: bool = False,
    origin: dict[str, Any] | None = None,
) -> CheckpointManifest:
    """Prune `model` (a folder or a Hub name) into the checkpoint folder `output`.

    `calibration` may be None when neither method nor allocation looks at inputs; `hardware` says
    where to compute. With `tune_allocation` the allocation's parameters are searched for (see
    `tune`). `force` replaces an output that is there. Every finished block is durable: a run that
    was stopped continues with `resume`, to bit-identical weights. `origin` (see `recipe.origin`) is
    recorded in the manifest: what the settings were made from. Returns the manifest, which says of
    each block what share of its weights was asked to go and went. Raises `BadInput` before any work
    for whatever can be known to be wrong by then, `EnvironmentFailed` for a full disk or memory.
    """
    started, output = time.perf_counter(), Path(output)
    with only_writer(output, force, model):
        run = Run(
            open_checkpoint(model), settings, calibration, hardware, tune_allocation=tune_allocation
        )
        store = Store(output, run.asked(), resume=resume, force=force)
        with kept_for_resuming(store, "use a smaller --batch-size"):
            reports, head = run.execute(store)
            _assemble(run, store)
            facts = _facts(run, reports, str(model), time.perf_counter() - started)
            facts |= {"recipe": origin, "resumed": store.resumed}
            facts["head"] = asdict(head) if head else None
            manifest = CheckpointManifest.model_validate(facts)
            (store.folder / "sparsity.svg").write_text(sparsity_svg(manifest), encoding="utf-8")
            manifest.write(store.folder)
            store.finish()
    return manifest


class Run:
    """One pruning of one model: what is asked, on what text, where."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: PruneSettings,
        calibration: Calibration | None,
        hardware: Hardware,
        *,
        tune_allocation: bool,
    ) -> None:
        self.checkpoint, self.settings, self.calibration = checkpoint, settings, calibration
        self.tune = tune_allocation
        if self.tune:
            tune.candidates(settings)  # or a sentence, before any work
        self.trials: Sequence[tune.Trial] = ()
        self.held_out: torch.Tensor | None = None
        _refuse_quantized(checkpoint)
        self.device = find_device(hardware.device)
        dtype = find_dtype(hardware.dtype, checkpoint, self.device)
        self.skeleton = Skeleton(checkpoint, dtype, self.device)
        options = sparsegpt.Options(settings.block_size, settings.preserve_mask)
        self.method = methods(options)[settings.method]
        self.allocation = ALLOCATIONS[settings.allocation]
        self.names = self.skeleton.names
        sizes = [
            {name: linear.weight.numel() for name, linear in self.skeleton.linears(i).items()}
            for i in range(len(self.names))
        ]
        self.shape = plan.select(self.names, sizes, settings.skip)
        self._linears_a_block = [len(own) for own in sizes]
        self._check_groups()
        self.windows = self._windows()
        self.batch = find_batch(hardware.batch_size, self.windows, self.skeleton)
        self._first_inputs: InputStatistics | None = None

    def asked(self) -> dict[str, Any]:
        """What decides the result: a run that resumes must be asked the same."""
        return {
            "model": self.checkpoint.identity(),
            "settings": self.settings.model_dump(mode="json"),
            "tune": self.tune,
            "calibration": self.describe_calibration(),
            "device": self.device.type,
            "dtype": str(self.skeleton.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch_size": self.batch,
            "versions": versions(),
        }

    def describe_calibration(self) -> dict[str, Any] | None:
        """The calibration text, with a digest of the token ids that were used; None without."""
        if self.windows is None or self.calibration is None:
            return None
        digest = hashlib.sha256(self.windows.numpy().tobytes()).hexdigest()
        return {**asdict(self.calibration), "token_ids_sha256": digest}

    def _check_groups(self) -> None:
        if self.settings.group is None:
            return
        size = self.settings.group[1]
        for index, own in enumerate(self.shape.linears):
            for name in own:
                columns = self.skeleton.linears(index)[name].in_features
                _check_columns(f"{self.names[index]}.{name}", columns, size)
        if self.settings.head_sparsity is not None:
            _check_columns(self.skeleton.head_name, self.skeleton.head.in_features, size)

    def _windows(self) -> torch.Tensor | None:
        measures = self.tune or self.allocation.statistic is not None
        if self.method.needs == "nothing" and not measures:
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
        extra = tune.HELD_OUT_WINDOWS if self.tune else 0
        windows = calibration_windows(
            tokens, calibration.samples + extra, calibration.sequence_length, calibration.seed
        )
        if extra:
            self.held_out = windows[calibration.samples :]
        return windows[: calibration.samples]

    def execute(self, store: Store) -> tuple[list[BlockReport], BlockReport | None]:
        """Prune every block that `store` does not hold yet, and the head if that is asked.

        `store` then holds them all.
        """
        made = self._plan(store)
        self.settings, self.trials = made.settings, made.trials
        statistics = made.statistics
        sparsities = self.sparsities(statistics)
        layers = plan.resolved_layers(self.shape, sparsities, self._linears_a_block)
        head, head_sparsity = None, self.settings.head_sparsity
        if head_sparsity is not None:
            layers[self.skeleton.head_name] = head_sparsity
        text = recipe.dump_resolved(self.settings, layers)
        (store.folder / "recipe.yaml").write_text(text, encoding="utf-8")
        parts = [*self.names, *([] if head_sparsity is None else [self.skeleton.head_name])]
        hidden = None
        if self.method.needs != "nothing" and not all(map(store.holds, parts)):
            hidden = self._embedded(store.folder)
        passes = 2 * len(parts) - (hidden is not None)
        reports = []
        with bar("Pruning", passes * self._samples) as advance:
            for index, name in enumerate(self.names):
                weights = store.load(name)
                if weights is None:
                    weights = self._prune_block(index, sparsities[index], hidden, advance)
                    store.save(name, weights)
                else:
                    self._replay(index, weights, hidden, advance)
                ratio = None if statistics is None else self._ratio(statistics[index])
                reports.append(self._report(index, ratio, sparsities[index], weights))
            if head_sparsity is not None:
                head = self._finish_head(store, head_sparsity, hidden, advance)
        return reports, head

    def sparsities(self, statistics: plan.Statistics | None) -> list[dict[str, float]]:
        """For each block, its pruned Linears' sparsities by name."""
        blocks = None
        if self.settings.layers is None:
            blocks = plan.block_sparsities(self.settings, self.shape, statistics)
        return plan.linear_sparsities(self.settings, self.shape, blocks)

    def _ratio(self, block: plan.BlockStatistics) -> float | None:
        return block.outlier_ratios.get(self.settings.outlier_multiple)

    @property
    def _samples(self) -> int:
        return 1 if self.windows is None else len(self.windows)

    def _embedded(self, scratch: Path) -> Activations:
        assert self.windows is not None
        return self.skeleton.embed(self.windows, self.batch, scratch)

    def _plan(self, store: Store) -> Plan:
        """What the dense pass measured and tuning chose, now or in the run that this resumes."""
        found = store.read("plan.json")
        if found is not None:
            return Plan.model_validate(found)
        made = Plan(settings=self.settings)
        if self.tune:
            settings = tune.candidates(self.settings)
            multiples = dict.fromkeys(one.outlier_multiple for one in settings)
            norms: list[tune.LayerNorms] = []
            statistics = self.measure(list(multiples), store.folder, norms)
            assert self.held_out is not None
            judge = tune.Judge(self.skeleton, self.shape, norms, self.held_out, store.folder)
            trials = judge.trials(settings, statistics)
            made = Plan(
                settings=tune.best(self.settings, trials), statistics=statistics, trials=trials
            )
        elif self.allocation.statistic is not None:
            statistics = self.measure([self.settings.outlier_multiple], store.folder)
            made = Plan(settings=self.settings, statistics=statistics)
        store.write("plan.json", made.model_dump(mode="json"))
        return made

    @torch.no_grad()
    def measure(
        self,
        multiples: list[float],
        scratch: Path,
        norms: list[tune.LayerNorms] | None = None,
    ) -> list[plan.BlockStatistics]:
        """Each block's statistics under the dense model's own activations, in one pass.

        With `norms` every block's input norms are appended to it.
        """
        hidden = self._embedded(scratch)
        found = []
        with bar("Measuring outliers", len(self.names) * self._samples) as advance:
            for index, name in enumerate(self.names):
                with self.skeleton.loaded(name) as block:
                    last = index + 1 == len(self.names)
                    # The pruning pass sees the same inputs at the first block, and only there.
                    hessian = index == 0 and self.method.needs == "hessian"
                    inputs = self._gather(
                        block, index, hidden, advance, keep=not last, hessian=hessian
                    )
                    linears = self.skeleton.linears(index)
                    own = {key: inputs.norm(key) for key in self.shape.linears[index]}
                    scores = [score.wanda(linears[key].weight.float(), own[key]) for key in own]
                    median = self.allocation.statistic == "median score"
                    found.append(_block_statistics(scores, multiples, median=median))
                if norms is not None:
                    norms.append(own)
                if index == 0:
                    self._first_inputs = inputs
        return found

    @torch.no_grad()
    def _prune_block(
        self,
        index: int,
        sparsities: Mapping[str, float],
        hidden: Activations | None,
        advance: Advance,
    ) -> dict[str, torch.Tensor]:
        """The tensors of a pruned block, by their names in it, in the checkpoint's dtype."""
        name = self.names[index]
        weights = self.checkpoint.read_module(name)
        linears = self.skeleton.linears(index)
        with self.skeleton.loaded(name, weights) as block:
            inputs = None
            if hidden is not None:
                inputs = self._pruning_inputs(block, index, hidden, advance)
            for key, sparsity in sparsities.items():
                pruned = self._pruned(weights[f"{key}.weight"], inputs, key, sparsity)
                weights[f"{key}.weight"] = pruned
                linears[key].weight.copy_(pruned)
            self._pass_on(block, index, hidden, advance)
        return weights

    def _pruned(
        self, dense: torch.Tensor, inputs: InputStatistics | None, key: str, sparsity: float
    ) -> torch.Tensor:
        """The weight `dense` [out, in] of the Linear `key`, pruned: as it lies, in its dtype."""
        group = self.settings.group
        if group is not None:
            group = (recipe.kept(sparsity, group[1]), group[1])
        asked = _Asked(inputs, key, self.settings.dampening)
        on_device = dense.to(self.device, torch.float32)
        return self.method.prune(on_device, asked, sparsity, group).to(dense.device, dense.dtype)

    @torch.no_grad()
    def _finish_head(
        self, store: Store, sparsity: float, hidden: Activations | None, advance: Advance
    ) -> BlockReport:
        """Prune the head, by what the pruned blocks let enter it, unless `store` holds it."""
        name = self.skeleton.head_name
        weights = store.load(name)
        if weights is None:
            inputs = None
            if hidden is not None:
                assert self.windows is not None
                hessian = self.method.needs == "hessian"
                inputs = InputStatistics({name: self.skeleton.head}, self._samples, hessian=hessian)
                with inputs.gathering():
                    self.skeleton.enter_head(self.windows, hidden, advance)
            dense = self.checkpoint.read(self.skeleton.head_weights[0])
            weights = {"weight": self._pruned(dense, inputs, name, sparsity)}
            store.save(name, weights)
        if hidden is None:
            advance(2 * self._samples)
        weight = weights["weight"]
        zeros = int((weight == 0).sum())
        return BlockReport(name, None, sparsity, zeros / weight.numel(), weight.numel())

    def _pruning_inputs(
        self, block: torch.nn.Module, index: int, hidden: Activations, advance: Advance
    ) -> InputStatistics:
        if index == 0 and self._first_inputs is not None:
            advance(self._samples)
            return self._first_inputs
        hessian = self.method.needs == "hessian"
        return self._gather(block, index, hidden, advance, keep=False, hessian=hessian)

    def _replay(
        self,
        index: int,
        weights: dict[str, torch.Tensor],
        hidden: Activations | None,
        advance: Advance,
    ) -> None:
        """Bring the hidden states past a block that an earlier run has finished."""
        with self.skeleton.loaded(self.names[index], weights) as block, torch.no_grad():
            if hidden is not None:
                advance(self._samples)
            self._pass_on(block, index, hidden, advance)

    def _pass_on(
        self, block: torch.nn.Module, index: int, hidden: Activations | None, advance: Advance
    ) -> None:
        """Run the pruned block, for what enters the next one; after the last only a head may."""
        if hidden is None:
            advance(2 * self._samples)
        elif index + 1 < len(self.names) or self.settings.head_sparsity is not None:
            hidden.through(block, index, advance, keep=True)

    def _gather(
        self,
        block: torch.nn.Module,
        index: int,
        hidden: Activations,
        advance: Advance,
        *,
        keep: bool,
        hessian: bool,
    ) -> InputStatistics:
        linears = self.skeleton.linears(index)
        inputs = InputStatistics(
            {key: linears[key] for key in self.shape.linears[index]}, self._samples, hessian=hessian
        )
        with inputs.gathering(inputs_only=not keep):
            hidden.through(block, index, advance, keep=keep)
        return inputs

    def _report(
        self,
        index: int,
        ratio: float | None,
        sparsities: Mapping[str, float],
        weights: dict[str, torch.Tensor],
    ) -> BlockReport:
        sizes = self.shape.linears[index]
        total = sum(sizes.values())
        wanted = [sparsities.get(key, 0.0) for key in sizes]
        asked = wanted[0]
        if len(set(wanted)) > 1:
            asked = sum(s * n for s, n in zip(wanted, sizes.values(), strict=True)) / total
        zeros = sum(int((weights[f"{key}.weight"] == 0).sum()) for key in sizes)
        return BlockReport(self.names[index], ratio, asked, zeros / total, total)


@dataclass(frozen=True)
class _Asked:
    """The inputs of one Linear, as a method asks for them (see `methods.Inputs`)."""

    statistics: InputStatistics | None
    name: str
    dampening: float

    def norm(self) -> torch.Tensor:
        assert self.statistics is not None
        return self.statistics.norm(self.name)

    def factor(self) -> sparsegpt.Factor:
        assert self.statistics is not None
        return self.statistics.factor(self.name, self.dampening)


def _block_statistics(
    scores: list[torch.Tensor], multiples: list[float], *, median: bool
) -> plan.BlockStatistics:
    if not scores:  # every Linear of the block is skipped
        return plan.BlockStatistics(dict.fromkeys(multiples, 0.0), 0.0)
    ratios = score.outlier_ratios(scores, multiples)
    middle = score.median_score(scores) if median else 0.0
    return plan.BlockStatistics(dict(zip(multiples, ratios, strict=True)), middle)


def _check_columns(name: str, columns: int, size: int) -> None:
    if columns % size:
        raise BadInput(
            f"{name} has {columns} inputs, no multiple of {size}.",
            "Choose another structure, or leave that layer dense.",
        )


def _refuse_quantized(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("quantization_config"):
        raise BadInput(
            f"{checkpoint.folder} is quantized.", "Prune the unquantized model, then quantize."
        )


def _assemble(run: Run, store: Store) -> None:
    """Put the finished blocks and the untouched tensors together, as a checkpoint."""
    files = run.checkpoint.files
    large = run.checkpoint.is_large

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in run.names if not large else ():
            weights = store.load(name)
            assert weights is not None
            yield from ((f"{name}.{key}", tensor) for key, tensor in weights.items())
        blocks = tuple(f"{name}." for name in run.names)
        for key in files:
            # A tied weight may lie there under both names, of which each is written by itself.
            head = key in run.skeleton.head_weights and store.load(run.skeleton.head_name)
            if head:
                yield key, head["weight"]
            elif not key.startswith(blocks):
                yield key, run.checkpoint.read(key)

    ready = [store.path(name) for name in run.names] if large else []
    shards(tensors(), store.folder, ready)
    write_compatible(run.checkpoint, store.folder)


def _facts(run: Run, reports: list[BlockReport], source: str, seconds: float) -> dict[str, Any]:
    total = sum(block.weights for block in reports)
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_gpu = run.device.type == "cuda"
    before = read_manifest(run.checkpoint.folder, Manifest)
    return {
        "versions": versions(),
        "command": sys.argv,
        "source": source,
        "source_manifest": before.to_json() if before else None,
        "settings": run.settings.model_dump(mode="json"),
        "tuning": [asdict(trial) for trial in run.trials] or None,
        "calibration": run.describe_calibration(),
        "device": str(run.device),
        "dtype": str(run.skeleton.dtype).removeprefix("torch."),
        "weights": total,
        "sparsity": {
            "asked": sum(b.sparsity * b.weights for b in reports) / total,
            "achieved": sum(b.achieved * b.weights for b in reports) / total,
        },
        "blocks": [asdict(block) for block in reports],
        "wall_seconds": seconds,
        "peak_memory_bytes": peak_kib * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
