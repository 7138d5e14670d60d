"""The paper's picture as an SVG: each block's sparsity over the outliers that decided it."""

import io
from typing import Any


def sparsity_svg(manifest: dict[str, Any]) -> str:
    """The layer sparsities of a checkpoint's manifest, beside uniform, over its outlier ratios."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    blocks = manifest["blocks"]
    numbers = range(len(blocks))
    # Text stays text, and the same manifest gives the same bytes.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "owl", "font.size": 10}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        axes = figure.subplots()
        if blocks[0]["outlier_ratio"] is not None:
            ratios = axes.twinx()
            ratios.bar(numbers, [b["outlier_ratio"] for b in blocks], color="#c9d6e2", width=0.8)
            ratios.set_ylabel("outlier ratio, % of weights (bars)")
            axes.set_zorder(ratios.get_zorder() + 1)
            axes.patch.set_visible(False)
        allocation = manifest["settings"]["allocation"]
        sparsities = [100 * block["sparsity"] for block in blocks]
        axes.step(numbers, sparsities, where="mid", color="#0b5394", label=allocation, linewidth=2)
        whole = 100 * manifest["sparsity"]["asked"]
        axes.axhline(whole, color="#7f6000", linestyle="--", label=f"uniform, {whole:.1f} %")
        axes.set_xlabel("block")
        axes.set_ylabel("sparsity, %")
        axes.legend(loc="best", frameon=False)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()
