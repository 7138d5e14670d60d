"""The learning curve of a fine-tuning as an SVG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from owl_deploy.manifest import Step
from owl_deploy.picture import ACCENT, FAINT, PAGE, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve_svg(curve: Sequence[Step], on_page: bool = False) -> str:
    """Training and held-out loss over the steps.

    `on_page`: to be set into HTML (see `picture.svg`), not for a file of its own.
    """

    def draw(axes: "Axes") -> None:
        trained = [(row.step, row.loss) for row in curve if row.loss is not None]
        held_out = [(row.step, row.eval_loss) for row in curve if row.eval_loss is not None]
        for points, color, mark, label in (
            (trained, FAINT, "", "training loss of each step"),
            (held_out, ACCENT, "o", "cross-entropy of held-out text"),
        ):
            axes.plot(*zip(*points, strict=True), color=color, marker=mark, label=label)
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        axes.legend(loc="best")

    return svg(draw, page=PAGE if on_page else None)
