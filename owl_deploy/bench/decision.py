"""What to deploy: the fastest of a benchmark that loses no more quality than may go.

Quality is a task's metric, such as HumanEval's pass@1, or the logarithm of perplexity, which is the
model's mean loss. What a deployment loses is its difference from the best dense one, as a
share of that one's. A task's difference has a standard error: paired, where both were asked the
same problems (Miller 2024, arXiv 2411.00640, section 4.2). Where nobody says what may go, that much
may: the one-standard-error rule (Breiman et al. 1984, section 3.4.3).
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from owl_deploy.bench import stats
from owl_deploy.bench.result import Comparison, Result, Score, Subject, metrics_of, paired
from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.inference.deployment import text_of
from owl_deploy.models.measurements import JUDGED_BY, by_document, measurement

NOTHING = 0.005  # less is not noticed: int8 values lose about so much
PERPLEXITY, HUMANEVAL = "perplexity", "humaneval"
_ROUNDING = 1e-9  # one problem of any number is one standard error exactly
_TELLS = 2  # standard errors: what differs by less may be chance
_PAYS = ("engine", "precision", "draft")  # what may make a sparse one faster than its zeros do
_Speeds = dict[str, dict[str, float]]  # a metric's row of each deployment, by name


@dataclass(frozen=True)
class Option:
    """A deployment to choose: its tokens/s, and `value`, its perplexity or its task's metric.

    `loss`: the share of the best dense one's quality that it loses; `noise`: the standard error of
    that. `on_front`: no other beats it in both.
    """

    subject: Subject
    tokens_per_s: float
    value: float
    loss: float
    noise: float = 0.0
    stderr: float | None = None
    on_front: bool = False

    @property
    def title(self) -> str:
        """Its name, with what runs it."""
        return f"{self.subject.name} ({self.subject.engine}, {self.subject.precision})"

    def is_allowed(self, max_loss: float | None) -> bool:
        """Whether it loses no more than `max_loss`; None: than nobody would notice, or tell."""
        return self.loss <= self.allowed(max_loss) + _ROUNDING

    def allowed(self, max_loss: float | None) -> float:
        """The share that it may lose."""
        return max(NOTHING, self.noise) if max_loss is None else max_loss

    @property
    def may_be_chance(self) -> bool:
        """Whether its loss lies within the noise."""
        return abs(self.loss) <= _TELLS * self.noise


@dataclass(frozen=True)
class Judged:
    """What a benchmark leaves to choose from, by `key`: perplexity, or a task with its `metric`.

    `documents`: of the task. `options` are in the order of the result's subjects. `unlike`: why
    there are none, where what is known of them cannot be compared. `unknown`: the deployments whose
    quality nobody measured; `aside`: why HumanEval, which some were asked, does not judge them;
    `timed`: the benchmark's first metric, by its key, and `comparisons` in that.
    """

    key: str
    metric: str
    documents: int
    options: tuple[Option, ...]
    unlike: str = ""
    unknown: tuple[str, ...] = ()
    aside: str = ""
    timed: str = ""
    comparisons: tuple[Comparison, ...] = ()

    @property
    def by_task(self) -> bool:
        """Whether more is better, in shares of documents; else less is, in perplexity."""
        return self.key != PERPLEXITY

    @property
    def runs(self) -> str:
        """What the timed metric has a deployment do."""
        return "decodes" if self.timed.startswith("decode") else "runs"

    @property
    def quality(self) -> str:
        """What is lost a share of."""
        return self.metric if self.by_task else "log-perplexity"

    def said(self, option: Option) -> str:
        """An option's quality in a few characters, with its standard error."""
        if not self.by_task:
            return f"{option.value:.2f}" if option.value < 10 else f"{option.value:.1f}"
        error = "" if option.stderr is None else f" ± {100 * option.stderr:.1f}"
        return f"{100 * option.value:.1f}{error} %"

    @property
    def best(self) -> Option:
        """The one that the losses are counted from."""
        return min(self.options, key=lambda option: abs(option.loss) + option.noise)


