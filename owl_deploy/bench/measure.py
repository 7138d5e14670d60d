"""Run a benchmark: rounds over all deployments, each sample in a process of its own.

A round measures every deployment once; the next goes through them backwards (A B B A), so that a
machine that warms up or slows down does so to all alike. One engine runs at a time.
"""

import asyncio
import contextlib
import datetime
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from owl_deploy import __version__
from owl_deploy.bench import machine, result, stats
from owl_deploy.bench.entries import engines_for, entries_of
from owl_deploy.bench.journal import Journal
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.prompts import other_words, read_prompts, tokens_of
from owl_deploy.bench.result import Comparison, Result, Sample, Subject
from owl_deploy.bench.scenario import Scenario, by_session
from owl_deploy.errors import EngineFailed
from owl_deploy.inference import (
    Deployment,
    EngineProcess,
    ServerProcess,
    get_engine,
    python_of,
    require,
    served_by,
    software,
    threads_for,
)
from owl_deploy.inference.registry import LOOKUP, OWL_SERVE
from owl_deploy.models.digests import state_of
from owl_deploy.models.tokenizer import TOKENIZER, Tokenizer

if TYPE_CHECKING:
    from owl_deploy.bench.clients import Tally

Progress = Callable[[str], None]
# Opens an engine; tests put another here.
Opener = Callable[..., contextlib.AbstractContextManager[EngineProcess]]
_SHIPPED_TEXT = (
    "The lighthouse keeper wrote down the weather every evening, and beside it the names of the "
    "ships that he had seen. Most of them he knew by their sails. One autumn a ship came that "
    "carried none, and yet it moved against the wind; he drew it in the margin, and left the line "
    "for its name empty. "
)
_SHARED = "requests: the clients ran on the servers' cores, and took their share of all of them."


def is_decided(found: Result) -> bool:
    """Whether no comparison needs more rounds."""
    return not any(comparison.verdict == "inconclusive" for comparison in found.comparisons)


def run_bench(
    plan: BenchPlan,
    progress: Progress = lambda _: None,
    opener: Opener = EngineProcess,
    decided: Callable[[Result], bool] = is_decided,
    keep: Callable[[Result], None] = lambda _: None,
) -> Result:
    """Measure what `plan` asks for, in more rounds up to its `looks` until it is `decided`.

    An engine that fails drops the scenarios of that session from its deployment's later rounds, or
    all of the deployment where no session is left, and is named in the result's `failures`; the
    others are measured on. After an interruption, the same plan goes on with the samples that were
    taken, which are there until `keep` has written the result, and tries once more what had failed.
    Raises `BadInput`, and `EnvironmentFailed` for an engine that is not installed, before anything
    is timed; `BadInput`, too, where the same plan is being measured already.
    """
    plan, entries, limits = fitted(plan)
    scenarios = plan.described()
    for engine in dict.fromkeys(subject.engine for subject, _ in entries):
        python_of(engine)
    threads = threads_for(plan.threads)
    here = machine.look()
    bandwidth = 0.0
    journal = Journal([plan.model_dump(), threads, here.cpu, _identities(plan, entries)])
    deployments = {subject.name: deployment for subject, deployment in entries}
    runner = _Runner(plan, scenarios, deployments, threads, opener, journal)
    with journal.alone(progress):
        subjects = journal.restore(subject for subject, _ in entries)
        # Those that an interrupted run has had did not decide it.
        looked = max(0, _next_round(subjects.values()) - 1) // plan.pairs
        for look in range(min(looked, plan.most_looks - 1), plan.most_looks):
            bandwidth = max(bandwidth, machine.read_bandwidth(threads))
            runner.rounds(subjects, look * plan.pairs, progress)
            bandwidth = max(bandwidth, machine.read_bandwidth(threads))  # others may have been busy
            found = conclude(plan, scenarios, here, threads, bandwidth, tuple(subjects.values()))
            found = found.model_copy(update={"notes": (*limits, *found.notes)})
            if decided(found):
                break
        keep(found)
        journal.delete()
    return found


def fitted(
    plan: BenchPlan,
) -> tuple[BenchPlan, list[tuple[Subject, Deployment]], tuple[str, ...]]:
    """The plan for what its models take, `entries_of` it, and sentences for what gave way."""
    plan.described()  # what is impossible for any model is said first
    entries = entries_of(plan)
    smaller, limits = plan.fitted(deployment for _, deployment in entries)
    check_prompts(smaller, [(subject.engine, deployment.path) for subject, deployment in entries])
    if any(scenario.is_served for scenario in smaller.described()):
        for subject, deployment in entries:
            if served_by(subject.engine) is OWL_SERVE:
                deployment.check_opens()
    return smaller, entries, limits


