"""A checkpoint's picture: the sparsity of each block."""

from owl_deploy.manifest import CheckpointManifest
from owl_deploy.picture import sparsity_by_block


def sparsity_svg(manifest: CheckpointManifest) -> str:
    """The block sparsities of a checkpoint's manifest, beside uniform, over its outlier ratios."""
    return sparsity_by_block(
        [block.sparsity for block in manifest.blocks],
        [block.outlier_ratio for block in manifest.blocks],
        (manifest.settings.allocation, manifest.sparsity.asked),
        [[one.sparsity for one in block.linears.values()] for block in manifest.blocks],
    )
