"""The table that `owl prune` ends with."""

from collections import Counter

from rich.bar import Bar
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from owl_deploy.compression.picture import has_picture, removes
from owl_deploy.compression.settings import kept, parse_structure
from owl_deploy.models.manifest import Block, CheckpointManifest
from owl_deploy.utils.progress import result_console

_BAR_WIDTH = 20


def show(manifest: CheckpointManifest, output: str) -> None:
    """Print a checkpoint's manifest: its blocks as a table with bars, and where it is."""
    console = result_console()
    if has_picture(manifest):
        console.print(_table(manifest) if removes(manifest) else _formats(manifest))
    _show_reconstruction(console, manifest)
    console.print(
        f"{output}: {manifest.weights / 1e6:.1f} M weights {_rounded(manifest)}in the blocks, "
        f"{manifest.wall_seconds:.0f} s, "
        f"peak memory {decimal(manifest.peak_memory_bytes)}."
        + (" The picture is in sparsity.svg." if has_picture(manifest) else ""),
        soft_wrap=True,
    )
    _show_structure(console, manifest)


def _table(manifest: CheckpointManifest) -> Table:
    """The blocks, with what there is to say of any, then all of them together, and the head."""
    whole, blocks = manifest.sparsity, manifest.blocks
    found = {
        "outliers %": [
            "" if block.outlier_ratio is None else f"{block.outlier_ratio:.3f}" for block in blocks
        ],
        "asked": [f"{block.sparsity:.4f}" for block in blocks],
        "achieved": [f"{block.achieved:.4f}" for block in blocks],
        "its Linears": [_range(block) for block in blocks],
        "bits": [_bits(block) if manifest.spent else "" for block in blocks],
    }
    columns = {heading: cells for heading, cells in found.items() if any(cells)}
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    for heading in columns:
        table.add_column(heading, justify="right")
    table.add_column(f"sparsity (all: {whole.asked:.2f})", width=_BAR_WIDTH)
    for block, cells in zip(blocks, zip(*columns.values(), strict=True), strict=True):
        bar = Bar(1.0, 0.0, block.sparsity, width=_BAR_WIDTH, color="blue")
        table.add_row(block.name.rpartition(".")[2], *cells, bar)
    table.add_section()
    ends = [("all blocks", whole.asked, whole.achieved)]
    if head := manifest.head:
        rounded = manifest.settings.head_bits or manifest.settings.bits
        name = f"{head.name}, {rounded} bits" if rounded else head.name
        ends.append((name, head.sparsity, head.achieved))
    for name, asked, achieved in ends:
        shares = {"asked": f"{asked:.4f}", "achieved": f"{achieved:.4f}"}
        table.add_row(name, *(shares.get(heading, "") for heading in columns))
    return table


def _formats(manifest: CheckpointManifest) -> Table:
    """The bits of each block, where a budget chose them."""
    table = Table(box=None, pad_edge=False)
    table.add_column("block")
    table.add_column("bits", justify="right")
    for block in manifest.blocks:
        table.add_row(block.name.rpartition(".")[2], _bits(block))
    return table


def _range(block: Block) -> str:
    """The least and the most that was asked of a block's Linears, unless all are asked the same."""
    asked = [linear.sparsity for linear in block.linears.values()]
    return f"{min(asked):.2f} to {max(asked):.2f}" if len(set(asked)) > 1 else ""


def _bits(block: Block) -> str:
    """How many of a block's weights have so many bits, such as "4: 80 %, 8: 20 %"."""
    sizes: Counter[int] = Counter()
    for linear in block.linears.values():
        sizes[linear.bits or 0] += linear.weights
    shares = {bits: size / sum(sizes.values()) for bits, size in sorted(sizes.items())}
    return ", ".join(f"{bits}: {share:.0%}" for bits, share in shares.items())


def _rounded(manifest: CheckpointManifest) -> str:
    """What the weights were rounded to, as a part of a sentence."""
    settings, spent = manifest.settings, manifest.spent
    if spent is not None:
        speed = f"{spent.speed_up:.2f}x dense int8's speed, " if spent.speed_up else ""
        each = [one.bits for block in manifest.blocks for one in block.linears.values() if one.bits]
        less = "less than " if settings.asymmetric else ""  # each format was measured without
        return (
            f"of {min(each)} to {max(each)} bits (groups of {settings.bits_group}), "
            f"{spent.bytes / 1e6:.1f} MB or "
            f"{8 * spent.bytes / manifest.weights:.2f} bits a weight packed, {speed}expected to "
            f"lose {less}{spent.loss:.3f} nats a token, "
        )
    return f"of {settings.bits} bits (groups of {settings.bits_group}) " if settings.bits else ""


def _show_reconstruction(console: Console, manifest: CheckpointManifest) -> None:
    halves = [half for block in manifest.blocks for half in block.halves.values()]
    if not halves:
        return
    better = [half for half in halves if half.epochs]
    before, after = (
        sum(getattr(half, when) for half in halves) / len(halves) for when in ("before", "after")
    )
    console.print(
        f"Reconstructed: {len(better)} of {len(halves)} halves, the others put back; their mean "
        f"error on held-out text {before:.4f} before, {after:.4f} after.",
        soft_wrap=True,
    )


def _show_structure(console: Console, manifest: CheckpointManifest) -> None:
    """Say that N differs, for those who want N:M for what runs it."""
    group = parse_structure(manifest.settings.structure)
    if group is None:
        return
    asked = [one.sparsity for block in manifest.blocks for one in block.linears.values()]
    numbers = {kept(sparsity, group[1]) for sparsity in asked if sparsity}
    if len(numbers) > 1:
        console.print(
            f"Note: each Linear has its own N here, {min(numbers)} to {max(numbers)} of "
            f"{group[1]}. --allocation uniform gives {manifest.settings.structure} throughout, as "
            "hardware for it needs.",
            soft_wrap=True,
        )
