"""A checkpoint's picture: the sparsity of each block, or the formats that a budget chose."""

from owl_deploy.manifest import CheckpointManifest
from owl_deploy.picture import formats_by_linear, sparsity_by_block


def sparsity_svg(manifest: CheckpointManifest) -> str:
    """What was asked of a checkpoint's Linears, by its manifest.

    The block sparsities beside uniform, over the outlier ratios; within a budget the bits and the
    sparsity of each Linear.
    """
    if manifest.spent is not None:
        return formats_by_linear(
            [
                {name: (one.bits or 0, one.sparsity) for name, one in block.linears.items()}
                for block in manifest.blocks
            ]
        )
    return sparsity_by_block(
        [block.sparsity for block in manifest.blocks],
        [block.outlier_ratio for block in manifest.blocks],
        (manifest.settings.allocation, manifest.sparsity.asked),
        [[one.sparsity for one in block.linears.values()] for block in manifest.blocks],
    )
