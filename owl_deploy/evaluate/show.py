"""What `owl eval` found, for a terminal of 80 columns."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from owl_deploy.evaluate.divergence import Divergence
from owl_deploy.evaluate.paired import LossPairs, Pairs
from owl_deploy.evaluate.run import Evaluation
from owl_deploy.evaluate.zero_shot import Metric, means
from owl_deploy.utils.progress import result_console

WIDTH = 80
_CHANCE = 0.05  # what differs with a larger p-value is said to be perhaps by chance


def show(found: Sequence[Evaluation], console: Console | None = None) -> None:
    """Print a line of perplexity for each model, and a table of tasks with a column for each.

    And of each but the first, how much more it loses, how far its predictions are, and which of a
    task's documents it answers otherwise.
    """
    console = console or result_console(WIDTH)
    names = _names([one.model for one in found])
    for name, one in zip(names, found, strict=True):
        if one.perplexity:
            loss = one.perplexity
            console.print(
                f"{name + ': ' if len(found) > 1 else ''}perplexity {loss.value:.4g} on "
                f"{loss.text}: {loss.windows} windows of {loss.window} tokens, {loss.tokens} "
                "predicted",
                soft_wrap=True,
            )
    if any(one.tasks for one in found):
        console.print(_table(names, found))
    for name, one in zip(names[1:], found[1:], strict=True):
        if difference := one.loss_beside(found[0]):
            console.print(f"{name} beside {names[0]}: {_lost(difference)}")
        if apart := one.divergence:
            console.print(f"{name} beside {names[0]}: {_apart(apart)}")
        for task, pairs in one.beside(found[0]).items():
            console.print(f"{name} beside {names[0]}, {task}: {_said(pairs)}")


def _table(names: Sequence[str], found: Sequence[Evaluation]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("task", "documents", "metric"):
        table.add_column(column, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    first = found[0].tasks
    for task, result in first.items():
        for number, metric in enumerate(result.metrics):
            cells = [_cell(one.tasks[task].metrics.get(metric)) for one in found]
            again = number > 0
            table.add_row(
                "" if again else task, "" if again else str(result.documents), metric, *cells
            )
    averages = [means(one.tasks) for one in found]
    for metric in averages[0]:
        tasks = sum(metric in result.metrics for result in first.values())
        cells = [_cell(own.get(metric)) for own in averages]
        table.add_row(f"mean of {tasks}", "", metric, *cells)
    return table


def _lost(loss: LossPairs) -> str:
    chance = ", which may be chance" if loss.may_be_chance else ""
    return (
        f"{loss.difference:+.4f} ± {loss.stderr:.4f} nats a token over the same {loss.windows} "
        f"windows{chance}."
    )


def _apart(found: Divergence) -> str:
    error = "" if found.stderr is None else f" ± {found.stderr:.2g}"
    same = f"{100 * found.same_top:.1f}"
    return f"KL divergence {found.value:.3g}{error}, {same} % of the likeliest tokens the same."


def _said(pairs: Pairs) -> str:
    if not pairs.lost + pairs.won:
        return f"no difference in {pairs.documents} documents."
    chance = ", which may be chance" if pairs.p_value > _CHANCE else ""
    return (
        f"{pairs.lost} of {pairs.documents} lost, {pairs.won} won (exact McNemar test: "
        f"p = {pairs.p_value:.2g}{chance})."
    )


def _cell(metric: Metric | None) -> str:
    if metric is None:
        return ""
    if metric.stderr is None:
        return f"{metric.value:.4g}"
    return f"{metric.value:.4f} ± {metric.stderr:.4f}"


def _names(models: Sequence[str]) -> list[str]:
    """The folders' own names where they tell the models apart, else the whole paths."""
    short = [Path(model).name for model in models]
    return short if len(set(short)) == len(short) else list(models)
