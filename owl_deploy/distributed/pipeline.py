"""Tasks over the verbs, each plain data, and plans of them: `owl sweep` and the demo are two.

A task leaves one artefact, and a receipt beside it: what it was asked, and digests of what it read.
Where both are there and agree it is done. So a plan that was killed goes on, one that is widened
does only what is new, and one whose inputs have changed makes again what depends on them. A task
goes through pickle, and knows no process, machine or terminal: `do` runs it wherever the
files are seen, once the tasks that it needs are done.
"""

import contextlib
import time
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict
from typing_extensions import override

from owl_deploy import __version__, api
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.text import source_files
from owl_deploy.errors import EnvironmentFailed
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.inference import engine_for, installed_version
from owl_deploy.inference.deployment import seen_of
from owl_deploy.inference.loading import digest as file_digest
from owl_deploy.inference.registry import LOOKUP
from owl_deploy.models import digests
from owl_deploy.models.checkpoint import file_names, local_folder, read_config
from owl_deploy.models.families import unbuilt
from owl_deploy.models.manifest import (
    CheckpointManifest,
    DeploymentManifest,
    read_manifest,
    versions,
)
from owl_deploy.models.measurements import keep_measurement, measurement_file
from owl_deploy.runtime import library_path
from owl_deploy.utils.artefact import MANIFEST, MEASURED, make_folder, read_object, write_json
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.ending import explained
from owl_deploy.utils.record import Record, skipped
from owl_deploy.utils.resume import NotThatRun, is_interrupted

State = Literal["done", "to do", "outdated"]
# What people deploy when they do not prune: targets and precisions. First what every model has.
DENSE = (("onnxruntime", "fp32"), ("onnxruntime", "int8"), ("onnxruntime", "int4"))


