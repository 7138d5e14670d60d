"""`owl sweep`: methods x allocations x sparsities x targets, and the trade-off between them."""

import contextlib
import itertools
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from owl_deploy import api
from owl_deploy.bench import decision
from owl_deploy.bench.measure import check_prompts
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.report import check_page, write_report
from owl_deploy.bench.result import FILE, Result
from owl_deploy.compression.allocation.rules import DEFAULT
from owl_deploy.compression.recipe import read_yaml
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.data.text import check_source
from owl_deploy.distributed.pipeline import (
    Bench,
    Evaluate,
    Export,
    Plan,
    Prune,
    Task,
    dense_exports,
)
from owl_deploy.errors import BadInput, invalid
from owl_deploy.export.targets import check_built, precision_of
from owl_deploy.inference import engine_for, require
from owl_deploy.models import digests
from owl_deploy.models.checkpoint import check_length, local_folder, read_config
from owl_deploy.models.measurements import measurement_file
from owl_deploy.models.tokenizer import TOKENIZER
from owl_deploy.utils.artefact import check_apart, check_path
from owl_deploy.utils.record import Record

REPORT = "report.html"
_BENCH = "bench"  # what the folders of benchmarks are called, before a digest of their plans


class SweepPlan(BaseModel):
    """What to sweep; a target may name a precision, "onnxruntime:int8", or has its default.

    `samples` windows of `sequence_length` tokens to prune by; `windows` of `window` to evaluate on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = Field(default=("wanda",), min_length=1)
    allocations: tuple[str, ...] = Field(default=(DEFAULT,), min_length=1)
    sparsities: tuple[float, ...] = Field(default=(0.5, 0.7), min_length=1)
    targets: tuple[str, ...] = Field(default=("onnxruntime",), min_length=1)
    scenarios: tuple[str, ...] = Field(default=("decode", "prefill"), min_length=1)
    context: tuple[int, ...] = Field(default=(512,), min_length=1)
    prompt: tuple[int, ...] = Field(default=(128,), min_length=1)
    threads: int | None = Field(default=None, ge=1)
    pairs: int = Field(default=8, ge=1)
    samples: int = Field(default=128, ge=1)
    sequence_length: int = Field(default=2048, ge=2)
    window: int = Field(default=2048, ge=2)
    windows: int | None = Field(default=None, ge=1)

    def prunings(self) -> dict[str, PruneSettings]:
        """The settings of each checkpoint, by its name; raises `BadInput` for wrong ones."""
        every = itertools.product(self.methods, self.allocations, self.sparsities)
        return {
            f"{method}-{allocation}-{100 * sparsity:.10g}": api.prune_settings(
                None, {"method": method, "allocation": allocation, "sparsity": sparsity}
            )
            for method, allocation, sparsity in every
        }

    def roads(self) -> list[tuple[str, str]]:
        """Each target with its precision, once; raises `BadInput` for one that cannot be."""
        asked = (one.partition(":") for one in self.targets)
        found = ((name, precision_of(name, said or None)) for name, _, said in asked)
        return list(dict.fromkeys(found))


def read_plan(path: Path | None, given: dict[str, Any]) -> SweepPlan:
    """The plan of a YAML file, if any, with the options `given` over it; raises `BadInput`."""
    values = read_yaml(path) if path else {}
    if not isinstance(values, dict):
        known = ", ".join(SweepPlan.model_fields)
        raise BadInput(f"{path} does not hold a mapping of settings.", f"Known: {known}.")
    try:
        return SweepPlan.model_validate({**values, **given})
    except ValidationError as error:
        raise invalid(str(path or "the plan"), error, known=SweepPlan.model_fields) from error


def tasks(
    model: Path, output: Path, plan: SweepPlan, calibration: str, text: str
) -> tuple[Task, ...]:
    """What makes the sweep of the dense `model` in the folder `output`, the benchmark last.

    `calibration` and `text` are SOURCEs, to prune by and to evaluate on. Raises `BadInput` for all
    that can be known to be wrong before anything is done.
    """
    if not output.absolute().parent.is_dir():
        raise BadInput(f"The folder {output.parent} does not exist.", "Create it first.")
    if output.exists() and not output.is_dir():
        raise BadInput(f"{output} is a file.", "Give a folder for the sweep.")
    check_path(output)
    if output.is_dir():
        check_page(output / REPORT, way_out="Move it away, or give another -o.")
    for source in (calibration, text):
        check_source(source)
    roads, prunings = plan.roads(), plan.prunings()
    made: list[Task] = []
    calibrated: dict[str, Any] = {
        "calibration": calibration,
        "samples": plan.samples,
        "sequence_length": plan.sequence_length,
    }
    for name, settings in prunings.items():
        checkpoint = output / "checkpoints" / name
        made.append(
            Prune(
                title=f"Pruning {name}",
                output=checkpoint,
                model=model,
                settings=settings,
                **calibrated,
            )
        )
        made += [_export(checkpoint, output, road, calibrated) for road in roads]
    candidates = [task for task in made if isinstance(task, Export)]
    dense = dense_exports(model, roads, output / "deployments")
    quality = [_evaluate(task.output, text, plan) for task in (*candidates, *dense)]
    bench = BenchPlan(
        candidates=tuple(one.output for one in candidates),
        baselines=tuple(one.output for one in dense),
        scenarios=plan.scenarios,
        **plan.model_dump(include={"context", "prompt"}, exclude_unset=True),
        threads=plan.threads,
        pairs=plan.pairs,
    )
    last = _bench(bench, output)
    _check_model(model, plan, prunings.values(), bench)
    check_apart(output, model)
    return (*made, *dense, *quality, last)


def check_here(model: Path, plan: SweepPlan, calibration: str, text: str) -> None:
    """Raise for what this machine lacks, which a step would find after all before it.

    `BadInput` for a pruning that cannot be, and for a `calibration` or a `text` of less than is
    asked for; `EnvironmentFailed` for an engine that is not installed.
    """
    from owl_deploy.compression.request import check
    from owl_deploy.evaluate.perplexity import windows_of
    from owl_deploy.utils.hardware import ANY_HARDWARE

    for target, _ in plan.roads():
        require(engine_for(target).name)
    windows_of(model, text, plan.window, plan.windows)
    given = Calibration(calibration, plan.samples, plan.sequence_length)
    for settings in plan.prunings().values():
        check(model, settings, given, ANY_HARDWARE)


def _check_model(
    model: Path, plan: SweepPlan, prunings: Iterable[PruneSettings], bench: BenchPlan
) -> None:
    """Raise `BadInput` for what the `model`, or an engine, refuses: targets, and how much text.

    Exporting, evaluating and the benchmark would find that after all is pruned.
    """
    way_out = "Check the path; a sweep takes no name on the Hub, so download the model first."
    config = read_config(local_folder(model, way_out))
    for road in plan.roads():
        check_built(config, *road)
    if any(settings.calibrates for settings in prunings):
        check_length(config, plan.sequence_length, "--sequence-length")
    check_length(config, plan.window, "--window")
    if longest := config.get("max_position_embeddings"):
        bench, _ = bench.within(longest, model)
    if (model / TOKENIZER).is_file():
        check_prompts(bench, [(engine_for(target).name, model) for target, _ in plan.roads()])


def _export(
    checkpoint: Path, output: Path, road: tuple[str, str], calibrated: dict[str, Any]
) -> Export:
    target, precision = road
    name = f"{checkpoint.name}-{target}-{precision}"
    return Export(
        title=f"Exporting {name}",
        output=output / "deployments" / name,
        checkpoint=checkpoint,
        target=target,
        precision=precision,
        **calibrated,
    )


def _evaluate(deployment: Path, text: str, plan: SweepPlan) -> Evaluate:
    return Evaluate(
        title=f"Perplexity of {deployment.name}",
        output=measurement_file(deployment, "perplexity"),
        model=deployment,
        text=text,
        **plan.model_dump(include={"window", "windows", "threads"}),
    )


def _bench(bench: BenchPlan, output: Path) -> Bench:
    """The benchmark of all, in a folder of its own."""
    bench.described()  # to hear now what is wrong with it
    name = f"{_BENCH}-{digests.of_json(bench.model_dump(mode='json'))[:8]}"
    title = f"Benchmarking {len(bench.candidates) + len(bench.baselines)} deployments"
    return Bench(title=title, output=output / name, plan=bench)


def run(
    plan: Plan, output: Path, execute: Callable[[Plan], Mapping[int, Record]]
) -> tuple[Result | None, list[Record]]:
    """Do the `plan` by `execute`, and write the report in `output`; the result, and what failed.

    `execute` returns the records of what it could not do, by its number in the plan it was given.
    The deployments that are whole are benchmarked without the others; no result where none is,
    and the report tells of an earlier benchmark then.
    """
    left, last = dict(execute(plan)), len(plan) - 1
    if left and (rest := without(plan, left, output)):
        left.pop(last)
        if bench := next(iter(execute(rest).values()), None):  # all else of it is whole
            left[last] = bench
        plan = rest
    records = [record for _, record in sorted(left.items())]
    result = None if last in left else api.read_result(plan[-1].output)
    shown = result or _earlier(output)
    write_report([shown] if shown else [], output / REPORT, left=records)
    return result, records


def _earlier(output: Path) -> Result | None:
    """The newest result of this sweep, before it was widened perhaps."""
    files = output.glob(f"{_BENCH}-*/{FILE}")
    for file in sorted(files, key=lambda one: one.stat().st_mtime, reverse=True):
        with contextlib.suppress(BadInput):
            return api.read_result(file.parent)
    return None


def without(plan: Plan, lost: Container[int], output: Path) -> Plan | None:
    """The `plan` without the tasks whose numbers are `lost`: a benchmark of what is whole.

    None where no candidate is, or nothing but the benchmark is lost.
    """
    *made, bench = plan
    assert isinstance(bench, Bench)
    gone = [task for number, task in enumerate(made) if number in lost]
    folders = {one.output for one in gone if isinstance(one, Export)}
    folders |= {one.model for one in gone if isinstance(one, Evaluate)}
    roles = {
        name: tuple(one for one in getattr(bench.plan, name) if one not in folders)
        for name in ("candidates", "baselines")
    }
    if not gone or not roles["candidates"]:
        return None
    kept = [task for task in made if task not in gone]
    return (*kept, _bench(bench.plan.model_copy(update=roles), output))


def trade_off(result: Result) -> list[dict[str, Any]]:
    """Perplexity and tokens/s of every deployment, fastest first; `pareto`: nothing beats both."""
    options = decision.judge(result, decision.PERPLEXITY).options
    rows = [
        {
            "deployment": option.subject.name,
            "engine": option.subject.engine,
            "dense": option.subject.role == "baseline",
            "zeros": option.subject.zeros,
            "perplexity": option.value,
            "tokens_per_s": option.tokens_per_s,
            "pareto": option.on_front,
        }
        for option in options
    ]
    return sorted(rows, key=lambda row: -float(str(row["tokens_per_s"])))
