"""Run a benchmark: rounds over all deployments, each sample in a process of its own.

A round measures every deployment once; the next goes through them backwards (A B B A), so that a
machine that warms up or slows down does so to all alike. One engine runs at a time.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from owl_deploy import __version__
from owl_deploy.bench import machine, result, stats
from owl_deploy.bench.result import Result, Role, Sample, Scenario, Subject
from owl_deploy.engines import (
    Deployment,
    EngineProcess,
    default_threads,
    engine_for,
    get_engine,
    open_deployment,
    python_of,
)
from owl_deploy.engines.registry import Engine
from owl_deploy.errors import BadInput, EngineFailed, unknown_name

KINDS = ("decode", "prefill")
DECODE_WARMUP, PREFILL_WARMUP = 8, 2
Progress = Callable[[str], None]
# Opens an engine; tests put another here.
Opener = Callable[..., contextlib.AbstractContextManager[EngineProcess]]


class BenchPlan(BaseModel):
    """What to measure.

    `engines` empty: each deployment in the engine it was made for; else in each of these that opens
    it. `context` tokens is what caches are made for, and what the last decoded token attends to;
    `prompt` the tokens of a prefill; `pairs` the rounds; `steps` the tokens decoded, `repeats` the
    prompts run, in each process.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Path, ...] = Field(min_length=1)
    baselines: tuple[Path, ...] = ()
    engines: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = KINDS
    context: int = 512
    prompt: int = 128
    threads: int | None = None
    pairs: int = 8
    steps: int = 32
    repeats: int = 5
    time_limit_s: float = 600.0
    seed: int = 0

    def described(self) -> tuple[Scenario, ...]:
        """The scenarios; raises `BadInput` for an unknown one, or a number that cannot be."""
        smallest = DECODE_WARMUP + self.steps + 1
        for name, value, least in (
            ("--context", self.context, smallest),
            ("--prompt", self.prompt, 1),
            ("--pairs", self.pairs, 1),
            ("--threads", self.threads or 1, 1),
        ):
            if value < least:
                raise BadInput(f"{name} {value} is too small.", f"It must be at least {least}.")
        if "prefill" in self.scenarios and self.prompt > self.context:
            raise BadInput(f"A prompt of {self.prompt} does not fit a context of {self.context}.")
        return tuple(self._scenario(name) for name in dict.fromkeys(self.scenarios))

    def _scenario(self, name: str) -> Scenario:
        if name == "decode":
            return Scenario(kind="decode", tokens=self.context)
        if name == "prefill":
            return Scenario(kind="prefill", tokens=self.prompt)
        raise unknown_name("scenario", name, KINDS)


def run_bench(
    plan: BenchPlan, progress: Progress = lambda _: None, opener: Opener = EngineProcess
) -> Result:
    """Measure what `plan` asks for.

    An engine that fails drops its deployment from the later rounds and is named in the result's
    `failures`; the others are measured on. Raises `BadInput`, and `EnvironmentFailed` for an engine
    that is not installed, before anything is timed.
    """
    scenarios = plan.described()
    entries = list(_entries(plan))
    for engine in dict.fromkeys(subject.engine for subject, _ in entries):
        python_of(engine)
    threads = plan.threads or default_threads()
    here = machine.look()
    runner = _Runner(plan, scenarios, threads, opener)
    subjects = {subject.name: subject for subject, _ in entries}
    vocab = {subject.name: deployment.vocab for subject, deployment in entries}
    started = time.monotonic()
    for index in range(plan.pairs):
        left = _time_left(started, index, plan.pairs)
        order = list(subjects) if index % 2 == 0 else list(subjects)[::-1]
        for name in order:
            if subjects[name].failure is None:
                progress(f"Round {index + 1} of {plan.pairs}{left}: {name}")
                subjects[name] = runner.measure(subjects[name], vocab[name], index)
    return conclude(plan, scenarios, here, threads, tuple(subjects.values()))


def _time_left(started: float, done: int, rounds: int) -> str:
    """The time that the rounds left will take, in words; empty before the first is done."""
    if done == 0:
        return ""
    seconds = (time.monotonic() - started) / done * (rounds - done)
    return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"


def conclude(
    plan: BenchPlan,
    scenarios: tuple[Scenario, ...],
    here: machine.Machine,
    threads: int,
    subjects: tuple[Subject, ...],
) -> Result:
    """The result that follows from the samples in `subjects`."""
    table = result.statistics(subjects, scenarios)
    return Result(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        owl_version=__version__,
        machine=here,
        threads=threads,
        context=plan.context,
        pairs=plan.pairs,
        scenarios=scenarios,
        subjects=subjects,
        statistics=table,
        comparisons=result.comparisons(subjects, scenarios, plan.seed),
        notes=tuple(_notes(here, subjects, table)),
    )


