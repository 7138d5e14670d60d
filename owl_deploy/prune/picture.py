"""The paper's picture as an SVG: each block's sparsity over the outliers that decided it."""

from typing import TYPE_CHECKING, Any

from owl_deploy.picture import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sparsity_svg(manifest: dict[str, Any]) -> str:
    """The layer sparsities of a checkpoint's manifest, beside uniform, over its outlier ratios."""
    return svg(lambda axes: _draw(axes, manifest))


def _draw(axes: "Axes", manifest: dict[str, Any]) -> None:
    blocks = manifest["blocks"]
    numbers = range(len(blocks))
    if blocks[0]["outlier_ratio"] is not None:
        ratios = axes.twinx()
        ratios.bar(numbers, [b["outlier_ratio"] for b in blocks], color="#c9d6e2", width=0.8)
        ratios.set_ylabel("outlier ratio, % of weights (bars)")
        axes.set_zorder(ratios.get_zorder() + 1)
        axes.patch.set_visible(False)
    allocation = manifest["settings"]["allocation"]
    sparsities = [100 * block["sparsity"] for block in blocks]
    axes.step(numbers, sparsities, where="mid", color="#0b5394", label=allocation, linewidth=2)
    for number, block in enumerate(blocks):
        each = [100 * linear["sparsity"] for linear in block["linears"].values()]
        if len(set(each)) > 1:
            axes.plot([number] * len(each), each, "o", color="#0b5394", markersize=3)
    whole = 100 * manifest["sparsity"]["asked"]
    axes.axhline(whole, color="#7f6000", linestyle="--", label=f"uniform, {whole:.1f} %")
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity, %")