def check_prompts(plan: BenchPlan, runs: Iterable[tuple[str, Path]]) -> None:
    """Raise `BadInput` for prompts that could not be answered, before anything is timed.

    `runs`: the engines by name, each with a model's folder whose tokenizer reads the prompts.
    """
    prompts, scenarios = asked_of(plan), plan.described()
    for engine, folder in runs:
        for scenario in scenarios:
            if scenario.is_served:
                served_by(engine)
                next(other_words(folder, scenario.tokens, plan.seed))
            if scenario.kind == "answers":
                tokens_of(prompts, folder, scenario.context - scenario.tokens)


def check_ahead(plan: BenchPlan, made: Mapping[Path, str]) -> None:
    """Raise, as `run_bench` does, for what is wrong with a plan before its baselines are made.

    `made`: those, and the targets that they are made for.
    """
    there = tuple(one for one in plan.baselines if one not in made)
    plan, entries, _ = fitted(plan.model_copy(update={"baselines": there}))
    for engine in dict.fromkeys(subject.engine for subject, _ in entries):
        python_of(engine)
    needed = [engines_for(path, target, plan.engines) for path, target in made.items()]
    for name in dict.fromkeys(engine.name for engine in itertools.chain.from_iterable(needed)):
        require(name)
        if any(scenario.is_served for scenario in plan.described()):
            served_by(name)


def _identities(plan: BenchPlan, entries: list[tuple[Subject, Deployment]]) -> list[Any]:
    """What must not have changed for kept samples to count: code, models' files, prompts."""
    return [
        __version__,
        asked_of(plan),
        [
            [
                subject.model_dump(),
                software(subject.engine, deployment.library),
                state_of(deployment.path),
                state_of(Path(subject.draft)) if subject.draft not in ("", LOOKUP) else [],
            ]
            for subject, deployment in entries
        ],
    ]


def asked_of(plan: BenchPlan) -> tuple[str, ...]:
    """The prompts whose answers are timed; none where no scenario has any."""
    answers = any(scenario.kind == "answers" for scenario in plan.described())
    return read_prompts(plan.prompts) if answers else ()


def _time_left(started: float, done: int, rounds: int) -> str:
    """The time that the rounds left will take, in words; empty before the first is done."""
    if done == 0:
        return ""
    seconds = (time.monotonic() - started) / done * (rounds - done)
    return f", {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"


def _next_round(subjects: Iterable[Subject]) -> int:
    """The number of the round to take next: that of the latest samples, where some lack theirs."""
    rounds = [
        {sample.round for sample in subject.samples}
        for subject in subjects
        if subject.failure is None
    ]
    latest = max(set().union(*rounds), default=-1)
    return latest if any(latest not in one for one in rounds if latest >= 0) else latest + 1


