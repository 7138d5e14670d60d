"""A checkpoint's picture: the sparsity of each block."""

from typing import Any

from owl_deploy.picture import sparsity_by_block


def sparsity_svg(manifest: dict[str, Any]) -> str:
    """The block sparsities of a checkpoint's manifest, beside uniform, over its outlier ratios."""
    return sparsity_by_block(
        [block["sparsity"] for block in manifest["blocks"]],
        [block["outlier_ratio"] for block in manifest["blocks"]],
        (manifest["settings"]["allocation"], manifest["sparsity"]["asked"]),
    )
