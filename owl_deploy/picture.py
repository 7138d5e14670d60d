"""The pictures that a verb leaves in its output folder, as SVG."""

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def svg(draw: Callable[["Axes"], None]) -> str:
    """The SVG of what `draw` puts on the axes: text stays text, and the same gives the same bytes.

    Its legend goes where there is room.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "owl", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.legend(loc="best", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
