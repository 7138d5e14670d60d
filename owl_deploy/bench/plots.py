"""The report's pictures, as SVG that a page can restyle: text stays text, ink follows the page."""

import itertools
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from owl_deploy.bench import stats
from owl_deploy.bench.decision import Judged
from owl_deploy.bench.result import Comparison, Result, Subject
from owl_deploy.inference.registry import ENGINES, Ink
from owl_deploy.utils.picture import (
    ACCENT,
    FAINT,
    INK,
    PAGE,
    plain_log_scale,
    sparsity_by_block,
    svg,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDE = 40  # characters of a label beside the axes; more leave no room for these
_UNKNOWN = Ink(INK, INK, "x")  # an engine that this version of owl does not have


def _page() -> dict[str, str]:
    """The page's variable for each colour: the engines' that there are now, too."""
    return {**PAGE, **{engine.ink.light: engine.variable for engine in ENGINES.values()}}


def _ink(engine: str) -> Ink:
    return ENGINES[engine].ink if engine in ENGINES else _UNKNOWN


def _draw(draw: Callable[..., None], height: float, *arguments: Any) -> str:  # noqa: ANN401
    """The SVG, for the report, that `draw(axes, *arguments)` gives."""
    return svg(lambda axes: draw(axes, *arguments), (6.4, height), page=_page())


def _errors(rows: Sequence[Comparison]) -> list[list[float]]:
    """How far the intervals reach below and above the ratios."""
    below = [max(0.0, row.ratio - row.low) for row in rows]
    return [below, [max(0.0, row.high - row.ratio) for row in rows]]


def _without_shared_folders(names: Iterable[str]) -> dict[str, str]:
    """Each of the names, of those that are paths without the folders that all of them begin with.

    Deployments whose folders are called alike are told apart by their paths.
    """
    names = list(names)
    folders = [name.split("/")[:-1] for name in names if "/" in name]
    alike = (len(set(level)) == 1 for level in zip(*folders, strict=False))
    shared = sum(itertools.takewhile(bool, alike))
    return {name: "/".join(name.split("/")[shared:]) if "/" in name else name for name in names}


def _pair(candidate: str, baseline: str) -> str:
    """The label of a comparison, in lines that are no wider than there is room for."""
    if len(candidate) + len(baseline) + 3 <= _WIDE:
        return f"{candidate} / {baseline}"
    return f"{_wrapped(candidate)}\n/ {_wrapped(baseline)}"


def _wrapped(name: str) -> str:
    return textwrap.fill(name, _WIDE - 2, break_on_hyphens=False)  # "/ " may stand before it


def _row_height(labels: Sequence[str], least: float) -> float:
    """The inches that each of some rows needs for its label."""
    return max([least, *(0.1 + 0.17 * len(label.splitlines()) for label in labels)])


def speedups(result: Result, key: str) -> str:
    """Each comparison of a metric as a point with its interval; 1 is a line."""
    rows = [comparison for comparison in result.comparisons if comparison.scenario == key]
    short = _without_shared_folders(subject.name for subject in result.subjects)
    labels = [_pair(short[row.candidate], short[row.baseline]) for row in rows]
    height = 0.9 + _row_height(labels, 0.34) * len(rows)
    return _draw(_speedups, height, result, rows, labels)


def _speedups(
    axes: "Axes", result: Result, rows: Sequence[Comparison], labels: Sequence[str]
) -> None:
    engines = {subject.name: subject.engine for subject in result.subjects}
    for place, row in enumerate(reversed(rows)):
        ink = _ink(engines[row.candidate])
        axes.errorbar(
            row.ratio,
            place,
            xerr=_errors([row]),
            fmt=ink.marker,
            color=ink.light,
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), labels[::-1])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axvline(1, color=INK, linewidth=1)
    axes.grid(axis="x")
    intervals = stats.interval_words(row.pairs for row in rows)
    axes.set_xlabel(f"times as fast, {intervals}\n(right of 1: faster)")


def by_sparsity(result: Result, key: str) -> str:
    """Speed-up over dense in the same engine, against the share of zeros, a line an engine."""
    return _draw(_by_sparsity, 3.4, result, key)


def _by_sparsity(axes: "Axes", result: Result, key: str) -> None:
    subjects = {subject.name: subject for subject in result.subjects}
    rows = [c for c in result.comparisons if c.scenario == key and "same engine" in c.against]
    rows.sort(key=lambda row: subjects[row.candidate].zeros or 0.0)
    for engine in dict.fromkeys(subjects[row.candidate].engine for row in rows):
        own = [row for row in rows if subjects[row.candidate].engine == engine]
        axes.errorbar(
            [100 * (subjects[row.candidate].zeros or 0.0) for row in own],
            [row.ratio for row in own],
            yerr=_errors(own),
            fmt=_ink(engine).marker + "-",
            color=_ink(engine).light,
            capsize=3,
            label=engine,
        )
    axes.axhline(1, color=INK, linewidth=1)
    axes.grid(axis="y")
    axes.set_xlabel("zeros in the weights, %")
    axes.set_ylabel("times as fast as dense")
    axes.legend()


