"""The learning curve of a fine-tuning as an SVG."""

from typing import TYPE_CHECKING, Any

from owl_deploy.picture import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve_svg(curve: list[dict[str, Any]]) -> str:
    """Training and held-out loss over the steps; rows as `train.train` gives them."""
    return svg(lambda axes: _draw(axes, curve))


def _draw(axes: "Axes", curve: list[dict[str, Any]]) -> None:
    trained = [row for row in curve if "loss" in row]
    held_out = [row for row in curve if "eval_loss" in row]
    axes.plot(
        [row["step"] for row in trained],
        [row["loss"] for row in trained],
        color="#9db4c8",
        label="training loss of each step",
    )
    axes.plot(
        [row["step"] for row in held_out],
        [row["eval_loss"] for row in held_out],
        color="#0b5394",
        marker="o",
        label="cross-entropy of held-out text",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("nats a token")
