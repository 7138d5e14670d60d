"""The learning curve of a fine-tuning as an SVG."""

from typing import TYPE_CHECKING, Any

from owl_deploy.picture import ACCENT, FAINT, PAGE, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve_svg(curve: list[dict[str, Any]], on_page: bool = False) -> str:
    """Training and held-out loss over the steps; rows as `train.train` gives them.

    `on_page`: to be set into HTML (see `picture.svg`), not for a file of its own.
    """

    def draw(axes: "Axes") -> None:
        for key, color, mark, label in (
            ("loss", FAINT, "", "training loss of each step"),
            ("eval_loss", ACCENT, "o", "cross-entropy of held-out text"),
        ):
            points = [(row["step"], row[key]) for row in curve if key in row]
            axes.plot(
                [step for step, _ in points],
                [loss for _, loss in points],
                color=color,
                marker=mark,
                label=label,
            )
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        axes.legend(loc="best")

    return svg(draw, page=PAGE if on_page else None)
