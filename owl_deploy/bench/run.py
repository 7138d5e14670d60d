"""`owl bench` as one call: check, measure, write."""

from pathlib import Path

from rich.markup import escape

from owl_deploy import artefact
from owl_deploy.bench.measure import BenchPlan, run_bench
from owl_deploy.bench.result import Result, write_result
from owl_deploy.progress import error_console


def run(plan: BenchPlan, output: Path | None = None, force: bool = False) -> Result:
    """Measure what `plan` asks for, and write it to the folder `output`.

    Shows its progress on stderr. Raises as `run_bench` does, and `BadInput` for an output folder
    that cannot be written, before anything is measured.
    """
    if output is not None:
        artefact.check_output(output, force)
    console = error_console()
    with console.status("Looking at the deployments") as status:
        if console.is_terminal:
            result = run_bench(plan, lambda line: status.update(escape(line)))
        else:
            result = run_bench(plan, lambda line: console.print(line, markup=False))
    if output is not None:
        write_result(result, output, force)
    return result
