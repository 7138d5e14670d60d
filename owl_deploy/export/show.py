"""What `owl export` shows: the step that it is at, the table at its end, and what else to try."""

import contextlib
import time
from collections.abc import Iterator, Mapping

from rich.table import Table

from owl_deploy.export.source import Progress
from owl_deploy.models.manifest import DeploymentManifest
from owl_deploy.utils.progress import error_console, result_console

_NOT_JUDGED = (
    "The differences are told and not judged: rounding changes logits, and `owl eval` measures "
    "what that costs."
)
_OTHERS = (
    "Note: on CPUs `--target owl --precision int4` is usually the one to deploy, or int8 where "
    "quality counts most."
)


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
        told = f"{run['relative_difference']:.1e} of the largest logit, "
        table.add_row(f"parity, {name}", told + _tokens(run, parity.greedy_tokens))
    console = result_console()
    console.print(table, highlight=False)
    if manifest.note:
        console.print(f"Note: {manifest.note}.", highlight=False)
    checked = "parity checked against PyTorch"
    if parity.tolerance is None:
        checked = "compared with PyTorch"
        console.print(_NOT_JUDGED, soft_wrap=True, highlight=False)
    took = f"{output}: {checked}, {manifest.seconds:.0f} s."
    console.print(took, soft_wrap=True, highlight=False)


def _tokens(run: Mapping[str, float], count: int) -> str:
    """How many of `count` tokens are PyTorch's: at their places, or until the first other one."""
    if "equal_greedy_tokens" in run:
        return f"{run['equal_greedy_tokens'] * count:.0f} of {count} tokens the same"
    # After another token an engine that generates answers another question: no more is compared.
    same = int(run["compared_steps"]) - (run["equal_generated_tokens"] < 1)
    return f"the first {same} of {count} tokens the same"


def advise(manifest: DeploymentManifest) -> None:
    """Say on stderr what else to try on a CPU, after a precision that nobody chose."""
    if manifest.engine in ("onnxruntime", "owl") and manifest.precision in ("fp32", "bf16"):
        error_console().print(_OTHERS, soft_wrap=True)
