"""The command line: it forwards to the package, prints what comes back, and sets the exit code.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported until a verb runs.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from owl_deploy import __version__
from owl_deploy.errors import OwlError

app = typer.Typer(
    name="owl",
    help="Prune a causal language model, export it to ONNX, and measure what that bought on a CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"owl-deploy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


def _emit(result: dict[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    """Print a verb's result: as JSON for machines, else by `show`."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        show()


def main() -> None:
    """Run `owl`; an `OwlError` becomes a sentence on stderr and its exit code."""
    try:
        app()
    except OwlError as error:
        typer.echo(f"owl: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("owl: interrupted; finished outputs are untouched.", err=True)
        sys.exit(130)
