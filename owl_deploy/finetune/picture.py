"""The learning curve of a fine-tuning as an SVG."""

from typing import TYPE_CHECKING

from owl_deploy.models.manifest import Finetuning
from owl_deploy.utils.picture import ACCENT, FAINT, INK, PAGE, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def learning_curve_svg(done: Finetuning, on_page: bool = False) -> str:
    """Training and held-out loss over the steps, and the teacher's, where that is known.

    `on_page`: to be set into HTML (see `picture.svg`), not for a file of its own.
    """

    def draw(axes: "Axes") -> None:
        trained = [(row.step, row.loss) for row in done.curve if row.loss is not None]
        held_out = [(row.step, row.eval_loss) for row in done.curve if row.eval_loss is not None]
        mixed = done.teacher is not None  # what is trained on then is not held-out text's measure
        each = "training loss, with the teacher's share" if mixed else "training loss of each step"
        for points, color, mark, label in (
            (trained, FAINT, "", each),
            (held_out, ACCENT, "o", "cross-entropy of held-out text"),
        ):
            axes.plot(*zip(*points, strict=True), color=color, marker=mark, label=label)
        if (teacher := done.held_out_loss.teacher) is not None:
            axes.axhline(teacher, color=INK, linewidth=0.7, linestyle="--", label="the teacher's")
        axes.set_xlabel("step")
        axes.set_ylabel("nats a token")
        # A curve may be anywhere inside of the axes.
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)

    return svg(draw, page=PAGE if on_page else None)
