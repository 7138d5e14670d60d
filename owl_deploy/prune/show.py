"""The table that `owl prune` ends with."""

from typing import Any

from rich.console import Console
from rich.table import Table


def show(manifest: dict[str, Any], output: str) -> None:
    """Print a checkpoint's manifest as a table of blocks, and where the checkpoint is."""
    table = Table(title=None, box=None, pad_edge=False)
    for heading in ("block", "outliers %", "sparsity asked", "achieved"):
        table.add_column(heading, justify="left" if heading == "block" else "right")
    for block in manifest["blocks"]:
        ratio = block["outlier_ratio"]
        table.add_row(
            block["name"],
            "" if ratio is None else f"{ratio:.3f}",
            f"{block['sparsity']:.4f}",
            f"{block['achieved']:.4f}",
        )
    whole = manifest["sparsity"]
    table.add_section()
    table.add_row("all blocks", "", f"{whole['asked']:.4f}", f"{whole['achieved']:.4f}")
    console = Console()
    console.print(table)
    console.print(
        f"{output}: {manifest['weights'] / 1e6:.1f} M weights in the blocks, "
        f"{manifest['wall_seconds']:.0f} s, "
        f"peak memory {manifest['peak_memory_bytes'] / 2**30:.1f} GiB.",
        soft_wrap=True,
    )