def decide(
    result: Result, max_loss: float | str | None = None, quality_metric: str | None = None
) -> dict[str, Any]:
    """What to deploy of what `result` measured: the `decision` of `owl bench --json`.

    `max_loss`: the share of the best dense deployment's quality that may go, such as 0.02 or "2%";
    None: half a per cent of log-perplexity, or one standard error of a task's score.
    `quality_metric`: perplexity, humaneval, or another task that `evaluate` has measured; None:
    humaneval if all were asked the same problems, else perplexity. In what is returned `deploy` is
    a deployment's name, None where nothing is recommended; `why` says it in sentences; `quality`
    is what was chosen by; `options` are those that there were, each with its speed, its quality
    and what of it is lost. Quality counts where it was measured before the benchmark. Raises
    `BadInput` for a metric that is not measured of each, and for what is no share.
    """
    share = None if max_loss is None else read_loss(str(max_loss))
    return to_json(judge(result, quality_metric), share)


def read_loss(text: str) -> float:
    """A share such as "2%" or "0.02"; raises `BadInput` for what is none."""
    number, percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = math.nan
    if not 0 <= share < math.inf:
        raise BadInput(f"--max-loss {text} is no share.", "Give one such as 2% or 0.02.")
    return share


def scores_of(folder: Path) -> dict[str, Score]:
    """What `owl eval --tasks` left beside an artefact, by task; those with a metric to judge by."""
    found = {}
    for task, row in (measurement(folder, "tasks") or {}).items():
        metrics = row.get("metrics", {})
        name = next((name for name in JUDGED_BY if name in metrics), None)
        if name is not None:
            found[task] = Score(
                metric=name,
                value=metrics[name]["value"],
                stderr=metrics[name].get("stderr"),
                documents=row.get("documents", 0),
                passed=by_document(row.get("right", {}), row.get("answers", ())),
                window=row.get("window"),
                every=row.get("every"),
                questions=row.get("questions_sha256") or None,
            )
    return found


def refreshed(result: Result) -> Result:
    """The result with what was measured since by tasks, of deployments that lie where they did."""
    subjects = tuple(
        subject.model_copy(update={"scores": subject.scores | scores_of(Path(subject.path))})
        for subject in result.subjects
    )
    return result.model_copy(update={"subjects": subjects})


def check_measured(deployments: Iterable[Path], key: str | None) -> None:
    """Raise `BadInput`, before anything is timed, where `key` could not judge `deployments`."""
    if key is not None:
        kept = {path: measurement(path, PERPLEXITY) or {} for path in deployments}
        _scores(
            {
                str(path): _Measured(str(path), found.get("value"), text_of(found), scores_of(path))
                for path, found in kept.items()
            },
            key,
        )


class _Measured(NamedTuple):
    """What is known of what lies at `path`: its perplexity, what tells the text of that from others
    ("" if unknown), and its scores by task.
    """

    path: str
    perplexity: float | None
    text: str
    scores: dict[str, Score]


def _scores(measured: Mapping[str, _Measured], key: str) -> dict[str, Score]:
    """The score of each, by `key`; raises `BadInput` where one has none, or of other documents."""
    tasks = {task for one in measured.values() for task in one.scores}
    if key not in (PERPLEXITY, HUMANEVAL) and key not in tasks:
        raise unknown_name("--quality-metric", key, sorted({PERPLEXITY, HUMANEVAL, *tasks}))
    found: dict[str, Score] = {}
    for name, one in measured.items():
        if key == PERPLEXITY and one.perplexity is not None:
            found[name] = Score(metric=PERPLEXITY, value=one.perplexity)
        elif key in one.scores:
            found[name] = one.scores[key]
        else:
            how = f"--{PERPLEXITY} TEXT" if key == PERPLEXITY else f"--tasks {key}"
            raise BadInput(f"{name} has no {key} measured.", f"Run: owl eval {one.path} {how}")
    texts = {one.text: name for name, one in measured.items() if one.text}
    if key == PERPLEXITY and len(texts) > 1:
        raise BadInput(
            "{} and {} were measured on other text, or in other windows.".format(*texts.values()),
            f"Evaluate both with the same --{PERPLEXITY}, --window and --windows.",
        )
    for name, score in found.items():
        first, other = next(iter(found.items()))
        if (
            score.documents != other.documents
            or (score.passed and other.passed and score.passed.keys() != other.passed.keys())
            or _differ(score.every, other.every)
        ):
            raise BadInput(
                f"{first} and {name} were asked other documents of {key}.",
                "Evaluate both with the same --limit and --every.",
            )
        if _differ(score.questions, other.questions):
            raise BadInput(
                f"{first} and {name} were asked other questions of {key}: its data, its examples "
                "or its words have changed.",
                "Evaluate both again.",
            )
        if _differ(score.window, other.window):
            raise BadInput(
                f"{first} saw {other.window} tokens of {key}'s documents, and {name} "
                f"{score.window}.",
                "Evaluate both with the same --window.",
            )
    return found


