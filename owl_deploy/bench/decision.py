"""What to deploy: the fastest of a benchmark that loses no more quality than may go.

Quality is the logarithm of perplexity, which is the model's mean loss; a loss is its increase over
the best dense baseline's, as a share of that.
"""

import math
from dataclasses import dataclass

from owl_deploy.bench.result import Result, Subject, metrics_of
from owl_deploy.errors import BadInput

NOTHING = 0.005  # less is not noticed: int8 values lose about so much


@dataclass(frozen=True)
class Option:
    """A deployment to choose: tokens/s, and the share of log-perplexity that it loses."""

    name: str
    title: str
    dense: bool
    tokens_per_s: float
    perplexity: float
    loss: float


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


def options(result: Result) -> list[Option]:
    """The deployments whose speed, in the first scenario, and perplexity are both known."""
    key = metrics_of(result.scenarios)[0].key
    speeds = result.statistics.get(key, {})
    known = [s for s in result.subjects if s.name in speeds and s.perplexity]
    dense = [s for s in known if s.role == "baseline"] or known
    if not dense:
        return []
    best = min(float(s.perplexity or 0) for s in dense)
    return [
        Option(
            subject.name,
            _title(subject),
            not subject.is_sparse,
            speeds[subject.name]["tokens_per_s"],
            float(subject.perplexity or 0),
            _loss(float(subject.perplexity or 0), best),
        )
        for subject in known
    ]


def _title(subject: Subject) -> str:
    return f"{subject.name} ({subject.engine}, {subject.precision})"


def _loss(perplexity: float, best: float) -> float:
    """The loss of log-perplexity over that of `best`; a `best` near 1 leaves nothing to share."""
    return (math.log(perplexity) - math.log(best)) / max(math.log(best), 1e-9)


def choose(options: list[Option], max_loss: float | None) -> Option | None:
    """The fastest that loses at most `max_loss` (None: `NOTHING`), if there is one."""
    allowed = NOTHING if max_loss is None else max_loss
    kept = [option for option in options if option.loss <= allowed]
    return max(kept, key=lambda option: option.tokens_per_s, default=None)


def sentence(result: Result, max_loss: float | None = None) -> str:
    """What to deploy on this machine, why, and what sparsity would have to lose less to win."""
    every = options(result)
    pick = choose(every, max_loss)
    if pick is None:
        return (
            "Nothing here says what to deploy: no perplexity is known. `owl eval DEPLOYMENT "
            "--perplexity TEXT` records it."
        )
    allowed = "next to nothing"
    if max_loss is not None:
        allowed = f"at most {_percent(max_loss)} of log-perplexity"
    best = min(option.perplexity for option in every)
    text = (
        f"Deploy {pick.title}: {pick.tokens_per_s:.0f} tokens/s, the fastest here that loses "
        f"{allowed} (perplexity {pick.perplexity:.1f}, the best has {best:.1f})."
    )
    return f"{text} {_sparse(every, pick, NOTHING if max_loss is None else max_loss)}".strip()


def _sparse(every: list[Option], pick: Option, allowed: float) -> str:
    """What is to say of the sparse ones beside the choice."""
    dense = [option for option in every if option.dense and option.loss <= allowed]
    sparse = [option for option in every if not option.dense]
    if not pick.dense:
        best = max((option.tokens_per_s for option in dense), default=0.0)
        gain = f"{pick.tokens_per_s / best:.2f}x the best dense one's speed" if best else ""
        return f"Sparsity pays: it is {gain}." if gain else ""
    faster = [option for option in sparse if option.tokens_per_s > pick.tokens_per_s]
    if not faster:
        return "No sparse one is faster." if sparse else ""
    near = min(faster, key=lambda option: option.loss)
    return (
        f"{near.title} is {near.tokens_per_s / pick.tokens_per_s:.2f}x as fast, but loses "
        f"{_percent(near.loss)} of log-perplexity (it reads {near.perplexity:.1f}); it would be "
        f"the choice if that were {_percent(allowed)} or less."
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"
