"""`owl finetune`: train a sparse checkpoint, or an adapter for it, and write what came out.

What is trained lies in the Trainer's checkpoints beside the output, in `.NAME.owl-partial`, so that
a run that was stopped resumes; with block groups each finished group is kept as well.

Under torchrun each process reads windows of its own and the gradients are averaged (torch's
DistributedDataParallel): every process then has the same weights, and the first one writes. A
model that no process can hold is divided over them (`shard`).
"""

import contextlib
import functools
import gc
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from owl_deploy.data.text import source_files
from owl_deploy.errors import BadInput, option, unknown_name
from owl_deploy.finetune.frozen import halve
from owl_deploy.finetune.logits import TeacherCache
from owl_deploy.finetune.needs import Needs
from owl_deploy.finetune.picture import learning_curve_svg
from owl_deploy.finetune.settings import FinetuneSettings, resolved
from owl_deploy.finetune.shard import gather_trained, shard, whole
from owl_deploy.finetune.source import Source, load_teacher
from owl_deploy.finetune.train import (
    Schedule,
    last_checkpoint,
    tokens_per_second,
    train,
)
from owl_deploy.finetune.trainee import Distillation, Trainee
from owl_deploy.finetune.write import merged, write_adapter, write_checkpoint
from owl_deploy.inference.worker import peak_bytes
from owl_deploy.models import adapter
from owl_deploy.models.checkpoint import GRID, open_checkpoint
from owl_deploy.models.manifest import AdapterManifest, CheckpointManifest, Finetuning, versions
from owl_deploy.models.sparse_linear import finished, freeze, sparsify
from owl_deploy.utils.artefact import check_writer, only_writer, publish, sha256
from owl_deploy.utils.hardware import find_device, find_training_dtype, name_of, on_threads
from owl_deploy.utils.progress import bar
from owl_deploy.utils.ranks import ALONE, Ranks, join
from owl_deploy.utils.resume import Partial, asked_before, kept_for_resuming

T = TypeVar("T")

_LESS_MEMORY = (
    "A smaller --batch-size or --block-group takes less; it is another training (--force)."
)
_COUNTED = ("step", "seconds", "tokens")  # what goes on from one block group to the next
_PASSES = 4  # over the text, at most, in a time: they teach as new text does (arXiv 2305.16264)
_HASHED = 1024  # windows at once: the text is larger than memory, perhaps
# What `accelerate launch` sets to shard a model, which this does not do.
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def finetune(
    model: str | Path,
    output: str | Path,
    text: str | Path | Sequence[str | Path],
    settings: FinetuneSettings | dict[str, Any],
    *,
    teacher: str | Path | None = None,
    force: bool = False,
    resume: bool = False,
) -> CheckpointManifest | AdapterManifest:
    """Fine-tune the checkpoint `model` on `text` into the folder `output`.

    `text`: a SOURCE (see text.py), or several, which are read one after another.
    `settings`, or only those that are given, as a dict: what is None there gets its method's own
    default. `teacher`: a dense checkpoint to learn from as well. The result is an adapter in PEFT's
    format, or, masked, a checkpoint whose zeros are exactly those of `model`: that is checked
    before it appears. `force` replaces an output that is there; `resume` continues a run that was
    stopped, in as many processes. Under torchrun all of its processes call this and share the work.
    Returns the manifest. Raises `BadInput` before any work for what can be known to be wrong by
    then, and `EnvironmentFailed` for a full disk or memory.
    """
    complete, output = resolved(settings, teacher is not None), Path(output)
    _refuse_sharding()
    ranks = join(_versions())
    with contextlib.ExitStack() as stack:
        if ranks.leads:
            # Without `force` nothing that is there is replaced, whatever lies in it.
            texts = _sources(text) if force else []
            files = [file for source in texts for file in source_files(source)]
            read = [model, *([teacher] if teacher else []), *files]
            stack.enter_context(only_writer(output, force, *read))
        before = ranks.from_leader(lambda: asked_before(output, resume=resume, force=force))
        same = before.get("processes") == ranks.size
        stack.enter_context(on_threads(before.get("threads") if same else None))
        run = Run(Source(model), complete, text, None if teacher is None else str(teacher), ranks)
        partial = ranks.from_leader(lambda: run.begin(output, resume=resume, force=force))
        with kept_for_resuming(partial, _LESS_MEMORY):
            partial.check_seen(ranks)
            outcome = run.execute(partial)
            done = run.describe(outcome, resumed=partial.resumed)
            return ranks.from_leader(lambda: run.complete(partial, done))