def _differ(one: int | str | None, other: int | str | None) -> bool:
    """Whether both are known and are not the same."""
    return None not in (one, other) and one != other


def judge(result: Result, key: str | None = None) -> Judged:
    """The deployments whose speed, in the first metric, and quality by `key` are both known.

    `key`: perplexity, or a task's name; None: HumanEval if all of them were asked the same problems
    of it, and the best solves more than chance would let it, else perplexity. Raises `BadInput` for
    what is not measured of each.
    """
    metric = metrics_of(result.scenarios)[0].key
    speeds = result.statistics.get(metric, {})
    timed = [subject for subject in result.subjects if subject.name in speeds]
    if not timed:
        return _undecided(f"no deployment was timed in {metric}.")
    judged = _by_what_is_known(timed, speeds) if key is None else _judged(timed, speeds, key)
    compared = tuple(one for one in result.comparisons if one.scenario == metric)
    return replace(judged, timed=metric, comparisons=compared)


def _by_what_is_known(timed: Sequence[Subject], speeds: _Speeds) -> Judged:
    aside = ""
    try:
        by_code = _judged(timed, speeds, HUMANEVAL)
        if by_code.options and by_code.best.value > _TELLS * (by_code.best.stderr or 0.0):
            return by_code
    except BadInput as error:
        if any(HUMANEVAL in one.scores for one in timed):
            aside = str(error)
    unknown = tuple(subject.name for subject in timed if not subject.perplexity)
    known = [one for one in timed if one.perplexity]
    dense = [one.path for one in timed if not one.is_sparse]
    if known and dense and all(one.is_sparse for one in known):
        return _undecided(
            "no dense deployment has its perplexity measured, which a loss is counted from "
            f"(owl eval {dense[0]} --perplexity TEXT)."
        )
    try:
        judged = _judged(known, speeds, PERPLEXITY)
    except BadInput as error:
        return _undecided(str(error))
    return replace(judged, unknown=unknown, aside=aside)


def _undecided(why: str) -> Judged:
    return Judged(PERPLEXITY, PERPLEXITY, 0, (), unlike=why)


def _judged(subjects: Sequence[Subject], speeds: _Speeds, key: str) -> Judged:
    measured = {
        s.name: _Measured(s.path, s.perplexity, s.perplexity_on, s.scores) for s in subjects
    }
    scores = _scores(measured, key)
    if not subjects:
        return Judged(key, key, 0, ())
    sign = 1 if key == PERPLEXITY else -1
    whole = [s for s in subjects if not s.is_sparse]
    dense = whole or subjects
    best = min((scores[s.name] for s in dense), key=lambda score: sign * score.value)
    found = [
        Option(
            subject=subject,
            tokens_per_s=speeds[subject.name]["tokens_per_s"],
            value=score.value,
            loss=_loss(score, best),
            noise=_noise(score, best),
            stderr=score.stderr,
        )
        for subject in subjects
        for score in (scores[subject.name],)
    ]
    front = pareto([(option.tokens_per_s, option.loss) for option in found])
    options = (replace(one, on_front=place in front) for place, one in enumerate(found))
    return Judged(key, best.metric, best.documents, tuple(options))


def _loss(score: Score, best: Score) -> float:
    """The share of quality lost; where `best` has next to none, there is nothing to share."""
    if score.metric == PERPLEXITY:
        found, full = math.log(score.value) - math.log(best.value), math.log(best.value)
    else:
        found, full = best.value - score.value, best.value
    return found / max(full, 1e-9)


