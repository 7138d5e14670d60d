"""The one writer of SVG: pictures in an output folder, and on a page that has inks of its own."""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes

T = TypeVar("T", bound=Hashable)

INK, FAINT, ACCENT = "#101113", "#a1a2a3", "#0b5394"
PAGE = {INK: "ink", FAINT: "faint", ACCENT: "accent"}  # the variables of a page's style sheet
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "owl",  # the same picture gives the same bytes
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a name is no formula ($x$)
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.4,
    "legend.frameon": False,
}


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """Matplotlib in our style; its remarks on fonts and caches are dropped."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    import matplotlib as mpl

    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def svg(
    draw: Callable[[Any], None],
    size: tuple[float, float] = (7.2, 3.6),
    grid: tuple[int, int] | None = None,
    page: Mapping[str, str] | None = None,
) -> str:
    """The SVG of what `draw` puts on the axes (rows of them for a `grid`).

    `size` is in inches. With `page`, a style sheet's variable for each colour, the picture is to be
    set into HTML: without a background, without a size, in the page's inks, light or dark.
    """
    with _drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots(*grid, squeeze=False) if grid else figure.subplots())
        out = io.StringIO()
        nothing = {"Date": None, "Creator": None}
        figure.savefig(out, format="svg", transparent=page is not None, metadata=nothing)
    text = out.getvalue()
    if page is None:
        return text
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    for color, name in page.items():
        rest = rest.replace(color, f"var(--{name})")
    return f"{head}>{rest}"


def plain_log_scale(axes: "Axes") -> None:
    """A logarithmic y axis with numbers as they are: powers of ten would be formulas."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def sparsity_by_block(
    sparsities: Sequence[float],
    outlier_ratios: Sequence[float | None],
    beside: tuple[str, float] | None = None,
    **how: Any,  # noqa: ANN401 - `svg` has their types
) -> str:
    """The paper's picture: each block's sparsity, a share, over the outliers (%) that decided it.

    `beside`: the allocation's name and the model's sparsity, which then is a line of its own.
    `how` goes to `svg`.
    """

    def draw(axes: "Axes") -> None:
        numbers = range(len(sparsities))
        known = [(x, ratio) for x, ratio in enumerate(outlier_ratios) if ratio is not None]
        if known:
            ratios = axes.twinx()
            ratios.spines["right"].set_visible(True)
            places, heights = zip(*known, strict=True)
            ratios.bar(places, heights, color=FAINT, alpha=0.45)
            ratios.set_ylabel("outlier ratio, % of weights (bars)")
            axes.set_zorder(ratios.get_zorder() + 1)
            axes.patch.set_visible(False)
        percent = [100 * one for one in sparsities]
        (line,) = axes.step(numbers, percent, where="mid", color=ACCENT, linewidth=2)
        if beside:
            line.set_label(beside[0])
            whole = 100 * beside[1]
            label = f"uniform, {whole:.1f} %"
            axes.axhline(whole, color=INK, linewidth=1, linestyle="--", label=label)
            axes.legend(loc="best")
        axes.set_xlabel("block")
        axes.set_ylabel("sparsity, % (line)")

    return svg(draw, **how)


def formats_by_linear(
    blocks: Sequence[Mapping[str, tuple[int, float]]],
    **how: Any,  # noqa: ANN401 - `svg` has their types
) -> str:
    """The format of every Linear over the model; the more bits are left of a weight, the darker.

    `blocks`: the bits and the sparsity, a share, of each block's Linears by name. `how` goes to
    `svg`.
    """
    left = {kind: kind[0] * (1 - kind[1]) for block in blocks for kind in block.values()}
    removed = {kind: f", {kind[1]:.0%} removed" if kind[1] else "" for kind in left}
    darkest_first = sorted(left, key=lambda kind: -left[kind])
    shades = {
        kind: _Shade(left[kind] / 8, f"{kind[0]} bits{removed[kind]}") for kind in darkest_first
    }
    return svg(lambda axes: _cells(axes, blocks, shades), **how)


def sparsity_by_linear(
    blocks: Sequence[Mapping[str, float]],
    **how: Any,  # noqa: ANN401 - `svg` has their types
) -> str:
    """The sparsity of every Linear over the model; the more is left of it, the darker.

    `blocks`: that of each block's Linears by name, a share. `how` goes to `svg`.
    """
    every = sorted({one for block in blocks for one in block.values()})
    least, range_of = every[0], every[-1] - every[0]
    named = {every[0], every[len(every) // 2], every[-1]}
    shades = {
        one: _Shade(
            1 - 0.9 * (one - least) / (range_of or 1.0),
            f"{one:.0%} removed" if one in named else None,
        )
        for one in every
    }
    return svg(lambda axes: _cells(axes, blocks, shades), **how)


@dataclass(frozen=True)
class _Shade:
    """How dark a cell is, a share, and what the legend calls that, if anything."""

    alpha: float
    label: str | None


def _cells(axes: "Axes", blocks: Sequence[Mapping[str, T]], shades: Mapping[T, _Shade]) -> None:
    """A cell for every Linear of a model, blocks across, in the shade of what it is."""
    names = list(dict.fromkeys(name for block in blocks for name in block))
    for kind, shade in shades.items():
        cells = [
            (x, names.index(name) - 0.45)
            for x, block in enumerate(blocks)
            for name, one in block.items()
            if one == kind
        ]
        across, down = zip(*cells, strict=True)
        look: Any = {"color": ACCENT, "alpha": shade.alpha, "label": shade.label}
        axes.bar(across, 0.9, width=0.9, bottom=down, **look)
    axes.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("block")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