def _sources(text: str | Path | Sequence[str | Path]) -> list[str]:
    return [str(text)] if isinstance(text, str | Path) else list(map(str, text))


def _refuse_sharding() -> None:
    if any(os.environ.get(name, "").lower() in ("true", "1") for name in _SHARDING):
        raise BadInput(
            "owl finetune does not shard a model as accelerate is configured to (FSDP, DeepSpeed).",
            "Use torchrun, and where the model does not fit --shard.",
        )


class _Unfinished(Partial):
    @property
    def has_work(self) -> bool:
        """Whether a training has saved something, or a group is finished."""
        folders = [path for path in self.folder.glob("group-*") if path.is_dir()]
        return any(self.folder.glob("group-*.json")) or any(map(last_checkpoint, folders))


class Run:
    """One fine-tuning of one checkpoint: what is asked, on what text, computed in what.

    `ranks`: the processes that share it; each makes one.
    """

    def __init__(
        self,
        source: Source,
        settings: FinetuneSettings,
        text: str | Path | Sequence[str | Path],
        teacher: str | None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.source, self.settings, self.asked_teacher = source, settings, teacher
        self.teacher = None if teacher is None else open_checkpoint(teacher)
        self.ranks = ranks
        self.text = _sources(text)
        if settings.writes_weights:
            flag = "--merge masked" if settings.merge else "--method masked"
            source.refuse_dense(flag)
        if settings.merge:
            source.refuse_rounded()
        self.targets = _targets(source, settings.target_modules)
        length = settings.sequence_length
        self.windows = _leader_first(ranks, lambda: source.windows(self.text, length))
        if settings.shard and ranks.size == 1:
            raise BadInput(
                "--shard divides the model over processes, and there is one.",
                "Start several with torchrun, or use --block-group where the model does not fit.",
            )
        self.dtype = find_training_dtype(settings.dtype, find_device("auto"))
        # Frozen weights stay as the checkpoint has them, whatever its config.json says, where the
        # products are bfloat16 anyway.
        half = self.dtype == torch.bfloat16 and source.checkpoint.dtype() == torch.bfloat16
        self.stored = torch.bfloat16 if half else torch.float32
        self._cache: TeacherCache | None = None
        vocabulary = source.checkpoint.config.get("vocab_size", 0)
        if settings.teacher_top is not None and settings.teacher_top >= vocabulary:
            raise BadInput(f"--teacher-top must be below the vocabulary's {vocabulary} entries.")
        self._teacher: tuple[Any, list[nn.Module]] | None = None
        windows = len(self.windows[0])
        self.needs = Needs(source, settings, self.teacher, self.targets, windows, ranks.size)
        self._check_ranks()
        self.needs.check_steps()
        self.needs.check_memory(self.dtype)
        if self.teacher is not None:
            self.teacher.check_length(settings.sequence_length, "--sequence-length")
            like = settings.feature_weight is not None
            self._teacher = load_teacher(source, self.teacher, self.dtype, like=like)
            self._halve(self._teacher[0])

    def _check_ranks(self) -> None:
        """Refuse processes that would have nothing to read, or that would train different things.

        Weights that differ once differ ever more, and nothing else would say so: only gradients are
        averaged. Threads may differ: they change in which order sums are made.
        """
        if len(self.windows[0]) < self.ranks.size:
            raise BadInput(
                f"There are {self.ranks.size} processes, and {len(self.windows[0])} windows.",
                "Give a longer text or a smaller --sequence-length, or start fewer processes.",
            )
        if self.ranks.size == 1:
            return
        asked = self.asked()
        alike = {option(name): value for name, value in asked["settings"].items()}
        alike |= {what: asked[what] for what in ("model", "grid", "text", "teacher", "dtype")}
        self.ranks.check_alike(alike | {"kind of device": asked["device"]})

    def begin(self, output: Path, *, resume: bool, force: bool) -> "_Unfinished":
        """The leader's: where the run keeps what is done; `BadInput` where it cannot begin."""
        self.needs.check_disk(output, resume=resume)
        return _Unfinished(output, self.asked(), resume=resume, force=force)

    def complete(
        self, partial: "_Unfinished", done: Finetuning
    ) -> CheckpointManifest | AdapterManifest:
        """The leader's: make what was written the output, with its manifest."""
        partial.check_unchanged(self._inputs)
        staging = _staging(partial)
        manifest = self.manifest(done, staging)
        svg = learning_curve_svg(done)
        (staging / "learning_curve.svg").write_text(svg, encoding="utf-8")
        manifest.write(staging)
        publish(staging, partial.output, partial.force)
        partial.discard()
        return manifest

    def asked(self) -> dict[str, Any]:
        """What decides the result: a run that resumes must be asked the same."""
        return self._inputs() | {
            "settings": self.settings.model_dump(mode="json"),
            "text": self._describe_text(),
            "device": find_device("auto").type,
            "dtype": name_of(self.dtype),
            "threads": torch.get_num_threads(),
            "processes": self.ranks.size,
            "versions": _versions(),
        }

    def _inputs(self) -> dict[str, Any]:
        """The models that are read, as they are now."""
        return {
            "model": self.source.checkpoint.identity(),
            "grid": sha256(grid) if (grid := self.source.folder / GRID).is_file() else None,
            "teacher": None if self.teacher is None else self.teacher.identity(),
        }

    def _describe_text(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for part in self.windows:
            for some in torch.split(part, _HASHED):
                digest.update(some.long().numpy().tobytes())
        return {
            "source": self.text[0] if len(self.text) == 1 else self.text,
            "windows": len(self.windows[0]),
            "held_out_windows": len(self.windows[1]),
            "token_ids_sha256": digest.hexdigest(),
        }

    def execute(self, partial: Partial) -> dict[str, Any]:
        """Train, and let the leader write weights or adapter; the outcome, as for the manifest."""
        staging = _staging(partial)
        if self.ranks.leads:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
        if self.needs.cache_bytes:
            windows, length = self.windows[0].shape
            rank, top = self.ranks.rank, self.settings.teacher_top or 0
            self._cache = TeacherCache(partial.folder, rank, windows, length - 1, top)
        if self.settings.method == "masked":
            tensors, outcome = self._masked(partial)
            self._write(tensors, staging)
        else:
            outcome = self._lora(partial, staging)
        return outcome | {"held_out_loss": self._held_out_loss(outcome["curve"])}

    def _held_out_loss(self, curve: list[dict[str, Any]]) -> dict[str, float | None]:
        """Together: as for the manifest, by the learning curve and the teacher."""
        losses = [row["eval_loss"] for row in curve if "eval_loss" in row]
        return {"before": losses[0], "after": losses[-1], "teacher": self._teacher_loss()}

    def _teacher_loss(self) -> float | None:
        """Together: the teacher's own loss on the held-out windows, where the training left it."""
        if self._teacher is None:
            return None
        return self._loss(Trainee(self._teacher[0], dtype=self.dtype), "Asking the teacher")

    def _loss(self, reader: Trainee, what: str) -> float:
        """Together: a model's loss on the held-out windows, in nats a token."""
        held_out, total = self.windows[1], 0.0
        with bar(what, len(held_out)) as advance, torch.no_grad():
            reader.eval()
            for window in held_out:
                ids = window.long()[None].to(next(reader.parameters()).device)
                total += float(reader(ids, ids)["loss"])
                advance(1)
        return total / len(held_out)

    def _halve(self, model: nn.Module) -> None:
        """Hold what is frozen in half the memory; one that is sharded is divided instead."""
        if self.dtype == torch.float32 and not self.settings.shard:
            halve(model)

    def _lora(self, partial: Partial, staging: Path) -> dict[str, Any]:
        model = self.source.load(self.stored)
        torch.manual_seed(self.settings.seed)
        adapted = adapter.new_adapter(
            model,
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules=self.targets,
        )
        self._halve(adapted)  # not before: an adapter begins in its layer's dtype
        trainee = self._trainee(adapted)
        curve = self._train(trainee, partial, 0, 1)
        count = sum(parameter.numel() for parameter in trainee.trained().values())
        gather_trained(adapted)
        kept = 0
        if self.settings.merge is None:
            if self.ranks.leads:
                write_adapter(adapted, staging)
        else:
            tensors, kept = merged(self.source, adapter.deltas(adapted))
            del model, adapted, trainee  # before there is another
            curve = [*curve, curve[-1] | {"eval_loss": self._merged_loss(tensors)}]
            self._write(tensors, staging)
        return {"curve": curve, "parameters_trained": count, "kept_off_zero": kept}

    def _merged_loss(self, tensors: dict[str, torch.Tensor]) -> float:
        """Together: the held-out loss of what is written, which has lost the mask's share."""
        gc.collect()
        model = self.source.load(self.stored)
        for name, tensor in tensors.items():
            model.get_parameter(name).data.copy_(tensor)
        if self.settings.shard:
            shard(model, [model.get_submodule(name) for name in self.source.blocks])
        else:
            self._halve(model.to(find_device("auto")))
        reader = Trainee(model, dtype=self.dtype, sharded=self.settings.shard)
        return self._loss(reader, "Evaluating what is merged")

    def _masked(self, partial: Partial) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Train the blocks, a group at a time; their tensors, and the outcome."""
        model = self.source.load(self.stored)
        self._halve(model)
        size = self.settings.block_group or len(self.source.blocks)
        starts = range(0, len(self.source.blocks), size)
        tensors: dict[str, torch.Tensor] = {}
        curve: list[dict[str, Any]] = []
        count = kept = 0
        for index, start in enumerate(starts):
            names = self.source.blocks[start : start + size]
            read = functools.partial(partial.read, f"group-{index}.json")
            if self.ranks.from_leader(read) is None:
                self._train_group(model, names, partial, index, len(starts))
            own = partial.read_tensors(partial.folder / f"group-{index}.safetensors")
            for name in names if index + 1 < len(starts) else ():
                block = model.get_submodule(name)
                freeze(block, _within(own, name), self.stored)
                self._halve(block)
            done = self.ranks.from_leader(read)
            if self.ranks.leads:
                tensors |= own
            curve += _shifted(done["curve"], curve)
            count += done["parameters_trained"]
            kept += done["kept_off_zero"]
        return tensors, {"curve": curve, "parameters_trained": count, "kept_off_zero": kept}

    def _train_group(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        names: list[str],
        partial: Partial,
        index: int,
        groups: int,
    ) -> None:
        for name in names:
            sparsify(model.get_submodule(name), self.dtype, self.source.grids(name))
        trainee = self._trainee(model)
        count = sum(one.numel() for one in trainee.trained().values())

        def keep(curve: list[dict[str, Any]]) -> None:
            done = {"curve": curve, "parameters_trained": count}
            self._keep_group(model, names, partial, index, done)
            self.ranks.gathered(None)  # what the leader has kept is there for all

        self._train(trainee, partial, index, groups, keep)

    def _keep_group(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        names: list[str],
        partial: Partial,
        index: int,
        done: dict[str, Any],
    ) -> None:
        """Together: write the trained blocks `names`, and what was `done`; the leader does."""
        tensors: dict[str, torch.Tensor] = {}
        lost = 0
        checkpoint = self.source.checkpoint
        for name in names:
            block = model.get_submodule(name)
            with whole(block):
                if not self.ranks.leads:
                    continue
                dtypes = {key: tensor.dtype for key, tensor in checkpoint.read_module(name).items()}
                own, kept = finished(block, dtypes)
                for key, tensor in own.items():  # a copy: the block is divided again
                    tensors[f"{name}.{key}"] = tensor.to("cpu", copy=True)
                lost += kept
        if not self.ranks.leads:
            return
        partial.write_tensors(tensors, partial.folder / f"group-{index}.safetensors")
        # The group counts as finished from here on.
        partial.write(f"group-{index}.json", done | {"kept_off_zero": lost})
        shutil.rmtree(partial.folder / f"group-{index}")

    def _trainee(self, model: Any) -> Trainee:  # noqa: ANN401 - transformers is untyped
        if self.settings.shard:
            shard(model, self._blocks(model))
            if self._teacher is not None:
                shard(*self._teacher)
        how = self._distillation(model)
        return Trainee(model, how, dtype=self.dtype, sharded=self.settings.shard)

    def _blocks(self, model: Any) -> list[nn.Module]:  # noqa: ANN401
        plain = model.get_base_model() if self.settings.method == "lora" else model
        return [plain.get_submodule(name) for name in self.source.blocks]

    def _distillation(self, model: Any) -> Distillation | None:  # noqa: ANN401
        if self._teacher is None:
            return None
        teacher, blocks = self._teacher
        settings = self.settings
        how = Distillation(
            teacher,
            settings.temperature or 1.0,
            settings.teacher_weight or 0.0,
            top=settings.teacher_top,
            cache=self._cache,
        )
        if settings.feature_weight is None:
            return how
        own = self._blocks(model)
        return replace(how, feature_weight=settings.feature_weight, blocks=blocks, of_student=own)

    def _train(
        self,
        trainee: Trainee,
        partial: Partial,
        index: int,
        groups: int,
        keep: Callable[[list[dict[str, Any]]], None] | None = None,
    ) -> list[dict[str, Any]]:
        minutes = self.settings.max_minutes
        steps = self.settings.max_steps or (_PASSES if minutes else 1) * self.needs.steps_a_pass
        each, more = divmod(steps, groups)
        schedule = Schedule(
            max(1, each + (index < more)), None if minutes is None else 60 * minutes / groups
        )
        part = f", group {index + 1} of {groups}" if groups > 1 else ""
        seed = self.settings.seed + index  # each group reads the text in another order
        return train(
            trainee,
            self.windows,
            self.settings.model_copy(update={"seed": seed}),
            schedule,
            partial.folder / f"group-{index}",
            f"Fine-tuning{part}",
            self.ranks,
            keep,
            functools.partial(check_writer, partial.output),
        )

    def _write(self, tensors: dict[str, torch.Tensor], staging: Path) -> None:
        if self.ranks.leads:
            write_checkpoint(self.source, self.settings, tensors, staging)

    def describe(self, outcome: dict[str, Any], *, resumed: bool) -> Finetuning:
        """What was done, for the manifest."""
        curve = outcome["curve"]
        losses = [row["loss"] for row in curve if "loss" in row]
        description: dict[str, Any] = {
            "checkpoint": {
                "path": str(self.source.folder),
                "weights_sha256": adapter.weights_digest(self.source.checkpoint),
            },
            "settings": self.settings.model_dump(mode="json"),
            "text": self._describe_text(),
            "teacher": self.asked_teacher,
            "dtype": name_of(self.dtype),
            "processes": self.ranks.size,
            "steps": len(losses),
            "seconds": curve[-1]["seconds"],
            "tokens": curve[-1]["tokens"],
            "tokens_per_second": round(tokens_per_second(curve), 1),
            "training_loss": {"first": losses[0], "last": losses[-1]},
            "peak_memory_bytes": peak_bytes(),
            "resumed": resumed,
            "command": sys.argv,
            "versions": _versions(),
            **outcome,
        }
        return Finetuning.model_validate(description)

    def manifest(self, done: Finetuning, written: Path) -> CheckpointManifest | AdapterManifest:
        """The source's manifest, true of the zeros that are `written`, and what was done."""
        if not self.settings.writes_weights:
            return AdapterManifest(versions=_versions(), finetune=done)
        carried = self.source.recounted(written)
        carried.pop("measured", None)  # of the weights before
        return CheckpointManifest.model_validate(carried | {"finetune": done})


def _targets(source: Source, asked: tuple[str, ...] | None) -> list[str]:
    """The Linears that LoRA adapts: those asked for, or, as in the paper, queries and values."""
    known = {
        name.removesuffix(".weight").rpartition(".")[2]
        for names in source.matrices.values()
        for name in names
    }
    for name in asked or ():
        if name not in known:
            raise unknown_name("layer", name, sorted(known))
    return list(asked or source.checkpoint.family.queries_and_values)


def _staging(partial: Partial) -> Path:
    return partial.folder / "output"


def _leader_first(ranks: Ranks, make: Callable[[], T]) -> T:
    """Together: what `make` gives; the leader's fills the cache that the others then find."""
    if ranks.leads:
        made = make()
        ranks.gathered(None)
        return made
    ranks.gathered(None)
    return make()


def _within(tensors: dict[str, torch.Tensor], block: str) -> dict[str, torch.Tensor]:
    start = f"{block}."
    return {name[len(start) :]: one for name, one in tensors.items() if name.startswith(start)}


def _shifted(rows: list[dict[str, Any]], before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` as they continue the curve `before`."""
    if not before:
        return rows
    last = before[-1]
    return [row | {key: row[key] + last[key] for key in _COUNTED} for row in rows]


def _versions() -> dict[str, str]:
    return versions() | {name: version(name) for name in ("accelerate", "peft")}