def _noise(score: Score, best: Score) -> float:
    """The standard error of `_loss`: over problems where they are known, else of two samples."""
    if score.metric == PERPLEXITY or score is best or best.value <= 0:
        return 0.0
    if len(score.passed) > 1 and score.passed.keys() == best.passed.keys():
        pairs = [best.passed[one] - passed for one, passed in score.passed.items()]
        return statistics.stdev(pairs) / math.sqrt(len(pairs)) / best.value
    return math.hypot(score.stderr or 0.0, best.stderr or 0.0) / best.value


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the (tokens/s, loss) that no other beats in both, slowest first."""
    best = [
        index
        for index, (speed, loss) in enumerate(points)
        if not any(
            fast >= speed and low <= loss and (fast, low) != (speed, loss) for fast, low in points
        )
    ]
    return sorted(best, key=lambda index: points[index])


def choose(options: Iterable[Option], max_loss: float | None) -> Option | None:
    """The fastest of those that `max_loss` allows (see `Option.allowed`), if there is one."""
    kept = [option for option in options if option.is_allowed(max_loss)]
    return max(kept, key=lambda option: option.tokens_per_s, default=None)


def to_json(judged: Judged, max_loss: float | None = None) -> dict[str, Any]:
    """What `sentence` says, as JSON values; shares of quality lost, tokens/s."""
    pick = _recommended(judged, max_loss)
    return {
        "deploy": pick and pick.subject.name,
        "why": sentence(judged, max_loss),
        "quality": judged.key,
        "options": [
            {
                "name": one.subject.name,
                "tokens_per_s": one.tokens_per_s,
                "value": one.value,
                "loss": one.loss,
                "allowed": one.allowed(max_loss),
                "on_front": one.on_front,
            }
            for one in judged.options
        ],
    }


def sentence(judged: Judged, max_loss: float | None = None) -> str:
    """What to deploy on this machine, why, and what sparsity would have to lose less to win."""
    pick = _recommended(judged, max_loss)
    if pick is None:
        return f"Nothing here says what to deploy: {_why_not(judged)}"
    unknown = ""
    if judged.unknown:
        them = " and ".join(judged.unknown)
        unknown = f"Left out, for their perplexity is not known: {them} (owl eval records it)."
    doubted = _doubted(judged, pick, max_loss)
    said = [_pick(judged, pick, max_loss, doubted)]
    said += [_unsure(judged, pick, doubted)] if doubted else []
    said += [_sparse(judged, pick, max_loss), unknown]
    said += [f"That is by perplexity: {judged.aside}"] if judged.aside else []
    # The next may be the best dense one, of which a sparse choice is told the same.
    return " ".join(filter(None, dict.fromkeys(said)))


def _recommended(judged: Judged, max_loss: float | None) -> Option | None:
    """The choice where there is one: the only one measured is the fastest of nothing."""
    return choose(judged.options, max_loss) if len(judged.options) > 1 else None


def _why_not(judged: Judged) -> str:
    """Why nothing is recommended, and what would change that."""
    if judged.unlike:
        return judged.unlike
    known = [one.subject.name for one in judged.options]
    timed = [*known, *judged.unknown]
    if len(timed) == 1:
        return (
            f"only {timed[0]} was timed, and there is nothing to compare it with. Give another "
            "DEPLOYMENT as well, or a dense one by --baseline."
        )
    whose = f"the quality of {known[0]} alone" if known else "no quality"
    return (
        f"{whose} is known. `owl eval DEPLOYMENT --perplexity TEXT`, or --tasks humaneval, records "
        "it before a benchmark."
    )


def _doubted(judged: Judged, pick: Option, max_loss: float | None) -> Option | None:
    """The next after `pick`, where their comparison does not show that `pick` is faster."""
    following = choose((one for one in judged.options if one is not pick), max_loss)
    if following is None or _beside(judged, pick, following)[0] == "faster":
        return None
    return following


def _unsure(judged: Judged, pick: Option, other: Option) -> str:
    """What the comparison with another says that does not show `pick` to be faster."""
    return f"Beside {other.title} it is {_beside(judged, pick, other)[1]}."


def _pick(judged: Judged, pick: Option, max_loss: float | None, doubted: Option | None) -> str:
    allowed = f"at most {_percent(max_loss or 0)} of {judged.quality}"
    if max_loss is None:
        allowed = "no more than one standard error" if judged.by_task else "next to nothing"
    problems = f" of {judged.documents} problems" if judged.by_task else ""
    least = min(judged.options, key=lambda option: option.loss)
    best = f"the best has {judged.said(judged.best)}" if pick.loss > 0 else "none has better"
    if pick.loss <= 0 and least.loss < pick.loss:
        best = f"{least.title} has {judged.said(least)}"
    if pick.loss > 0 and pick.may_be_chance:
        best += f", which is within the noise of {judged.documents} problems"
    doubt = f", though its lead over {doubted.title} is not established" if doubted else ""
    return (
        f"Deploy {pick.title}: {pick.tokens_per_s:.0f} tokens/s, the fastest here that loses "
        f"{allowed} ({judged.metric} {judged.said(pick)}{problems}, {best}){doubt}."
    )


def _sparse(judged: Judged, pick: Option, max_loss: float | None) -> str:
    """What is to say of the sparse ones beside the choice."""
    sparse = [option for option in judged.options if option.subject.is_sparse]
    dense = [option for option in judged.options if not option.subject.is_sparse]
    if pick.subject.is_sparse:
        best = choose(dense, max_loss)
        return _gain(judged, pick, best) if best else ""
    faster = [option for option in sparse if option.tokens_per_s > pick.tokens_per_s]
    if not faster:
        return "No sparse one is faster." if sparse else ""
    surely = [option for option in faster if _beside(judged, option, pick)[0] == "faster"]
    near = min(surely or faster, key=lambda option: option.loss)
    _, gain = _beside(judged, near, pick)
    if not surely:
        return f"Beside it {near.title} is {gain}."
    chance = ""
    if near.may_be_chance:
        chance = f" That difference is within the noise of {judged.documents} problems."
    return (
        f"{near.title} {judged.runs} at {gain} that speed, but loses "
        f"{_percent(near.loss)} of {judged.quality} (it has {judged.said(near)}); it would be "
        f"the choice if that were {_percent(near.allowed(max_loss))} or less.{chance}"
    )


def _gain(judged: Judged, pick: Option, best: Option) -> str:
    """What the sparse `pick` is ahead of the `best` dense one, and whether that is sparsity's."""
    verdict, gain = _beside(judged, pick, best)
    if verdict != "faster":
        return _unsure(judged, pick, best)
    others = [name for name in _PAYS if _of(pick, name) != _of(best, name)]
    if not others:
        return f"Sparsity pays: it is {gain} the best dense one's speed."
    return (
        f"It {judged.runs} at {gain} the speed of {best.title}, by its {', '.join(others)} and "
        f"sparsity together: {_worth(judged, pick)}"
    )