class Task(BaseModel):
    """One step of a plan. `title` says what it does; `output` is the artefact that it leaves."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    APART: ClassVar[dict[str, Any]] = {}  # what does not decide the result, or is read by digest

    title: str
    output: Path

    @abstractmethod
    def reads(self) -> tuple[Path | str, ...]:
        """The files, folders and names of texts that the result depends on."""

    @abstractmethod
    def run(self) -> None:
        """Make the output, or make it again."""

    @abstractmethod
    def agrees(self) -> bool:
        """Whether an output that has no receipt says itself that it is what this task makes."""

    @property
    def proof(self) -> Path:
        """The file that is there when the output is whole, and another when that is another."""
        return self.output / MANIFEST

    @property
    def receipt(self) -> Path:
        """Where the receipt lies."""
        return self.output / MEASURED / "task.json"

    def is_whole(self) -> bool:
        """Whether there is an output, of this task or an earlier one."""
        return self.proof.is_file()

    def asked(self, inputs: Sequence[str] | None = None) -> dict[str, Any]:
        """What decides the result, wherever the files lie.

        `inputs`: the digests of what it reads, where that does not lie here.
        """
        apart = {"title": True, "output": True, **self.APART}
        digests = [digest(one) for one in self.reads()] if inputs is None else list(inputs)
        return {"asked": self.model_dump(mode="json", exclude=apart), "inputs": digests}


class Prune(Task):
    """`owl prune`; `calibration`: a SOURCE, `samples` windows of `sequence_length` tokens."""

    APART = {"model": True, "calibration": True}

    task: Literal["prune"] = "prune"
    model: Path
    settings: PruneSettings
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 2048

    @override
    def reads(self) -> tuple[Path | str, ...]:
        return (self.model, *_text_inputs(self.calibration))

    @override
    def run(self) -> None:
        text = _calibration(self.calibration, self.samples, self.sequence_length)
        _go_on(
            self.output,
            lambda resume: api.prune(
                self.model,
                self.output,
                self.settings,
                text,
                force=True,
                resume=resume,
            ),
        )

    @override
    def agrees(self) -> bool:
        manifest = read_manifest(self.output, CheckpointManifest)
        if manifest is None:
            return False
        told = manifest.settings.model_dump(mode="json") | (manifest.calibration or {})
        settings = self.settings.model_dump(mode="json", exclude=self.settings.found)
        asked = settings | self.model_dump(include={"samples", "sequence_length"})
        return agree(told, asked)


def _calibration(source: str | None, samples: int, length: int) -> "api.Calibration | None":
    return api.Calibration(source, samples, length) if source else None


def _go_on(output: Path, make: Callable[[bool], object]) -> None:
    """`make(resume)` what is to be in `output`, from where a run for it was interrupted."""
    if is_interrupted(output):
        try:
            make(True)
        except NotThatRun:  # what else is wrong may pass, and costs nothing that is done
            pass
        else:
            return
    make(False)


class Finetune(Task):
    """`owl finetune` on `text` (a SOURCE), with a dense `teacher` if there is one."""

    APART = {"checkpoint": True, "text": True, "teacher": True}

    task: Literal["finetune"] = "finetune"
    checkpoint: Path
    text: str
    settings: FinetuneSettings
    teacher: Path | None = None

    @override
    def reads(self) -> tuple[Path | str, ...]:
        teacher = () if self.teacher is None else (self.teacher,)
        return (self.checkpoint, *_text_inputs(self.text), *teacher)

    @override
    def run(self) -> None:
        teacher = None if self.teacher is None else str(self.teacher)
        _go_on(
            self.output,
            lambda resume: api.finetune(
                self.checkpoint,
                self.output,
                self.text,
                self.settings,
                teacher=teacher,
                force=True,
                resume=resume,
            ),
        )

    @override
    def agrees(self) -> bool:
        manifest = read_manifest(self.output, CheckpointManifest)
        if manifest is None or manifest.finetune is None:
            return False
        told = manifest.finetune.settings.model_dump(mode="json")
        given = self.settings.model_dump(mode="json", exclude_none=True)
        return agree(told, given) and (manifest.finetune.teacher is None) == (self.teacher is None)


def _software() -> dict[str, Any]:
    """The versions that decide what deployments are, and how fast."""
    return {
        "owl": __version__,
        "onnxruntime": versions().get("onnxruntime"),
        "onnxruntime-genai": installed_version("onnxruntime"),
    }


class Export(Task):
    """`owl export`; `calibration`: as for `Prune`, where the target weighs what it rounds.

    What another version wrote, or with other kernels, is made again: it may be slower, and a gain
    of one side over the other then none by sparsity.
    """

    APART = {"checkpoint": True, "calibration": True}

    task: Literal["export"] = "export"
    checkpoint: Path
    target: str
    precision: str
    calibration: str | None = None
    samples: int = 128
    sequence_length: int = 512

    @override
    def reads(self) -> tuple[Path | str, ...]:
        return (self.checkpoint, *_text_inputs(self._text))

    @property
    def _text(self) -> str | None:
        return self.calibration if api.TARGETS[self.target].weighs else None

    @override
    def asked(self, inputs: Sequence[str] | None = None) -> dict[str, Any]:
        by = _software()
        if engine_for(self.target).operators:
            with contextlib.suppress(EnvironmentFailed):  # the head of a cluster may lack it
                by["library"] = file_digest(library_path())
        return super().asked(inputs) | {"software": by}

    @override
    def run(self) -> None:
        from owl_deploy.export.show import steps

        text = _calibration(self._text, self.samples, self.sequence_length)
        with steps() as progress:
            api.export(
                self.checkpoint,
                self.output,
                target=self.target,
                precision=self.precision,
                calibration=text,
                force=True,
                progress=progress,
            )

    @override
    def agrees(self) -> bool:
        manifest = read_manifest(self.output, DeploymentManifest)
        if manifest is None:
            return False
        pruned = read_manifest(self.checkpoint, CheckpointManifest)
        told = (manifest.source.manifest or {}).get("wall_seconds")  # no two prunings' are the same
        same = pruned is None or told in (None, pruned.wall_seconds)
        same = same and (manifest.calibration is None) == (self._text is None)
        return same and (manifest.target, manifest.precision) == (self.target, self.precision)


class Measurement(Task):
    """A task whose output is one JSON file, beside which its receipt lies."""

    @property
    @override
    def proof(self) -> Path:
        return self.output

    @property
    @override
    def receipt(self) -> Path:
        return self.output.with_suffix(".task.json")


class Evaluate(Measurement):
    """`owl eval --perplexity`, of a checkpoint or of a deployment as it runs, into a JSON file.

    `known`: the result for another that is known to compute the same, which is taken over.
    """

    APART = {"model": True, "text": True, "known": True, "threads": True}

    task: Literal["evaluate"] = "evaluate"
    model: Path
    text: str
    window: int = 2048
    windows: int | None = None
    threads: int | None = None
    known: Path | None = None

    @override
    def reads(self) -> tuple[Path | str, ...]:
        return (self.model, *([self.known] if self.known else _text_inputs(self.text)))

    @override
    def run(self) -> None:
        from owl_deploy.evaluate.perplexity import perplexity

        if self.known:
            value = read_object(self.known, "Delete it.") | {"engine": "torch"}
            keep_measurement(self.model, "perplexity", value)
            return
        asked = api.EvaluationSettings(
            text=self.text, window=self.window, windows=self.windows, threads=self.threads
        )
        found = perplexity(self.model, asked)
        if self.output != measurement_file(self.model, "perplexity"):  # where it was kept already
            write_json(self.output, asdict(found))

    @override
    def agrees(self) -> bool:
        kept = read_object(self.output, "Delete it.")
        asked = {"text": self.text, "window": self.window, "windows": self.windows}
        return all(kept.get(name) == value for name, value in asked.items())


class RunTasks(Measurement):
    """`owl eval --tasks` of an artefact, beside which the results lie with those of other tasks."""

    APART = {"model": True, "threads": True, "allow_code": True}

    task: Literal["tasks"] = "tasks"
    model: Path
    names: tuple[str, ...]
    limit: int | None = None
    every: int = 1
    window: int = 2048
    threads: int | None = None
    allow_code: bool = False

    @override
    def reads(self) -> tuple[Path | str, ...]:
        return (self.model,)

    @override
    def run(self) -> None:
        asked = api.EvaluationSettings(
            tasks=self.names,
            allow_code=self.allow_code,
            limit=self.limit,
            every=self.every,
            window=self.window,
            threads=self.threads,
        )
        api.evaluate([self.model], asked)

    @override
    def agrees(self) -> bool:
        kept = read_object(self.output, "Delete it.")
        asked = (self.every, self.limit, seen_of(self.model, self.window))
        return all(
            (one := kept.get(name)) is not None
            and (one.get("every", 1), one.get("limit"), one.get("window")) == asked
            for name in self.names
        )


class Bench(Task):
    """`owl bench`; one in which an engine failed is not done."""

    APART = {"plan": {"candidates": True, "baselines": True}}

    task: Literal["bench"] = "bench"
    plan: BenchPlan

    @override
    def reads(self) -> tuple[Path | str, ...]:
        deployments = (*self.plan.candidates, *self.plan.baselines)
        draft = () if self.plan.draft in (None, LOOKUP) else (Path(self.plan.draft),)
        measured = (measurement_file(one, "perplexity") for one in deployments)
        return (*deployments, *draft, *measured)

    @override
    def asked(self, inputs: Sequence[str] | None = None) -> dict[str, Any]:
        # Not the machine, nor what is chosen by it: a cluster's nodes need not be alike, and the
        # head may lack an engine.
        found = {name: installed_version(name) for name in sorted(self._engines())}
        engines = {name: version for name, version in found.items() if version is not None}
        return super().asked(inputs) | {"software": _software() | {"engines": engines}}

    def _engines(self) -> set[str]:
        """The engines that it times, as far as its deployments lie here."""
        if self.plan.engines:
            return set(self.plan.engines)
        read = (
            read_manifest(one, DeploymentManifest)
            for one in (*self.plan.candidates, *self.plan.baselines)
        )
        targets = {one.target for one in read if one is not None and one.target}
        return {engine_for(target).name for target in targets}

    @override
    def run(self) -> None:
        api.bench(self.plan, self.output, force=True)

    @override
    def is_whole(self) -> bool:
        return super().is_whole() and not api.read_result(self.output).failures

    @override
    def agrees(self) -> bool:
        result = api.read_result(self.output)
        names = [Path(subject.path).name for subject in result.subjects]
        twice = 2 if self.plan.draft else 1  # with the draft, and without
        asked = [path.name for path in (*self.plan.candidates * twice, *self.plan.baselines)]
        timed = [scenario.key for scenario in result.scenarios]
        return (
            result.pairs == self.plan.pairs
            and sorted(names) == sorted(asked)
            and timed == [scenario.key for scenario in self.plan.described()]
        )


Plan = Sequence[Task]


def _text_inputs(source: str | None) -> list[Path | str]:
    """The files that a SOURCE names; its name where there are none."""
    return [] if source is None else [*source_files(source)] or [source]


def digest(source: Path | str) -> str:
    """What tells content from other content: all that is in there, but of an artefact only its
    manifest, which tells a deployment's files by their digests, and a checkpoint's weights.

    What is no file here is a name of something elsewhere, and stands for itself.
    """
    path = Path(source)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return str(source)
    files = [path / name for name in file_names(path)]
    if path / MANIFEST in files:
        files = [one for one in files if one.name == MANIFEST or one.suffix == ".safetensors"]
    return digests.of_files((file.name, file_digest(file)) for file in files)


def state(task: Task) -> State:
    """Whether a task is done, has never been, or was with other settings or other inputs."""
    if not task.is_whole():
        return "to do"
    if task.receipt.is_file():
        receipt = read_object(task.receipt, "Delete it.")
        if receipt.pop("result", None) == digest(task.proof):
            return "done" if agree(receipt, task.asked()) else "outdated"
    # Made by an earlier version, by hand, or by a run that was killed before it left a receipt.
    return "done" if task.agrees() else "outdated"


def agree(kept: Any, asked: Any) -> bool:  # noqa: ANN401 - JSON
    """Whether what was kept and what is asked agree in all that both versions of owl know."""
    if isinstance(kept, dict) and isinstance(asked, dict):
        return all(agree(kept[name], asked[name]) for name in kept.keys() & asked.keys())
    return bool(kept == asked)


def do(task: Task, made: Callable[[], object] = lambda: None) -> None:
    """Run a task, whatever its state; raises as its verb does.

    `made` is called once the output is there, before its receipt is written.
    """
    make_folder(task.output.parent)
    asked, started = task.asked(), time.monotonic()
    task.run()
    made()
    seconds = round(time.monotonic() - started, 1)
    make_folder(task.receipt.parent)
    write_json(task.receipt, {"result": digest(task.proof), "seconds": seconds, **asked})


def seconds(task: Task) -> float | None:
    """How long a task took when it was last done; None where no receipt says."""
    if not task.receipt.is_file():
        return None
    return read_object(task.receipt, "Delete it.").get("seconds")


def needs(plan: Plan) -> list[list[int]]:
    """For each task, the numbers of those before it whose outputs it reads."""
    found = []
    for index, task in enumerate(plan):
        read = set(task.reads())  # once: it looks at files
        found.append([n for n, other in enumerate(plan[:index]) if other.output in read])
    return found


def survey(plan: Plan) -> list[State]:
    """What `execute` would find: nothing is done that needs what is not."""
    found: list[State] = []
    for task, before in zip(plan, needs(plan), strict=True):
        ready = all(found[number] == "done" for number in before)
        unready: State = "outdated" if task.is_whole() else "to do"
        found.append(state(task) if ready else unready)
    return found


def execute(plan: Plan, say: Callable[[str], object]) -> None:
    """Do here, in order, what is not done; `say` is told the title of each before it begins."""
    for task in plan:
        found = state(task)
        if found != "done":
            say(task.title if found == "to do" else f"{task.title}, again: it is another's result")
            do(task)


def attempt(plan: Plan, say: Callable[[str], object]) -> dict[int, Record]:
    """`execute` all of the plan that can be done, whatever fails.

    Returns the records of what is left, by its number in the plan; `say` is told each failure.
    """
    left: dict[int, Record] = {}
    for index, before in enumerate(needs(plan)):
        title = plan[index].title
        if lost := [left[number] for number in before if number in left]:
            left[index] = skipped(title, lost[0])
            continue
        try:
            execute(plan[index : index + 1], say)
        except Exception as error:
            why = explained(error)
            left[index] = Record(state="failed", title=title, said=str(why), code=why.exit_code)
            say(f"{title} failed: {why}")
    return left


def dense_exports(
    checkpoint: Path, roads: Iterable[tuple[str, str]], folder: Path | None = None
) -> tuple[Export, ...]:
    """The baselines that a user of the dense `checkpoint` has, in the cache or in `folder`.

    `roads`: targets and precisions of what is compared with them. Raises `BadInput` for a folder
    that is no checkpoint.
    """
    config = read_config(local_folder(checkpoint, "Check the path: it takes no name on the Hub."))
    by = f"{__version__}-{installed_version('onnxruntime')}"
    folder = folder or cache_dir("dense", f"{digest(checkpoint)[:16]}-{by}")
    # What runs in an engine that skips zeros is compared with dense in the same.
    own = sorted(road for road in set(roads) if engine_for(road[0]).skips_zeros)
    return tuple(
        Export(
            title=f"Exporting dense-{target}-{precision}",
            output=folder / f"dense-{target}-{precision}",
            checkpoint=checkpoint,
            target=target,
            precision=precision,
        )
        for target, precision in (*own, *(DENSE[:1] if unbuilt(config) else DENSE))
    )
