"""What a benchmark leaves: every raw sample, what follows from them, and where they were taken."""

import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from owl_deploy.bench import stats
from owl_deploy.bench.machine import Machine
from owl_deploy.bench.scenario import Metric, Scenario
from owl_deploy.errors import BadInput
from owl_deploy.models.manifest import BenchmarkManifest, refuse_newer, what_it_is
from owl_deploy.utils import artefact

FILE = "result.json"
SCHEMA: Final = 1  # the number of its format
# From which share of zeros weights of unknown making count as pruned: rounding alone leaves 0.13 to
# 0.16 in 4 bits and 0.24 to 0.36 in 3, and a head that was not pruned counts as well.
SPARSE, SPARSE_IN_3_BITS = 0.25, 0.4
_STATISTICS = {"median_ms", "spread", "p90_ms", "p99_ms", "processes", "tokens_per_s"}
# What `owl bench --json` prints besides a result: what follows from it, and from a baseline's file.
_PRINTED = ("decision", "verdict", "verdicts")
_WAY_OUT = "Give what owl bench -o wrote."
Role = Literal["candidate", "baseline"]
Against = Literal["same engine", "best of the precision", "best of all"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


_Bytes = Annotated[int, Field(ge=0, lt=2**63)]
_Latencies = Annotated[tuple[Annotated[FiniteFloat, Field(gt=0)], ...], Field(min_length=1)]


class Sample(_Model):
    """One round's fresh processes: what was measured, by metric, in ms.

    Load time is that of the first session (scenario.py), peak memory the largest of all. `draft`:
    what came of a draft's proposals, where there is one (engines/speculate.py's `Tally`).
    """

    round: int
    load_s: FiniteFloat
    peak_bytes: _Bytes
    latencies_ms: dict[str, _Latencies]
    draft: dict[str, float] = {}


class Block(_Model):
    """One block of a pruned model: its sparsity, and the outlier ratio (%) that decided it."""

    name: str
    sparsity: float
    outlier_ratio: float | None


class Score(_Model):
    """What a task gave: a `metric`, with its standard error where there is one.

    `passed`: of a task whose answers are kept, which problems were solved, by name; `window`: the
    tokens that the model saw, and `every`: that each so-manieth document was taken, where kept.
    `questions`: what tells all that was asked from others, where that was kept.
    """

    metric: str
    value: FiniteFloat
    stderr: float | None = None
    documents: int = 0
    passed: dict[str, bool] = {}
    window: int | None = None
    every: int | None = None
    questions: str | None = None


class Subject(_Model):
    """A deployment in an engine, and all its samples; `failure` says why there are no more.

    `failed`: why there are no more of a scenario, by its key, where others go on.
    `perplexity_on`: what tells the text that it was measured on from others, the digest of its
    tokens with the length of its windows (of earlier results without), where that was kept.
    `scores`: by task, as `owl eval` recorded them. `draft`: the folder, or "lookup", that proposes
    `draft_tokens` tokens at a time, 0 for as many as pay; its answers, and so its quality, are the
    deployment's.
    """

    name: str
    path: str
    role: Role
    target: str
    engine: str
    precision: str
    zeros: float | None
    perplexity: FiniteFloat | None = Field(gt=0)
    perplexity_on: str = ""
    scores: dict[str, Score] = {}
    size_bytes: _Bytes
    blocks: tuple[Block, ...] = ()
    about: dict[str, Any] = {}
    samples: tuple[Sample, ...] = ()
    failure: str | None = None
    failed: dict[str, str] = {}
    draft: str = ""
    draft_tokens: int = 0

    @property
    def is_sparse(self) -> bool:
        """Whether it was pruned: owl says so, or zeros do that no rounding leaves."""
        least = SPARSE_IN_3_BITS if self.precision == "int3" else SPARSE
        return bool(self.blocks) or (self.zeros or 0.0) >= least

    def by_round(self, key: str) -> dict[int, tuple[float, ...]]:
        """The latencies of a metric, by the round of the process; none of one that failed."""
        return {one.round: one.latencies_ms[key] for one in self.samples if key in one.latencies_ms}

    def latencies(self, key: str) -> list[tuple[float, ...]]:
        """The latencies of a metric, by process; none of one that failed."""
        return list(self.by_round(key).values())

    @property
    def failures(self) -> list[str]:
        """What its engine failed at, a sentence each."""
        scenarios: dict[str, list[str]] = {}
        for key, why in self.failed.items():
            scenarios.setdefault(why, []).append(key)
        found = [f"{', '.join(keys)}: {why}" for why, keys in scenarios.items()]
        return found + ([self.failure] if self.failure else [])

    @property
    def tally(self) -> dict[str, float]:
        """What became of a draft's tokens in the last sample; empty without."""
        return self.samples[-1].draft if self.samples else {}

    def summary(self, key: str) -> stats.Summary:
        """The statistics of a metric."""
        return stats.summarize(self.latencies(key))

    @property
    def load_s(self) -> float:
        """The median time to load and compile, in seconds."""
        return stats.process_median([max(sample.load_s, 1e-9) for sample in self.samples])

    @property
    def peak_bytes(self) -> int:
        """The largest peak of resident memory."""
        return max(sample.peak_bytes for sample in self.samples)


class Comparison(_Model):
    """How many times faster `candidate` is than `baseline`; `scenario` is the metric's key."""

    scenario: str
    candidate: str
    baseline: str
    against: tuple[Against, ...]
    ratio: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    pairs: int
    verdict: stats.Verdict
    text: str


class Result(_Model):
    """A whole benchmark; `statistics` and `comparisons` follow from the samples.

    `read_gb_per_s` is what a plain read of memory reached, in the same run, on the same threads:
    what decoding is held against.
    """

    schema_version: Literal[1] = SCHEMA
    created: str
    owl_version: str
    machine: Machine
    threads: int
    pairs: int
    read_gb_per_s: float
    scenarios: tuple[Scenario, ...] = Field(min_length=1)
    subjects: tuple[Subject, ...] = Field(min_length=1)
    statistics: dict[str, dict[str, dict[str, FiniteFloat]]]
    comparisons: tuple[Comparison, ...]
    notes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _speaks_of_its_subjects(self) -> Self:
        """What was reckoned is of the subjects and metrics that there are, and whole."""
        names = {subject.name for subject in self.subjects}
        rows = [row for table in self.statistics.values() for row in table.values()]
        spoken_of = {name for table in self.statistics.values() for name in table}
        spoken_of |= {name for one in self.comparisons for name in (one.candidate, one.baseline)}
        if not spoken_of <= names or any(not row.keys() >= _STATISTICS for row in rows):
            raise ValueError("statistics or comparisons that are of no subject, or not whole")
        if any(row["tokens_per_s"] <= 0 for row in rows):
            raise ValueError("statistics of tokens that take no time")
        return self

    @property
    def failures(self) -> list[str]:
        """What engines failed at, a sentence each."""
        return [failure for subject in self.subjects for failure in subject.failures]


def read_result(path: str | Path) -> Result:
    """Read a result.json, or the one in a folder; raises `BadInput` for anything else.

    What `owl bench --json` printed is one, too.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    what_else = what_it_is(path)
    if what_else and not file.is_file():
        raise BadInput(f"{path} is no benchmark's result.", what_else)
    try:
        content = artefact.read_object(file, _WAY_OUT)
        refuse_newer(content, SCHEMA, str(file))
        content = {name: value for name, value in content.items() if name not in _PRINTED}
        # An escape such as \ud800 is half a letter, which no page and no picture can hold.
        whole = json.dumps(content, ensure_ascii=False).encode("utf-8", "replace")
        return Result.model_validate_json(whole)
    except OSError as error:
        raise BadInput(f"{file} cannot be read ({error.strerror}).", _WAY_OUT) from error
    except ValidationError as error:
        raise BadInput(
            f"{file} is not a benchmark's result, or a damaged one.", _WAY_OUT
        ) from error


def write_result(result: Result, folder: Path, force: bool = False) -> None:
    """Write `result` as the new folder `folder`, whole or not at all."""
    with artefact.staged_folder(folder, force) as staging:
        value = result.model_dump(mode="json")
        artefact.write_json(staging / FILE, value)
        BenchmarkManifest(created=result.created).write(staging)


def metrics_of(scenarios: tuple[Scenario, ...]) -> list[Metric]:
    """All metrics of the scenarios, in order."""
    return [metric for scenario in scenarios for metric in scenario.metrics]


def statistics(
    subjects: tuple[Subject, ...], scenarios: tuple[Scenario, ...], read_gb_per_s: float
) -> dict[str, dict[str, dict[str, float]]]:
    """For each metric and each subject that was measured: latencies in ms, and tokens/s.

    For answers to requests also `requests_per_s`, and for decoding `read_gb_per_s`, the model's
    bytes over the latency, and `roofline`, its share of a plain read: a yardstick and no limit, for
    not all of a file need be read in each step (an embedding apart from the head, zeros).
    """
    table: dict[str, dict[str, dict[str, float]]] = {}
    for metric in metrics_of(scenarios):
        for subject in subjects:
            if subject.latencies(metric.key):
                row = _row(subject.summary(metric.key), metric)
                if metric.key.startswith("decode"):
                    row["read_gb_per_s"] = subject.size_bytes / row["median_ms"] / 1e6
                    row["roofline"] = row["read_gb_per_s"] / read_gb_per_s
                if metric.answer == "answer_ms":
                    row["requests_per_s"] = 1e3 / row["median_ms"]
                table.setdefault(metric.key, {})[subject.name] = row
    return table


def _row(summary: stats.Summary, metric: Metric) -> dict[str, float]:
    return {
        "median_ms": summary.median,
        "spread": summary.spread,
        "p90_ms": summary.p90,
        "p99_ms": summary.p99,
        "processes": summary.processes,
        "tokens_per_s": 1e3 * metric.tokens / summary.median,
    }


def comparisons(
    subjects: tuple[Subject, ...], scenarios: tuple[Scenario, ...], confidence: float
) -> tuple[Comparison, ...]:
    """Every candidate against the baselines that matter to a user, in every metric.

    `confidence`: of the intervals.
    """
    found = []
    for metric in metrics_of(scenarios):
        measured = [subject for subject in subjects if subject.latencies(metric.key)]
        baselines = [subject for subject in measured if subject.role == "baseline"]
        for candidate in measured:
            if candidate.role == "candidate":
                for baseline, against in choose_baselines(candidate, baselines, metric.key):
                    # Of what failed and was resumed there may be no round that both were in.
                    if candidate.by_round(metric.key).keys() & baseline.by_round(metric.key):
                        found.append(_compare(candidate, baseline, against, metric.key, confidence))
    return tuple(found)


def choose_baselines(
    candidate: Subject, baselines: list[Subject], key: str
) -> list[tuple[Subject, tuple[Against, ...]]]:
    """The dense baselines to name: in the same engine, the best of its precision, the best of all.

    "Same engine" prefers the same precision there, and of what has a draft is the same without it.
    One baseline may be several of these.
    """
    if not baselines:
        return []
    speed = {subject.name: subject.summary(key).median for subject in baselines}

    def best(some: list[Subject]) -> Subject | None:
        return min(some, key=lambda subject: speed[subject.name], default=None)

    alike = [s for s in baselines if precision_class(s) == precision_class(candidate)]
    here = [s for s in baselines if s.engine == candidate.engine]
    itself = [s for s in here if candidate.draft and s.path == candidate.path]
    picks: list[tuple[Against, Subject | None]] = [
        ("same engine", best(itself) or best([s for s in here if s in alike]) or best(here)),
        ("best of the precision", best(alike)),
        ("best of all", best(baselines)),
    ]
    chosen: dict[str, list[Against]] = {}
    for against, subject in picks:
        if subject is not None:
            chosen.setdefault(subject.name, []).append(against)
    by_name = {subject.name: subject for subject in baselines}
    return [(by_name[name], tuple(against)) for name, against in chosen.items()]


def precision_class(subject: Subject) -> str:
    """Floats of any width are one class: they promise the model's own quality."""
    return "float" if subject.precision in ("fp32", "fp16", "bf16") else subject.precision


def _compare(
    candidate: Subject,
    baseline: Subject,
    against: tuple[Against, ...],
    key: str,
    confidence: float,
) -> Comparison:
    ratio = stats.compare(*paired(candidate, baseline, key), confidence)
    return Comparison(
        scenario=key,
        candidate=candidate.name,
        baseline=baseline.name,
        against=against,
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        pairs=ratio.pairs,
        verdict=ratio.verdict,
        text=stats.describe(ratio),
    )


def paired(candidate: Subject, baseline: Subject, key: str) -> tuple[list[float], list[float]]:
    """The process medians of a metric, in ms, of the rounds that both were measured in."""
    now, then = candidate.by_round(key), baseline.by_round(key)
    both = [number for number in now if number in then]
    return (
        [stats.process_median(now[number]) for number in both],
        [stats.process_median(then[number]) for number in both],
    )
