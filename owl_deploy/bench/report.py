"""`owl report`: results as one page that needs nothing else: phone, print, light and dark.

The page is `report.html.j2` with the style sheet `report.css`; here is what they show.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy import __version__
from owl_deploy.bench import decision, plots, stats
from owl_deploy.bench.decision import Judged, Option
from owl_deploy.bench.result import FILE, Result, Subject, metrics_of
from owl_deploy.bench.scenario import Metric
from owl_deploy.bench.show import headline
from owl_deploy.errors import BadInput
from owl_deploy.inference.registry import ENGINES
from owl_deploy.utils.artefact import MANIFEST, check_parent, write_text
from owl_deploy.utils.record import Record

if TYPE_CHECKING:
    from markupsafe import Markup

_Rows = list[tuple[str, ...]]
_GENERATOR = b'<meta name="generator" content="owl-deploy'  # of every page


def write_report(
    results: Sequence[Result],
    path: Path,
    curves: Sequence[tuple[str, str]] = (),
    max_loss: float | None = None,
    quality_metric: str | None = None,
    left: Sequence[Record] = (),
    force: bool = False,
    made_of: Sequence[Path] = (),
) -> None:
    """Write the page for `results` to the file `path`; raises `BadInput` if that cannot be.

    It replaces another of owl's pages; `force`: whatever is there but what it is `made_of`, files
    and folders with the results.

    `curves`: learning curves of fine-tunings, each a caption and an SVG. `max_loss`: the share of
    quality that may go in the choice of what to deploy, and `quality_metric` what quality that is
    (decision.py). `left`: tasks that failed, or were skipped for that.
    """
    check_page(path, force=force)
    read = (*made_of, *(folder / name for folder in made_of for name in (FILE, MANIFEST)))
    if path.resolve() in [one.resolve() for one in read]:
        raise BadInput(f"{path} is what the page is made of.", "Give another -o.")
    page = render(results, curves, max_loss, quality_metric, left)
    try:
        write_text(path, page)
    except OSError as error:
        raise BadInput(f"{path} cannot be written ({error.strerror}).") from error


def check_page(
    path: Path, *, force: bool = False, way_out: str = "Give another -o, or --force."
) -> None:
    """Raise `BadInput` where no page can be written, or a file is there that is none of owl's."""
    check_parent(path)
    try:
        if not force and path.is_file() and _GENERATOR not in path.read_bytes():
            raise BadInput(f"{path} is no page of owl's.", way_out)
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}).") from error


def render(
    results: Sequence[Result],
    curves: Sequence[tuple[str, str]] = (),
    max_loss: float | None = None,
    quality_metric: str | None = None,
    left: Sequence[Record] = (),
) -> str:
    """The page, as HTML; the arguments as in `write_report`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    pages.filters["labelled"] = _labelled
    inks = {
        shade: " ".join(f"--{e.variable}: {getattr(e.ink, shade)};" for e in ENGINES.values())
        for shade in ("light", "dark")
    }
    return pages.get_template("report.html.j2").render(
        pages=[_page(result, max_loss, quality_metric) for result in results],
        curves=curves,
        left=[(one.title, one.state, one.said) for one in left],
        plots=plots,
        inks=inks,
        version=__version__,
    )


def _labelled(svg: str, label: str) -> "Markup":
    """A picture of ours, as HTML, with words for those who cannot see it."""
    from markupsafe import Markup

    mark = Markup('<svg role="img" aria-label="{}"').format(label)
    return Markup(svg.replace("<svg", mark, 1))  # our own drawing, whose text is escaped


def _page(result: Result, max_loss: float | None, quality_metric: str | None) -> dict[str, Any]:
    """What the template shows of a result."""
    judged = decision.judge(result, quality_metric)
    metrics = metrics_of(result.scenarios)
    return {
        "result": result,
        "decision": decision.sentence(judged, max_loss),
        "headline": headline(result),
        "first": metrics[0].key,
        "metrics": [_metric(result, metric) for metric in metrics],
        "judged": judged,
        "quality": [_quality(judged, option) for option in judged.options],
        "pruned": [_by_block(subject) for subject in _pruned(result)],
        "interval": stats.interval_words(one.pairs for one in result.comparisons),
        "costs": [_cost(subject) for subject in result.subjects if subject.samples],
    }


def _metric(result: Result, metric: Metric) -> dict[str, Any]:
    found = [c for c in result.comparisons if c.scenario == metric.key]
    zeros = {s.name: s.zeros for s in result.subjects}
    own = [zeros[c.candidate] for c in found if "same engine" in c.against]
    sparsities = {round(share, 2) for share in own if share is not None}
    speeds = result.statistics.get(metric.key, {})
    return {
        "title": metric.title,
        "key": metric.key,
        "words": "; ".join(f"{c.candidate} over {c.baseline} {c.text}" for c in found),
        "by_sparsity": len(sparsities) > 1,
        "interval": stats.interval_words(one.pairs for one in found),
        "speeds": [_speed(s, metric, speeds[s.name]) for s in result.subjects if s.name in speeds],
        "comparisons": [
            (
                *(c.candidate, c.baseline, ", ".join(c.against)),
                *(f"{c.ratio:.3f}", f"{c.low:.3f} to {c.high:.3f}", c.text),
            )
            for c in found
        ],
    }


def _speed(subject: Subject, metric: Metric, row: dict[str, float]) -> tuple[str, ...]:
    rate = metric.rate(row)
    return (
        *(subject.name, subject.engine, subject.precision),
        *(f"{row[key]:.2f}" for key in ("median_ms", "p90_ms", "p99_ms")),
        *(f"{row['spread']:.1%}", "" if rate is None else f"{rate:.1f}"),
        f"{row['roofline']:.0%}" if "roofline" in row else "",
    )


def _quality(judged: Judged, option: Option) -> tuple[str, ...]:
    subject = option.subject
    perplexity = "" if subject.perplexity is None else f"{subject.perplexity:.2f}"
    return (
        subject.name,
        "" if subject.zeros is None else f"{subject.zeros:.1%}",
        perplexity,
        *((judged.said(option),) if judged.by_task else ()),
        f"{option.tokens_per_s:.1f}",
        "yes" if option.on_front else "no",
    )


def _pruned(result: Result) -> Iterator[Subject]:
    """One subject for each pruned checkpoint, which may be exported for several engines."""
    seen: list[tuple[float, ...]] = [()]
    for subject in result.subjects:
        shape = tuple(block.sparsity for block in subject.blocks)
        if shape not in seen:
            seen.append(shape)
            yield subject


def _by_block(subject: Subject) -> dict[str, Any]:
    """What is shown of a pruned model's blocks; outlier ratios where the allocation took any."""

    def ratio(of: float | None) -> str:
        return "" if of is None else f"{of:.3f}"

    ratios = any(block.outlier_ratio is not None for block in subject.blocks)
    return {
        "subject": subject,
        "caption": ": sparsity of each block" + (", and its outlier ratio." if ratios else "."),
        "columns": ["block", "sparsity", *(["outlier ratio, %"] if ratios else [])],
        "rows": [
            (b.name, f"{b.sparsity:.4f}", *([ratio(b.outlier_ratio)] if ratios else []))
            for b in subject.blocks
        ],
    }


def _cost(subject: Subject) -> tuple[str, ...]:
    return (
        *(subject.name, subject.engine),
        *(f"{subject.size_bytes / 1e6:.1f}", f"{subject.peak_bytes / 1e6:.0f}"),
        *(f"{subject.load_s:.2f}", str(subject.about.get("runtime", ""))),
        str(subject.about.get("through", "")),
    )
