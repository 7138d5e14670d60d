"""The paper's picture as an SVG: each block's sparsity over the outliers that decided it."""

from typing import TYPE_CHECKING

from owl_deploy.manifest import CheckpointManifest
from owl_deploy.picture import svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def sparsity_svg(manifest: CheckpointManifest) -> str:
    """The layer sparsities of a checkpoint's manifest, beside uniform, over its outlier ratios."""
    return svg(lambda axes: _draw(axes, manifest))


def _draw(axes: "Axes", manifest: CheckpointManifest) -> None:
    blocks = manifest.blocks
    numbers = range(len(blocks))
    outliers = [block.outlier_ratio for block in blocks if block.outlier_ratio is not None]
    if outliers:
        ratios = axes.twinx()
        ratios.bar(numbers, outliers, color="#c9d6e2", width=0.8)
        ratios.set_ylabel("outlier ratio, % of weights (bars)")
        axes.set_zorder(ratios.get_zorder() + 1)
        axes.patch.set_visible(False)
    allocation = manifest.settings.allocation
    sparsities = [100 * block.sparsity for block in blocks]
    axes.step(numbers, sparsities, where="mid", color="#0b5394", label=allocation, linewidth=2)
    for number, block in enumerate(blocks):
        each = {100 * linear.sparsity for linear in block.linears.values()}
        if len(each) > 1:
            axes.plot([number] * len(each), list(each), "o", color="#0b5394", markersize=3)
    whole = 100 * manifest.sparsity.asked
    axes.axhline(whole, color="#7f6000", linestyle="--", label=f"uniform, {whole:.1f} %")
    axes.set_xlabel("block")
    axes.set_ylabel("sparsity, %")
