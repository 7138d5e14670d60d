"""The learning curve of a fine-tuning as an SVG."""

import io
from typing import Any


def learning_curve_svg(curve: list[dict[str, Any]]) -> str:
    """Training and held-out loss over the steps; rows as `train.train` gives them."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    trained = [row for row in curve if "loss" in row]
    held_out = [row for row in curve if "eval_loss" in row]
    # Text stays text, and the same curve gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "owl", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
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
        axes.legend(loc="best", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