def _worth(judged: Judged, pick: Option) -> str:
    """What sparsity alone is worth in `pick`, or what would tell."""
    alike = [
        option
        for option in judged.options
        if not option.subject.is_sparse
        and all(_of(option, name) == _of(pick, name) for name in _PAYS)
    ]
    if alike:
        twin = max(alike, key=lambda option: option.tokens_per_s)
        return f"beside {twin.title} it is {_beside(judged, pick, twin)[1]}."
    draft = " with its draft" if pick.subject.draft else ""
    return (
        f"a dense {pick.subject.precision} export for {pick.subject.engine}{draft} would tell what "
        "sparsity is worth."
    )


def _of(option: Option, name: str) -> str:
    return str(getattr(option.subject, name))


def _beside(judged: Judged, one: Option, other: Option) -> tuple[stats.Verdict, str]:
    """Whether `one` is faster than `other`, and how much, by the rounds that timed both."""
    names = (one.subject.name, other.subject.name)
    for known in judged.comparisons:
        if (known.candidate, known.baseline) == names:
            return known.verdict, known.text
        if (known.baseline, known.candidate) == names and known.low > 0:
            turned = stats.Ratio(1 / known.ratio, 1 / known.high, 1 / known.low, known.pairs)
            return turned.verdict, stats.describe(turned)
    now, then = paired(one.subject, other.subject, judged.timed)
    if not now:
        return "inconclusive", "inconclusive (no round timed both)"
    ratio = stats.compare(now, then)
    return ratio.verdict, stats.describe(ratio)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