def conclude(
    plan: BenchPlan,
    scenarios: tuple[Scenario, ...],
    here: machine.Machine,
    threads: int,
    bandwidth: float,
    subjects: tuple[Subject, ...],
) -> Result:
    """The result that follows from the samples in `subjects`."""
    table = result.statistics(subjects, scenarios, bandwidth)
    compared = result.comparisons(subjects, scenarios, stats.confidence(plan.most_looks))
    return Result(
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        owl_version=__version__,
        machine=here,
        threads=threads,
        pairs=max((len(subject.samples) for subject in subjects), default=0),
        read_gb_per_s=bandwidth,
        scenarios=scenarios,
        subjects=subjects,
        statistics=table,
        comparisons=compared,
        notes=(
            *_notes(here, subjects, table),
            *_short(subjects, scenarios),
            *_drafts(subjects, compared),
            *([_SHARED] if any(scenario.is_served for scenario in scenarios) else []),
        ),
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
        apart = max(
            stats.apart(subject.latencies(key))
            for key, rows in table.items()
            for subject in subjects
            if subject.name in rows
        )
        yield (
            f"Noisy machine: processes of one deployment differ by up to {apart:.0%}. Close other "
            "programs, use a machine of your own, or take more --pairs."
        )
    for name in dict.fromkeys(subject.engine for subject in subjects):
        if get_engine(name).lock is not None:
            yield f"{name}: {get_engine(name).licence}"


def _drafts(subjects: tuple[Subject, ...], compared: Iterable[Comparison]) -> Iterator[str]:
    """What came of each draft, and whether it pays, by the first metric."""
    alone = {subject.path: subject.name for subject in subjects if not subject.draft}
    for subject in subjects:
        tally = subject.tally
        if not tally:
            continue
        against = alone[subject.path]
        verdict = next(
            (one for one in compared if (one.candidate, one.baseline) == (subject.name, against)),
            None,
        )
        pays = {"faster": " It pays.", "slower": " It does not pay: leave it out."}
        pays |= {"no speed-up": " It does not pay."}
        at_a_time = f", {subject.draft_tokens} at a time," if subject.draft_tokens else ""
        yield (
            f"{subject.name}: of the tokens proposed{at_a_time} "
            f"{tally['share_accepted']:.0%} were accepted, {tally['tokens_per_step']:.2f} tokens a "
            f"step.{pays.get(verdict.verdict, '') if verdict else ''}"
        )


def _times(
    subject: Subject, scenario: Scenario, answer: dict[str, Any]
) -> dict[str, tuple[float, ...]]:
    """The latencies by metric; raises `EngineFailed` for what are none.

    Answers of a single token have a first one alone.
    """
    told = {m.key: answer[m.answer] for m in scenario.metrics}
    known = {key: latencies for key, latencies in told.items() if latencies} or told
    try:
        return {key: tuple(stats.checked(latencies)) for key, latencies in known.items()}
    except ValueError as error:
        raise EngineFailed(f"{subject.name} gave no usable times: {error}.") from error


def _short(subjects: Iterable[Subject], scenarios: Iterable[Scenario]) -> Iterator[str]:
    """What has no later tokens to time, or no later texts, though its engine did not fail."""
    for subject in subjects:
        for scenario in scenarios:
            with_times = [bool(subject.latencies(metric.key)) for metric in scenario.metrics]
            for metric, there in zip(scenario.metrics, with_times, strict=True):
                if any(with_times) and not there:
                    yield f"{subject.name}, {metric.key}: each answer ended with its first."


def _awaited(asking: "Coroutine[Any, Any, Tally]") -> "Tally":
    """What comes of it, in this thread, where Ctrl-C ends it; a notebook's has a loop that runs."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(asking)
    with ThreadPoolExecutor(1) as apart:
        return apart.submit(asyncio.run, asking).result()


class _Runner:
    """Takes samples of the `deployments`, by their subjects' names."""

    def __init__(
        self,
        plan: BenchPlan,
        scenarios: tuple[Scenario, ...],
        deployments: dict[str, Deployment],
        threads: int,
        opener: Opener,
        journal: Journal,
    ) -> None:
        self.plan, self.deployments = plan, deployments
        self.sessions = tuple(by_session(scenarios))
        self.threads = threads
        self.opener = opener
        self.journal = journal
        self.has_begun = False

    def rounds(self, subjects: dict[str, Subject], first: int, progress: Progress) -> None:
        """Take the next `pairs` rounds, from number `first` on, of what has not failed."""
        last = first + self.plan.pairs
        begin = max(first, _next_round(subjects.values()))
        started = time.monotonic()
        for index in range(begin, last):
            if not self.has_begun:  # what failed before an interruption may have been repaired
                again: dict[str, object] = {"failure": None, "failed": {}}
                subjects |= {name: one.model_copy(update=again) for name, one in subjects.items()}
                self.has_begun = True
            left = _time_left(started, index - begin, last - begin)
            order = list(subjects) if index % 2 == 0 else list(subjects)[::-1]
            for name in order:
                subject = subjects[name]
                done = any(sample.round == index for sample in subject.samples)
                if subject.failure is None and not done:
                    progress(f"Round {index + 1} of {last}{left}: {name}")
                    subjects[name] = self.measure(subject, index)

    def measure(self, subject: Subject, index: int) -> Subject:
        """`subject` with one more sample, or with the reason why it failed, or a part of it."""
        latencies: dict[str, tuple[float, ...]] = {}
        drafted: dict[str, float] = {}
        opened: list[tuple[dict[str, Any], int]] = []
        failed = dict(subject.failed)
        for scenarios in self.sessions:
            if scenarios[0].key in failed:
                continue
            own: dict[str, tuple[float, ...]] = {}
            try:
                if scenarios[0].is_served:
                    opened.append(self._served(subject, scenarios, own))
                else:
                    opened.append(self._opened(subject, scenarios, own, drafted))
            except EngineFailed as error:
                failed |= {scenario.key: str(error) for scenario in scenarios}
            else:
                latencies |= own
        if not opened:
            why = next(iter(failed.values()))
            self.journal.give_up(subject.name, why)
            return subject.model_copy(update={"failure": why, "failed": {}})
        about, peak = opened[0][0], max(peak for _, peak in opened)
        load_s = about.pop("seconds")
        sample = Sample(
            round=index, load_s=load_s, peak_bytes=peak, latencies_ms=latencies, draft=drafted
        )
        self.journal.add(subject.name, about, sample, failed)
        samples = (*subject.samples, sample)
        return subject.model_copy(update={"about": about, "samples": samples, "failed": failed})

    def _opened(
        self,
        subject: Subject,
        scenarios: tuple[Scenario, ...],
        latencies: dict[str, tuple[float, ...]],
        drafted: dict[str, float],
    ) -> tuple[dict[str, Any], int]:
        """Fill in what an engine takes for one session; returns what it says, and its peak."""
        context, batch, streams = scenarios[0].session
        with self.opener(
            subject.engine,
            Path(subject.path),
            threads=self.threads,
            trust_library=self.plan.trust_library,
            context=context,
            timeout_s=self.plan.time_limit_s,
            batch=batch,
            streams=streams,
            draft=subject.draft,
            draft_tokens=subject.draft_tokens,
        ) as engine:
            for scenario in scenarios:
                answer = engine.request(scenario.kind, **self._asked(subject, scenario))
                latencies |= _times(subject, scenario, answer)
                drafted |= answer.get("draft", {})
            return dict(engine.loaded), engine.request("memory")["peak_bytes"]

    def _served(
        self,
        subject: Subject,
        scenarios: tuple[Scenario, ...],
        latencies: dict[str, tuple[float, ...]],
    ) -> tuple[dict[str, Any], int]:
        """As `_opened`, of an engine's server."""
        context, _, clients = scenarios[0].session
        with ServerProcess(
            subject.engine,
            Path(subject.path),
            rows=clients,
            context=context,
            threads=self.threads,
            timeout_s=self.plan.time_limit_s,
            trust_library=self.plan.trust_library,
        ) as server:
            for scenario in scenarios:
                latencies |= _times(subject, scenario, self._answers(subject, scenario, server))
            return dict(server.loaded), server.peak_bytes

    def _answers(
        self, subject: Subject, scenario: Scenario, server: ServerProcess
    ) -> dict[str, list[float]]:
        """What clients see of a server, in ms, once each of them has had an answer.

        `answer_ms`: the time in which one of `new` tokens is made, over all clients; a shorter
        answer counts for as many as it has.
        """
        from owl_deploy.bench.clients import Load, ask_all

        texts = other_words(self.deployments[subject.name].path, scenario.tokens, self.plan.seed)
        load = Load(server.url, server.model, scenario.new, limit_s=self.plan.time_limit_s)
        for repeats in (1, self.plan.repeats):
            prompts = list(itertools.islice(texts, repeats * scenario.streams))
            asking = ask_all(load, scenario.streams, iter(prompts))
            try:
                tally = _awaited(asking)
            except TimeoutError as error:
                server.check_alive()
                late = f"did not answer within {self.plan.time_limit_s:g} s"
                hint = "Give it a longer --time-limit, or fewer --clients."
                raise EngineFailed(f"{subject.name}'s server {late}.", hint) from error
            if tally.refused:
                tally.errors.append("429 Too Many Requests")
            if tally.errors:
                server.check_alive()
                raise EngineFailed(f"{subject.name}'s server failed: {tally.errors[0]}.")
        return {
            "answer_ms": [1e3 * tally.wall_s * scenario.new / tally.tokens],
            "first_ms": [1e3 * seconds for seconds in tally.first_s],
            "text_ms": [1e3 * seconds for seconds in tally.between_s],
        }

    def _asked(self, subject: Subject, scenario: Scenario) -> dict[str, Any]:
        """The worker's arguments."""
        deployment, steps, repeats = (
            self.deployments[subject.name],
            self.plan.steps,
            self.plan.repeats,
        )
        if scenario.kind == "answers":
            room = scenario.context - scenario.tokens
            prompts = tokens_of(read_prompts(self.plan.prompts), deployment.path, room)
            return {"prompts": prompts, "count": scenario.tokens, "ends": deployment.ends}
        length = scenario.prompt_tokens(steps, repeats)
        prompt = self._prompt(deployment, length, scenario.kind == "generate")
        return scenario.request(prompt, steps, repeats)

    def _prompt(self, deployment: Deployment, length: int, real: bool) -> list[int]:
        """The same in every process and every engine: random tokens, or a real text's."""
        if real and (deployment.path / TOKENIZER).is_file():
            text = Tokenizer(deployment.path).encode(_SHIPPED_TEXT)
            return (text * (length // len(text) + 1))[:length]
        generator = np.random.default_rng(self.plan.seed)
        return [int(token) for token in generator.integers(0, deployment.vocab, length)]
