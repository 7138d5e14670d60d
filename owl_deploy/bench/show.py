"""A result as text for a terminal of 80 columns."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from owl_deploy.bench import decision, stats
from owl_deploy.bench.gate import Verdict, overall
from owl_deploy.bench.result import Against, Comparison, Result, Subject, metrics_of
from owl_deploy.bench.run import Outcome
from owl_deploy.bench.scenario import Metric
from owl_deploy.utils.progress import result_console

WIDTH = 80
_AGAINST = {"same engine": "same engine", "best of the precision": "best of its precision"}


def show(
    result: Result,
    console: Console | None = None,
    max_loss: float | None = None,
    quality_metric: str | None = None,
) -> None:
    """Print a result: what to deploy, a table for each scenario, the speed-ups, memory, notes."""
    console = console or result_console(WIDTH)
    judged = decision.judge(result, quality_metric)
    console.print(decision.sentence(judged, max_loss))
    for metric in metrics_of(result.scenarios):
        console.print(_speed(result, metric))
        if result.comparisons:
            console.print(_speedups(result, metric))
    console.print(_cost(result))
    for failure in result.failures:
        console.print(f"Failed: {failure}")
    for note in result.notes:
        console.print(f"Note: {note}")
    intervals = stats.interval_words(one.pairs for one in result.comparisons)
    compared = f"speed-ups with their {intervals}; " if result.comparisons else ""
    console.print(
        f"{result.machine.name}, {result.threads} threads, {result.pairs} rounds in fresh "
        f"processes; spread: that of the middle half of them; {compared}perplexity as `owl eval` "
        f"recorded it; a plain read of memory reaches {result.read_gb_per_s:.0f} GB/s."
    )


def show_outcome(
    outcome: Outcome, max_loss: float | None = None, quality_metric: str | None = None
) -> None:
    """Print what a run came to."""
    if outcome.result is not None:
        show(outcome.result, max_loss=max_loss, quality_metric=quality_metric)
    if outcome.verdicts is not None:
        show_verdicts(outcome.verdicts)


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Print a gate's verdicts, and the one of the run."""
    console = result_console(WIDTH)
    table = Table(box=None, pad_edge=False)
    for column in ("metric", "verdict", "why"):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        table.add_row(verdict.metric, verdict.word, verdict.why)
    console.print(table)
    console.print(f"Overall: {overall(verdicts)}")


def show_trade_off(rows: Sequence[dict[str, Any]], report: Path) -> None:
    """Print a sweep's rows; a star marks what no other deployment beats in both."""
    console = result_console(WIDTH)
    table = _table("", "", "deployment", "engine", "zeros", "ppl", "tok/s")
    for row in rows:
        zeros = "" if row["zeros"] is None else f"{row['zeros']:.0%}"
        mark = "*" if row["pareto"] else ""
        figures = (_digits(row["perplexity"]), _digits(row["tokens_per_s"]))
        table.add_row(mark, row["deployment"], row["engine"], zeros, *figures)
    console.print(table)
    console.print("* nothing is both faster and better.")
    console.print(f"The whole of it: {report}", soft_wrap=True)


def headline(result: Result) -> list[str]:
    """One sentence for each candidate and scenario, against the best baseline of all.

    With what it costs in perplexity, where that is known.
    """
    found = [c for c in result.comparisons if "best of all" in c.against]
    return [_sentence(result, c) + _price(result, c) for c in found]


def _sentence(result: Result, c: Comparison) -> str:
    baseline = {subject.name: subject for subject in result.subjects}[c.baseline]
    kind = f"{baseline.engine} {baseline.precision}"
    best = _kind(baseline)
    return f"{c.candidate}, {c.scenario}: {c.text} against {c.baseline} ({kind}), the best {best}."


def _kind(baseline: Subject) -> str:
    """What a baseline is to be called."""
    return "baseline" if baseline.is_sparse else "dense"


def _price(result: Result, c: Comparison) -> str:
    known = {subject.name: subject for subject in result.subjects}
    now, other = known[c.candidate], known[c.baseline]
    unlike = len({now.perplexity_on, other.perplexity_on} - {""}) > 1
    if now.perplexity is None or other.perplexity is None or unlike or now.path == other.path:
        return ""
    whose = "the baseline's" if other.is_sparse else "the dense one's"
    return f" Its perplexity is {_digits(now.perplexity)}, {whose} {_digits(other.perplexity)}."


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in columns:
        left = column in ("deployment", "engine", "type", "against", "speed-up")
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    return table


def _speed(result: Result, metric: Metric) -> Table:
    columns = ("deployment", "engine", "type", "zeros", "ppl", "ms", "spread", "p99", "tok/s")
    table = _table(f"\n{metric.title}", *columns)
    table.collapse_padding = True  # nine columns leave names no more room than they need
    for subject in result.subjects:
        row = result.statistics.get(metric.key, {}).get(subject.name)
        if row is None:
            table.add_row(*_identity(subject), "failed" if subject.failures else "", "", "", "")
            continue
        table.add_row(
            *_identity(subject),
            _digits(row["median_ms"]),
            f"{row['spread']:.0%}",
            _digits(row["p99_ms"]),
            "" if (rate := metric.rate(row)) is None else _digits(rate),
        )
    return table


def _identity(subject: Subject) -> tuple[str, ...]:
    zeros = "" if subject.zeros is None else f"{subject.zeros:.0%}"
    perplexity = "" if subject.perplexity is None else _digits(subject.perplexity)
    return subject.name, subject.engine, subject.precision, zeros, perplexity


def _speedups(result: Result, metric: Metric) -> Table:
    table = _table("", "deployment", "speed-up", "against")
    known = {subject.name: subject for subject in result.subjects}
    for comparison in result.comparisons:
        if comparison.scenario == metric.key:
            best = f"best {_kind(known[comparison.baseline])}"
            which = ", ".join(_AGAINST.get(kind, best) for kind in _distinct(comparison.against))
            against = f"{comparison.baseline} ({which})"
            table.add_row(comparison.candidate, comparison.text, against)
    return table


def _distinct(against: tuple[Against, ...]) -> list[Against]:
    """What there is to say: the best of all is the best of its precision too."""
    implied = "best of all" in against
    return [kind for kind in against if not (implied and kind == "best of the precision")]


def _cost(result: Result) -> Table:
    table = _table(
        "\nmemory and size", "deployment", "engine", "file MB", "peak MB", "load s", "roof"
    )
    for subject in result.subjects:
        if subject.samples:
            table.add_row(
                subject.name,
                subject.engine,
                f"{subject.size_bytes / 1e6:.0f}",
                f"{subject.peak_bytes / 1e6:.0f}",
                f"{subject.load_s:.2f}",
                _roofline(result, subject),
            )
    return table


def _roofline(result: Result, subject: Subject) -> str:
    """The share of a plain read's speed that the first decoding scenario reads the file at."""
    for rows in result.statistics.values():
        if "roofline" in rows.get(subject.name, {}):
            return f"{rows[subject.name]['roofline']:.0%}"
    return ""


def _digits(value: float) -> str:
    """Three digits that mean something, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
