"""The pictures that a verb leaves in its output folder, as SVG."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@contextlib.contextmanager
def drawing(style: Any) -> Iterator[None]:  # noqa: ANN401 - rcParams have a type for each
    """Matplotlib in `style`. A name is no formula ($x$); remarks on fonts are dropped."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of its caches, as it is imported too
    import matplotlib as mpl

    with mpl.rc_context({**style, "text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def svg(draw: Callable[["Axes"], None]) -> str:
    """The SVG of what `draw` puts on the axes: text stays text, and the same gives the same bytes.

    Its legend goes where there is room.
    """
    with drawing({"svg.fonttype": "none", "svg.hashsalt": "owl", "font.size": 10}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.legend(loc="best", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
