"""What `owl export` shows: the step that it is at, and the table that it ends with."""

import contextlib
import time
from collections.abc import Iterator

from rich.table import Table

from owl_deploy.export.source import Progress
from owl_deploy.manifest import DeploymentManifest
from owl_deploy.progress import error_console, result_console


@contextlib.contextmanager
def steps() -> Iterator[Progress]:
    """Show on stderr what is being done: one live line, or without a terminal a line a step.

    A step's name may end with a count in brackets, which alone starts no new line.
    """
    console = error_console()
    started = time.monotonic()
    if console.is_terminal:
        with console.status("") as status:
            yield lambda step: status.update(f"{step} ({time.monotonic() - started:.0f} s)")
        return
    told = ""

    def tell(step: str) -> None:
        nonlocal told
        name = step.split(" (")[0]
        if name != told:
            console.print(f"{time.monotonic() - started:6.1f} s  {name}", highlight=False)
        told = name

    yield tell


def show(manifest: DeploymentManifest, output: str) -> None:
    """Print a deployment's manifest as a table within 80 columns, and where the deployment is."""
    parity = manifest.parity
    table = Table(title=None, box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    table.add_row("target", f"{manifest.target}, {manifest.precision}")
    table.add_row("size", f"{manifest.bytes / 1e6:.1f} MB")
    if manifest.sparsity is not None:
        table.add_row(
            "non-zeros",
            f"{manifest.nonzeros / 1e6:.2f} M of {manifest.total / 1e6:.2f} M linear weights, "
            f"{100 * manifest.sparsity:.1f} % zero",
        )
    table.add_row("context", f"up to {manifest.max_context} tokens")
    for name, run in parity.runs.items():
        shares = {key: share for key, share in run.items() if key.startswith("equal")}
        share = next(iter(shares.values()))
        table.add_row(
            f"parity, {name}",
            f"{run['relative_difference']:.1e} of the largest logit, "
            f"{share * parity.greedy_tokens:.0f}/{parity.greedy_tokens} tokens",
        )
    console = result_console()
    console.print(table, highlight=False)
    if manifest.note:
        console.print(f"Note: {manifest.note}.", highlight=False)
    took = f"{output}: parity checked against PyTorch, {manifest.seconds:.0f} s."
    console.print(took, soft_wrap=True, highlight=False)
