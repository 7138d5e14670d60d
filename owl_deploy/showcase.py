"""A model that people deploy, from its package to a decision: what `make showcase` runs.

`python -m owl_deploy.showcase -o DIR`: Qwen2.5-Coder-1.5B, dense and pruned to 50 % in one shot, in
each engine and precision that a user would take; judged by HumanEval and by perplexity on code that
was not calibrated on. Hours on two cores; every step leaves an artefact, and what is there is not
made again.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from owl_deploy.bench import BenchPlan, Result, read_result
from owl_deploy.bench.decision import judge, sentence
from owl_deploy.demo import Clock, conclude, over_dense
from owl_deploy.demo_input import CALIBRATION, EVALUATION
from owl_deploy.errors import BadInput, OwlError
from owl_deploy.evaluate.sandbox import require_sandbox
from owl_deploy.manifest import measurement, measurement_file
from owl_deploy.pipeline import Bench, Evaluate, Export, Prune, RunTasks, Task, execute
from owl_deploy.recipe import PruneSettings
from owl_deploy.runtime import library_path
from owl_deploy.showcase_input import MODEL, showcase_input

MODEL_IS = (
    "The model is Qwen2.5-Coder-1.5B-Instruct, from a GGUF file in 4 bits (Q4_K_M), expanded: what "
    'is "dense" here has been rounded once.'
)
DENSE = (
    ("owl", "int8"),
    ("owl", "bf16"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int4"),
    ("llama.cpp", "Q8_0"),
    ("llama.cpp", "Q4_K_M"),
    ("llama.cpp", "Q3_K_M"),
)
SPARSE = (("owl", "int8"), ("owl", "bf16"))
_SETTINGS = PruneSettings(method="sparsegpt", allocation="owl", sparsity=0.5)
_SAMPLES, _LENGTH = 32, 512  # windows and tokens to prune by
_WINDOWS = 5  # of 2048 tokens to evaluate on
_CONTEXTS, _PROMPTS, _PAIRS = (512, 4096), (512, 2048), 4


def tasks(source: Path, output: Path, limit: int | None = None) -> tuple[Task, ...]:
    """What makes the showcase in `output` from the `showcase_input` in `source`; the bench is last.

    `limit`: only so many of HumanEval's problems. They are run with the user's leave: `main` asks.
    """
    dense, sparse = source / MODEL, output / "checkpoints" / "sparsegpt-50"
    prune = Prune(
        title="Pruning: OWL 50 % with SparseGPT, 32 windows of 512 tokens of code",
        output=sparse,
        model=dense,
        settings=_SETTINGS,
        calibration=str(source / CALIBRATION),
        samples=_SAMPLES,
        sequence_length=_LENGTH,
    )
    exports = [
        Export(
            title=f"Exporting: {name} for {target}, {precision}",
            output=output / "deployments" / f"{name}-{target}-{precision}",
            checkpoint=checkpoint,
            target=target,
            precision=precision,
        )
        for name, checkpoint, roads in (("dense", dense, DENSE), ("sparse", sparse, SPARSE))
        for target, precision in roads
    ]
    judged = [task for export in exports for task in _judge(export.output, source, limit)]
    folders = [export.output for export in exports]
    bench = Bench(
        title=f"Benchmarking {len(folders)} deployments, {_PAIRS} rounds of fresh processes",
        output=output / "bench",
        plan=BenchPlan(
            candidates=tuple(folders[len(DENSE) :]),
            baselines=tuple(folders[: len(DENSE)]),
            context=_CONTEXTS,
            prompt=_PROMPTS,
            pairs=_PAIRS,
        ),
    )
    return (prune, *exports, *judged, bench)


def _judge(deployment: Path, source: Path, limit: int | None) -> tuple[Task, Task]:
    return (
        Evaluate(
            title=f"Perplexity on code: {deployment.name}",
            output=measurement_file(deployment, "perplexity"),
            model=deployment,
            text=str(source / EVALUATION),
            windows=_WINDOWS,
        ),
        RunTasks(
            title=f"HumanEval: {deployment.name}",
            output=measurement_file(deployment, "tasks"),
            model=deployment,
            names=("humaneval",),
            limit=limit,
            allow_code=True,
        ),
    )


def rows(result: Result) -> list[dict[str, Any]]:
    """The showcase's table: one row a deployment, with its speed in every scenario."""
    found = []
    for subject in result.subjects:
        folder = Path(subject.path)
        judged = (measurement(folder, "tasks") or {}).get("humaneval", {})
        metric = judged.get("metrics", {}).get("pass@1", {})
        speeds = {
            scenario.key: result.statistics[scenario.key][subject.name]
            for scenario in result.scenarios
            if subject.samples
        }
        found.append(
            {
                "deployment": folder.name,
                "size_bytes": subject.size_bytes,
                "perplexity": subject.perplexity,
                "pass_at_1": metric.get("value"),
                "pass_at_1_stderr": metric.get("stderr"),
                "problems": judged.get("documents"),
                "speed": speeds,
                "speedup": over_dense(result, subject),
            }
        )
    return found


def show(result: Result, table: list[dict[str, Any]]) -> None:
    """Print the table, the machine, and what it means."""
    console = Console()
    view = Table(box=None, pad_edge=False)
    for heading in ("deployment", "MB", "pass@1", "ppl", "tok/s", "prompt s", "over dense"):
        text = heading in ("deployment", "over dense")
        view.add_column(heading, justify="left" if text else "right", no_wrap=True)
    decode, prefill = f"decode@{_CONTEXTS[0]}", f"prefill@{_PROMPTS[0]}"
    for row in table:
        speed = row["speed"]
        view.add_row(
            row["deployment"],
            f"{row['size_bytes'] / 1e6:.0f}",
            f"{row['pass_at_1']:.1%} ± {row['pass_at_1_stderr']:.1%}",
            f"{row['perplexity']:.2f}",
            f"{speed[decode]['tokens_per_s']:.1f}" if decode in speed else "failed",
            f"{speed[prefill]['median_ms'] / 1000:.2f}" if prefill in speed else "failed",
            row["speedup"],
        )
    console.print(view)
    console.print(
        f"\n{result.machine.cpu}, {result.threads} threads. pass@1: of HumanEval's "
        f"{table[0]['problems']} problems, greedy, with its standard error; ppl: perplexity on "
        f"code that was not calibrated on; tok/s: decoding at a context of {_CONTEXTS[0]}; prompt: "
        f"of {_PROMPTS[0]} tokens. {MODEL_IS}\n"
    )
    console.print(sentence(judge(result)), soft_wrap=True)


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for what is made.")],
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="Run what the model writes, in a sandbox.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(help="Only so many of HumanEval's 164 problems.")
    ] = None,
) -> None:
    """Prune, export, judge and bench Qwen2.5-Coder-1.5B: hours on two cores."""
    say = Clock()
    try:
        if not allow_code:
            raise BadInput(
                "The showcase runs programs that the model wrote, in a sandbox.",
                "Give --allow-code; make showcase does.",
            )
        require_sandbox()
        library_path()
        say("Input: Qwen2.5-Coder-1.5B-Instruct and Python sources")
        made = tasks(showcase_input(), output, limit)
        execute(made, say)
        result = read_result(made[-1].output)
        conclude(result, rows(result), output, show)
    except OwlError as error:
        typer.echo(f"showcase: {error}", err=True)
        raise typer.Exit(error.exit_code) from error


if __name__ == "__main__":
    typer.run(main)
