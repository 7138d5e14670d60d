"""`owl eval`: several folders side by side, by perplexity, by tasks, or by both."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from owl_deploy.errors import BadInput, option
from owl_deploy.evaluate import zero_shot
from owl_deploy.evaluate.divergence import (
    Divergence,
    First,
    Watched,
    divergence,
    first_predictions,
)
from owl_deploy.evaluate.paired import LossPairs, Pairs, beside, losses_beside
from owl_deploy.evaluate.perplexity import Perplexity, perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.subject import check_subject, is_deployment
from owl_deploy.evaluate.zero_shot import TaskResult
from owl_deploy.inference import threads_for
from owl_deploy.models.manifest import versions
from owl_deploy.utils.progress import error_console
from owl_deploy.utils.ranks import Ranks, join


@dataclass(frozen=True)
class Evaluation:
    """What one folder gave; `tasks` by name. Neither is there where it was not asked for.

    `divergence`: from the first of several, where that was asked for.
    """

    model: str
    perplexity: Perplexity | None
    tasks: dict[str, TaskResult]
    divergence: Divergence | None = None

    def loss_beside(self, reference: "Evaluation") -> LossPairs | None:
        """What its loss differs by from `reference`'s, where both read the same tokens."""
        own, other = self.perplexity, reference.perplexity
        # Models of two tokenizers, or that begin a text otherwise, read other tokens.
        if own is None or other is None or own.token_ids_sha256 != other.token_ids_sha256:
            return None
        return losses_beside(other.losses, own.losses)

    def beside(self, reference: "Evaluation") -> dict[str, Pairs]:
        """By task, which documents it answers otherwise than `reference`, where that is known."""
        found = {
            name: beside(reference.tasks[name].by_document, task.by_document)
            for name, task in self.tasks.items()
        }
        return {name: pairs for name, pairs in found.items() if pairs is not None}

    def told(self) -> str:
        """Its figures in a line; "" where there are none."""
        values = [f"perplexity {self.perplexity.value:.4g}"] if self.perplexity else []
        values += [
            f"{name} {metric} {one.value:.4g}"
            for name, task in self.tasks.items()
            for metric, one in task.metrics.items()
        ]
        return f"{self.model}: {', '.join(values)}." if values else ""

    def to_json(self) -> dict[str, Any]:
        """The folder, the parts of its perplexity, its tasks and their means."""
        tasks = {name: asdict(one) for name, one in self.tasks.items()}
        means = {name: asdict(one) for name, one in zero_shot.means(self.tasks).items()}
        return {
            "model": self.model,
            **(asdict(self.perplexity) if self.perplexity else {}),
            **({"tasks": tasks, "means": means} if tasks else {}),
        }


def evaluate(
    folders: str | Path | Sequence[str | Path], asked: EvaluationSettings
) -> list[Evaluation]:
    """Evaluate each of `folders`, or the one, by what is `asked`; tasks are loaded once for all.

    They are checkpoints and deployments. What came out is kept in a folder that owl wrote, as a
    measurement of it, without an adapter. Raises `BadInput` when nothing is asked for, and for all
    that cannot be read or run.
    """
    if asked.text is None and not asked.tasks:
        raise BadInput("Nothing says what to evaluate by.", "Give --perplexity TEXT or --tasks.")
    folders = [folders] if isinstance(folders, str | Path) else folders
    _check_read(folders, asked)
    ranks = join(versions())
    _refuse_deployments(folders, ranks)
    for folder in folders if len(folders) > 1 else ():
        check_subject(Path(folder), asked)
    asked = replace(asked, threads=threads_for(asked.threads))
    tasks = None
    if asked.tasks:
        tasks = zero_shot.load_tasks(asked.tasks, asked.tasks_path, asked.allow_code)
    found: list[Evaluation] = []
    with first_predictions() if asked.divergence else contextlib.nullcontext() as first:
        for folder in map(Path, folders):
            if len(folders) > 1:
                error_console().print(f"{folder}:", highlight=False)
            with _telling(found):
                one = _by_text(folder, asked, ranks, first)
            with _telling([*found, one]):
                if tasks is not None:
                    results = zero_shot.evaluate_tasks(folder, tasks, asked, ranks)
                    one = replace(one, tasks=results)
            found.append(one)
    return found


def _by_text(
    folder: Path, asked: EvaluationSettings, ranks: Ranks, first: First | None
) -> Evaluation:
    """What the text gives, if there is one, and how far that is from what the `first` predicts."""
    if asked.text is None:
        return Evaluation(str(folder), None, {})
    if first is None:
        return Evaluation(str(folder), perplexity(folder, asked, ranks), {})
    watched = Watched(first)
    loss = perplexity(folder, asked, ranks, watched)
    everyones = [window for part in ranks.gathered(watched.found) for window in part]
    return Evaluation(str(folder), loss, {}, divergence(everyones))


@contextlib.contextmanager
def _telling(found: Sequence[Evaluation]) -> Iterator[None]:
    """Where the block fails, say first what was found before, perhaps in hours."""
    try:
        yield
    except BaseException:  # what interrupts, or fills the memory, loses no more than an error does
        for line in filter(None, (one.told() for one in found)):
            error_console().print(line, highlight=False, soft_wrap=True)
        raise


def to_json(found: Sequence[Evaluation]) -> dict[str, Any]:
    """One evaluation by itself; of several each, the others with what they are beside the first."""
    if len(found) == 1:
        return found[0].to_json()
    records = [one.to_json() for one in found]
    for record, one in zip(records[1:], found[1:], strict=True):
        pairs = one.beside(found[0])
        if pairs:
            told = {name: asdict(pair) | {"p_value": pair.p_value} for name, pair in pairs.items()}
            record["beside_first"] = told
        loss = one.loss_beside(found[0])
        if loss:
            record["loss_beside_first"] = asdict(loss)
        if one.divergence:
            record["divergence_from_first"] = asdict(one.divergence)
    return {"models": records}


def _check_read(folders: Sequence[str | Path], asked: EvaluationSettings) -> None:
    """Raise `BadInput` for what is asked and nothing would read."""
    kinds = [is_deployment(Path(folder)) for folder in folders]
    readers = {
        "--tasks": (bool(asked.tasks), ("limit", "every", "tasks_path", "allow_code")),
        "--perplexity": (asked.text is not None, ("windows", "blockwise", "divergence")),
        "several models": (len(folders) > 1, ("divergence",)),
        "checkpoints": (not all(kinds), ("hardware", "blockwise")),
        "deployments": (any(kinds), ("engine", "threads", "trust_library")),
    }
    usual = {one.name: one.default for one in fields(EvaluationSettings)}
    for reader, (there, names) in readers.items():
        for name in names if not there else ():
            if getattr(asked, name) != usual[name]:
                told = f"{option(name)} is"
                if name == "hardware":
                    told = "--device, --dtype and --batch-size are"
                raise BadInput(f"{told} for {reader}.", "Leave it out.")


def _refuse_deployments(folders: Sequence[str | Path], ranks: Ranks) -> None:
    """Before any work: an engine is one process, which has the machine's cores to itself."""
    for folder in map(Path, folders):
        if ranks.size > 1 and is_deployment(folder):
            raise BadInput(
                f"{folder} is a deployment, which one process evaluates in its engine.",
                "Run owl eval without torchrun.",
            )
