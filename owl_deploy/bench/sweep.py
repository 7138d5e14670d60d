"""`owl sweep`: methods x allocations x sparsities x targets, and the trade-off between them.

Every step leaves an artefact in the output folder and is skipped when that is there: a sweep that
was interrupted goes on, and one that is widened does only what is new.
"""

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from owl_deploy.artefact import is_artefact, make_folder
from owl_deploy.bench import plots
from owl_deploy.bench.dense import Export, dense_baselines
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.report import write_report
from owl_deploy.bench.result import Result, metrics_of, read_result, write_result
from owl_deploy.bench.run import bench as measure
from owl_deploy.errors import BadInput, invalid
from owl_deploy.manifest import measurement
from owl_deploy.recipe import read_yaml

REPORT = "report.html"


class SweepPlan(BaseModel):
    """What to sweep; a target may name a precision, "onnxruntime:int8", or has its default."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...] = Field(default=("wanda",), min_length=1)
    allocations: tuple[str, ...] = Field(default=("owl",), min_length=1)
    sparsities: tuple[float, ...] = Field(default=(0.5, 0.7), min_length=1)
    targets: tuple[str, ...] = Field(default=("onnxruntime",), min_length=1)
    scenarios: tuple[str, ...] = ("decode", "prefill")
    context: tuple[int, ...] = (512,)
    prompt: tuple[int, ...] = (128,)
    threads: int | None = None
    pairs: int = 8

    def prunings(self) -> dict[str, dict[str, Any]]:
        """The settings of each checkpoint, by its name."""
        every = itertools.product(self.methods, self.allocations, self.sparsities)
        return {
            f"{method}-{allocation}-{100 * sparsity:g}": {
                "method": method,
                "allocation": allocation,
                "sparsity": sparsity,
            }
            for method, allocation, sparsity in every
        }


@dataclass(frozen=True)
class Steps:
    """The other verbs, given by the caller (see dense.py): what a sweep is made of.

    `validate` raises `BadInput` for settings that `prune` would refuse, before anything is done;
    so does `precision` for a target and a precision that `export` would refuse. It returns the
    precision, which for None is the target's default.
    """

    validate: Callable[[dict[str, Any]], object]
    precision: Callable[[str, str | None], str]
    prune: Callable[[Path, dict[str, Any]], None]
    export: Export
    perplexity: Callable[[Path], None]
    say: Callable[[str], None]


def read_plan(path: Path | None, given: dict[str, Any]) -> SweepPlan:
    """The plan of a YAML file, if any, with the options `given` over it; raises `BadInput`."""
    values = read_yaml(path) if path else {}
    if not isinstance(values, dict):
        raise BadInput(f"{path} does not hold a mapping of settings.")
    try:
        return SweepPlan.model_validate({**values, **given})
    except ValidationError as error:
        known = ", ".join(SweepPlan.model_fields)
        raise invalid("the sweep's plan", error, f"Known: {known}.") from error


def sweep(checkpoint: Path, output: Path, plan: SweepPlan, steps: Steps) -> Result:
    """Prune, export, evaluate and bench what `plan` asks for; returns the benchmark's result.

    Leaves `checkpoints/`, `deployments/`, `bench-*/` and `report.html` in `output`.
    """
    for settings in plan.prunings().values():
        steps.validate(settings)
    targets = _targets(plan, steps)
    if not output.parent.is_dir():
        raise BadInput(f"The folder {output.parent} does not exist.", "Create it first.")
    for folder in (output, output / "checkpoints", output / "deployments"):
        make_folder(folder)
    candidates = [
        deployment
        for name, settings in plan.prunings().items()
        for deployment in _deployments(name, settings, output, targets, steps)
    ]
    steps.say("Dense baselines")
    dense = dense_baselines(checkpoint, targets, steps.export, output / "deployments")
    for deployment in (*candidates, *dense):
        if measurement(deployment, "perplexity") is None:
            steps.say(f"Perplexity of {deployment.name}")
            steps.perplexity(deployment)
    result = _bench(tuple(candidates), dense, output, plan, steps)
    write_report([result], output / REPORT)
    return result


def _deployments(
    name: str,
    settings: dict[str, Any],
    output: Path,
    targets: list[tuple[str, str]],
    steps: Steps,
) -> list[Path]:
    checkpoint = output / "checkpoints" / name
    if not is_artefact(checkpoint):
        steps.say(f"Pruning {name}")
        steps.prune(checkpoint, settings)
    found = []
    for target, precision in targets:
        destination = output / "deployments" / f"{name}-{target}-{precision}"
        if not is_artefact(destination):
            steps.say(f"Exporting {destination.name}")
            steps.export(checkpoint, destination, target, precision)
        found.append(destination)
    return found


def _targets(plan: SweepPlan, steps: Steps) -> list[tuple[str, str]]:
    """Each target of the plan with its precision, once."""
    asked = (one.partition(":") for one in plan.targets)
    found = ((name, steps.precision(name, said or None)) for name, _, said in asked)
    return list(dict.fromkeys(found))


def _bench(
    candidates: tuple[Path, ...],
    dense: tuple[Path, ...],
    output: Path,
    plan: SweepPlan,
    steps: Steps,
) -> Result:
    """The benchmark of all, unless this very one was made before."""
    bench = BenchPlan(
        candidates=candidates,
        baselines=dense,
        scenarios=plan.scenarios,
        **plan.model_dump(include={"context", "prompt"}, exclude_unset=True),
        threads=plan.threads,
        pairs=plan.pairs,
    )
    identity = json.dumps(bench.model_dump(mode="json"), sort_keys=True)
    folder = output / f"bench-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
    if is_artefact(folder):
        return read_result(folder)
    steps.say(f"Benchmarking {len(candidates) + len(dense)} deployments")
    result = measure(bench)
    if not result.failures:  # one that failed is not done: the next run tries it again
        write_result(result, folder)
    return result


def trade_off(result: Result) -> list[dict[str, Any]]:
    """Perplexity and tokens/s of every deployment, fastest first; `pareto`: nothing beats both."""
    metric = metrics_of(result.scenarios)[0]
    subjects = plots.with_quality(result, metric.key)
    points = [
        (result.statistics[metric.key][s.name]["tokens_per_s"], float(s.perplexity or 0))
        for s in subjects
    ]
    front = set(plots.pareto(points))
    rows = [
        {
            "deployment": subject.name,
            "engine": subject.engine,
            "dense": subject.role == "baseline",
            "zeros": subject.zeros,
            "perplexity": loss,
            "tokens_per_s": speed,
            "pareto": index in front,
        }
        for index, (subject, (speed, loss)) in enumerate(zip(subjects, points, strict=True))
    ]
    return sorted(rows, key=lambda row: -float(str(row["tokens_per_s"])))