def trade_off(judged: Judged) -> str:
    """Quality against tokens/s; what nothing else beats in both is joined by a line."""
    return _draw(_trade_off, 4.0, judged)


def _trade_off(axes: "Axes", judged: Judged) -> None:
    scale = 100 if judged.by_task else 1
    points = [(option.tokens_per_s, scale * option.value) for option in judged.options]
    front = [place for place, option in enumerate(judged.options) if option.on_front]
    front.sort(key=lambda place: points[place])
    axes.step(*zip(*(points[place] for place in front), strict=True), color=FAINT, linewidth=1)
    seen: set[str] = set()
    largest = max(option.subject.size_bytes for option in judged.options)
    for option, (speed, value) in zip(judged.options, points, strict=True):
        subject, ink = option.subject, _ink(option.subject.engine)
        axes.errorbar(
            speed,
            value,
            yerr=scale * option.stderr if option.stderr else None,
            fmt=ink.marker,
            color=ink.light,
            ecolor=ink.light,
            elinewidth=1,
            markersize=4 + 8 * (subject.size_bytes / max(largest, 1)) ** 0.5,  # area: the bytes
            markerfacecolor=ink.light if subject.is_sparse else "none",
            label="" if subject.engine in seen else subject.engine,
        )
        seen.add(subject.engine)
    _name_axes(axes, judged, [value for _, value in points])
    first = [*front, *(place for place in range(len(points)) if place not in front)]
    _label(axes, [(judged.options[place].subject.name, points[place]) for place in first])


def _name_axes(axes: "Axes", judged: Judged, values: Sequence[float]) -> None:
    if not judged.by_task and max(values) > 4 * min(values):
        plain_log_scale(axes)
    axes.margins(x=0.18, y=0.1)
    axes.grid()
    axes.set_xlabel("tokens/s (more is better)")
    axes.set_ylabel(
        f"{judged.metric}, % of {judged.documents} (more is better)"
        if judged.by_task
        else "perplexity (less is better)"
    )
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    figure.legend(loc="outside upper center", ncols=4, fontsize=8)


def _label(axes: "Axes", names: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Name the points, each where no earlier name is; one without room stays without a name.

    The table below the picture has them all.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.transforms import Bbox

    canvas: Any = FigureCanvasAgg(axes.figure.get_figure(root=True))
    canvas.draw()  # places the axes, which decides where the points are
    centres = [axes.transData.transform(point) for _, point in names]
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in centres]  # the markers
    for name, point in names:
        for right, up in ((6, 5), (-6, 5), (6, -12), (-6, -12), (-6, 16), (-6, -24)):
            text = axes.annotate(
                name,
                point,
                (right, up),
                textcoords="offset points",
                fontsize=8,
                horizontalalignment="left" if right > 0 else "right",
            )
            box = text.get_window_extent(canvas.get_renderer())
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            text.remove()


def blocks(subject: Subject) -> str:
    """Sparsity by block, over the outlier ratio that decided it."""
    return sparsity_by_block(
        [block.sparsity for block in subject.blocks],
        [block.outlier_ratio for block in subject.blocks],
        size=(6.4, 3.0),
        page=_page(),
    )


def costs(result: Result) -> str:
    """Peak memory and file size of each subject, as bars."""
    rows = [subject for subject in result.subjects if subject.samples]
    short = _without_shared_folders(subject.name for subject in rows)
    labels = [_wrapped(short[subject.name]) for subject in rows]
    return _draw(_costs, 0.9 + _row_height(labels, 0.42) * len(rows), rows, labels)


def _costs(axes: "Axes", rows: Sequence[Subject], labels: Sequence[str]) -> None:
    places = list(range(len(rows)))[::-1]
    peaks = [subject.peak_bytes / 1e6 for subject in rows]
    sizes = [subject.size_bytes / 1e6 for subject in rows]
    bars = ((0.2, peaks, ACCENT, "peak memory"), (-0.2, sizes, FAINT, "file"))
    for shift, values, color, label in bars:
        axes.barh([p + shift for p in places], values, 0.38, color=color, label=label)
    axes.set_yticks(places, labels)
    axes.set_xlabel("MB")
    axes.grid(axis="x")
    axes.legend()
