"""A checkpoint's picture: what each block was asked, or each Linear where they differ."""

from owl_deploy.compression.methods import METHODS
from owl_deploy.models.manifest import CheckpointManifest
from owl_deploy.utils.picture import (
    formats_by_linear,
    sparsity_by_block,
    sparsity_by_linear,
)


def removes(manifest: CheckpointManifest) -> bool:
    """Whether its method is one that removes weights, or is unknown."""
    row = METHODS.get(manifest.settings.method)
    return row is None or row.removes


def has_picture(manifest: CheckpointManifest) -> bool:
    """Whether there is something to draw of its Linears.

    Those that are only rounded alike have zeros that nobody asked for, and differ in nothing else.
    """
    return removes(manifest) or manifest.spent is not None


def sparsity_svg(manifest: CheckpointManifest) -> str:
    """What was asked of a checkpoint's Linears, by its manifest.

    Within a budget the bits and the sparsity of each; where those of a block differ their
    sparsities; else the block's beside uniform, over the outlier ratio that decided it.
    """
    linears = [block.linears for block in manifest.blocks]
    if manifest.spent is not None:
        formats = [
            {name: (one.bits or 0, one.sparsity) for name, one in own.items()} for own in linears
        ]
        return formats_by_linear(formats)
    sparsities = [{name: one.sparsity for name, one in own.items()} for own in linears]
    if any(len(set(own.values())) > 1 for own in sparsities):
        return sparsity_by_linear(sparsities)
    return sparsity_by_block(
        [block.sparsity for block in manifest.blocks],
        [block.outlier_ratio for block in manifest.blocks],
        (manifest.settings.allocation, manifest.sparsity.asked),
    )
