"""A checkpoint's picture: the sparsity of each block, or the formats that a budget chose."""

from collections.abc import Sequence

from owl_deploy.manifest import CheckpointManifest
from owl_deploy.picture import formats_by_linear, search_by_time, sparsity_by_block
from owl_deploy.prune.tune import Trial


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


def tuning_svg(trials: Sequence[Trial]) -> str:
    """What a search for an allocation has tried, over the minutes that it took."""
    began = [(one.name, one.divergence) for one in trials if one.seconds == trials[0].seconds]
    best, worst = (choose(began, key=lambda one: one[1]) for choose in (min, max))
    named = dict.fromkeys([best, began[0], worst])  # they would cover each other
    return search_by_time([(one.seconds / 60, one.divergence) for one in trials], list(named))
