"""The learning curve of a fine-tuning as an SVG."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from owl_deploy.manifest import Step
from owl_deploy.picture import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve_svg(curve: Sequence[Step]) -> str:
    """Training and held-out loss over the steps."""
    return svg(lambda axes: _draw(axes, curve))


def _draw(axes: "Axes", curve: Sequence[Step]) -> None:
    trained = [(row.step, row.loss) for row in curve if row.loss is not None]
    held_out = [(row.step, row.eval_loss) for row in curve if row.eval_loss is not None]
    axes.plot(
        *zip(*trained, strict=True),
        color="#9db4c8",
        label="training loss of each step",
    )
    axes.plot(
        *zip(*held_out, strict=True),
        color="#0b5394",
        marker="o",
        label="cross-entropy of held-out text",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