def _notes(
    here: machine.Machine,
    subjects: tuple[Subject, ...],
    table: dict[str, dict[str, dict[str, float]]],
) -> Iterator[str]:
    """What a reader has to know about the numbers."""
    if here.busy_cores > 0.2:
        yield (
            f"Other processes kept {here.busy_cores:.1f} cores busy when the run began: stop them, "
            "or expect wide intervals."
        )
    worst = max((row["spread"] for rows in table.values() for row in rows.values()), default=0.0)
    if worst > stats.NOISY_SPREAD:
        yield (
            f"Noisy machine: processes of one deployment differ by up to {worst:.0%}. Close other "
            "programs, use a machine of your own, or take more --pairs."
        )
    for name in dict.fromkeys(subject.engine for subject in subjects):
        if get_engine(name).lock is not None:
            yield f"{name}: {get_engine(name).licence}"


def _entries(plan: BenchPlan) -> Iterator[tuple[Subject, Deployment]]:
    """Each deployment in each of its engines, under a name of its own."""
    roles: tuple[tuple[Role, tuple[Path, ...]], ...] = (
        ("candidate", plan.candidates),
        ("baseline", plan.baselines),
    )
    opened = [(role, open_deployment(path)) for role, paths in roles for path in _unique(paths)]
    chosen = [
        (role, deployment, engine)
        for role, deployment in opened
        for engine in _engines_for(deployment, plan.engines)
    ]
    names = _names([(deployment, engine) for _, deployment, engine in chosen])
    for name, (role, deployment, engine) in zip(names, chosen, strict=True):
        subject = Subject(
            name=name,
            path=str(deployment.path),
            role=role,
            target=deployment.target,
            engine=engine.name,
            precision=deployment.precision,
            zeros=deployment.zeros,
            perplexity=deployment.perplexity,
            size_bytes=deployment.size_bytes,
        )
        yield subject, deployment


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list({path.resolve(): path for path in paths}.values())


def _engines_for(deployment: Deployment, asked: tuple[str, ...]) -> list[Engine]:
    """The engines to run a deployment in; raises `BadInput` if none of those asked opens it."""
    if not asked:
        return [engine_for(deployment.target)]
    fitting = [get_engine(name) for name in dict.fromkeys(asked)]
    fitting = [engine for engine in fitting if deployment.target in engine.targets]
    if not fitting:
        raise BadInput(
            f"{deployment.path} is made for the target {deployment.target!r}, which "
            f"{' and '.join(asked)} cannot open.",
            f"Leave --engine out, or export it again with --target {asked[0]}.",
        )
    return fitting


def _names(pairs: list[tuple[Deployment, Engine]]) -> list[str]:
    """Short names that differ: the folder's, with the engine or the parents where need be."""
    plain = [deployment.path.resolve().name for deployment, _ in pairs]
    with_engine = [f"{name} in {engine.name}" for name, (_, engine) in zip(plain, pairs)]  # noqa: B905
    names = [
        short if plain.count(short) == 1 else longer
        for short, longer in zip(plain, with_engine, strict=True)
    ]
    return [
        name if names.count(name) == 1 else f"{deployment.path} in {engine.name}, {index + 1}"
        for index, (name, (deployment, engine)) in enumerate(zip(names, pairs, strict=True))
    ]


class _Runner:
    """Takes samples."""

    def __init__(
        self, plan: BenchPlan, scenarios: tuple[Scenario, ...], threads: int, opener: Opener
    ) -> None:
        self.plan = plan
        self.scenarios = scenarios
        self.threads = threads
        self.opener = opener

    def measure(self, subject: Subject, vocab: int, index: int) -> Subject:
        """`subject` with one more sample, or with the reason why it failed."""
        try:
            about, sample = self._sample(subject, vocab, index)
        except EngineFailed as error:
            return subject.model_copy(update={"failure": str(error)})
        return subject.model_copy(update={"about": about, "samples": (*subject.samples, sample)})

    def _sample(self, subject: Subject, vocab: int, index: int) -> tuple[dict[str, Any], Sample]:
        latencies: dict[str, tuple[float, ...]] = {}
        with self.opener(
            subject.engine,
            Path(subject.path),
            threads=self.threads,
            context=self.plan.context,
            timeout_s=self.plan.time_limit_s,
        ) as engine:
            about = dict(engine.loaded)
            for scenario in self.scenarios:
                answer = engine.request(scenario.kind, **self._arguments(scenario, vocab))
                latencies[scenario.key] = self._checked(subject, answer["latencies_ms"])
            peak = engine.request("memory")["peak_bytes"]
        load_s = about.pop("seconds")
        sample = Sample(round=index, load_s=load_s, peak_bytes=peak, latencies_ms=latencies)
        return about, sample

    def _arguments(self, scenario: Scenario, vocab: int) -> dict[str, Any]:
        """What the worker is asked. The prompt is the same in every process and every engine."""
        steps, warmup = self.plan.steps, DECODE_WARMUP
        if scenario.kind == "prefill":
            steps, warmup = 0, 0
        length = scenario.tokens - steps - warmup
        tokens = np.random.default_rng(self.plan.seed).integers(0, vocab, length).tolist()
        if scenario.kind == "decode":
            return {"prompt": tokens, "steps": steps, "warmup": warmup}
        return {"prompt": tokens, "repeats": self.plan.repeats, "warmup": PREFILL_WARMUP}

    def _checked(self, subject: Subject, latencies: list[float]) -> tuple[float, ...]:
        try:
            return tuple(stats.checked(latencies))
        except ValueError as error:
            raise EngineFailed(f"{subject.name} gave no usable times: {error}.") from error
