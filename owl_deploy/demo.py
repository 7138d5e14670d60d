"""The whole chain on a real model: `python -m owl_deploy.demo -o DIR` (what `make demo` runs).

Prunes SmolLM2-135M, exports dense and sparse, benches them against each other, and says what it
means: a first look in minutes, or with `--full` more settings in every engine and precision. Steps
whose result is in the output folder already are not repeated.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from owl_deploy import inference, options
from owl_deploy.bench import BenchPlan, Result, read_result
from owl_deploy.bench.decision import judge, sentence
from owl_deploy.bench.report import write_report
from owl_deploy.bench.result import Comparison, Subject
from owl_deploy.bench.stats import interval_words
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.demo_input import CALIBRATION, EVALUATION, MODEL, demo_input
from owl_deploy.distributed.pipeline import Bench, Evaluate, Export, Prune, Task, execute
from owl_deploy.errors import EngineFailed, EnvironmentFailed
from owl_deploy.models.measurements import measurement_file
from owl_deploy.runtime import library_path
from owl_deploy.utils.artefact import make_folder, write_json
from owl_deploy.utils.ending import exit_code
from owl_deploy.utils.progress import error_console, result_console

# A target and a precision.
Road = tuple[str, str]
_DEEPSPARSE, _OWL = ("deepsparse", "fp32"), ("owl", "int8")
_EVERYWHERE = (_DEEPSPARSE, ("onnxruntime", "fp32"), _OWL)
MODEL_IS = (
    "The model is SmolLM2-135M-Instruct, from a GGUF file in 4 bits (Q4_1), expanded: "
    'what is "dense" here has been rounded once.'
)


@dataclass(frozen=True)
class Variant:
    """A model in the demo: dense, or pruned with these settings; and where it is deployed."""

    name: str
    title: str
    roads: tuple[Road, ...]
    settings: PruneSettings | None = None


@dataclass(frozen=True)
class Plan:
    """How much of the chain is run: `samples` windows of `length` tokens to calibrate on, `windows`
    of 2048 to evaluate on, `pairs` rounds of the benchmark.
    """

    variants: tuple[Variant, ...]
    samples: int
    length: int
    windows: int
    pairs: int


_OWL_50 = PruneSettings(allocation="owl", sparsity=0.5)
FIRST_LOOK = Plan(
    (
        Variant("dense", "dense", (_DEEPSPARSE, ("onnxruntime", "int8"), _OWL)),
        Variant("owl-50", "OWL 50 %", (_DEEPSPARSE, _OWL), _OWL_50),
    ),
    samples=8,
    length=512,
    windows=2,
    pairs=4,
)
# Enough for a picture of the method; the README's table of methods is made with 128 samples.
FULL = Plan(
    (
        Variant(
            "dense",
            "dense",
            (*_EVERYWHERE[:2], ("onnxruntime", "int8"), ("onnxruntime", "int4"), _OWL),
        ),
        Variant("owl-50", "OWL 50 %", _EVERYWHERE, _OWL_50),
        Variant(
            "uniform-70",
            "uniform 70 %",
            _EVERYWHERE,
            PruneSettings(allocation="uniform", sparsity=0.7),
        ),
        Variant(
            "owl-70",
            "OWL 70 %",
            _EVERYWHERE,
            PruneSettings(allocation="owl", sparsity=0.7),
        ),
    ),
    samples=8,
    length=2048,
    windows=6,
    pairs=4,
)


def tasks(plan: Plan, source: Path, output: Path, *, has_owl: bool = True) -> tuple[Task, ...]:
    """What makes the demo in the folder `output` from the `demo_input` in `source`.

    Without `has_owl` nothing is exported for the engine owl. The benchmark is the last.
    """
    pruned = [
        _prune(variant, plan, source, output) for variant in plan.variants if variant.settings
    ]
    deployed: list[Task] = []
    for variant in plan.variants:
        model = output / "checkpoints" / variant.name if variant.settings else source / MODEL
        for target, precision in variant.roads:
            if has_owl or target != "owl":
                name = f"{variant.name}-{target}-{precision}"
                export = Export(
                    title=f"Exporting: {variant.title} for {target}, {precision}",
                    output=output / "deployments" / name,
                    checkpoint=model,
                    target=target,
                    precision=precision,
                )
                deployed += [export, *_quality(variant, export, plan, source, output)]
    folders = [task.output for task in deployed if isinstance(task, Export)]
    dense = tuple(folder for folder in folders if folder.name.startswith("dense"))
    sparse = tuple(folder for folder in folders if folder not in dense)
    bench = Bench(
        title=f"Benchmarking {len(folders)} deployments, {plan.pairs} rounds of fresh processes",
        output=output / "bench",
        plan=BenchPlan(candidates=sparse, baselines=dense, pairs=plan.pairs),
    )
    # Each checkpoint is evaluated once, before the first deployment that computes the same.
    return (*pruned, *dict.fromkeys(deployed), bench)


def _prune(variant: Variant, plan: Plan, source: Path, output: Path) -> Prune:
    windows = f"{plan.samples} windows of {plan.length} tokens"
    return Prune(
        title=f"Pruning: {variant.title} with Wanda, {windows}",
        output=output / "checkpoints" / variant.name,
        model=source / MODEL,
        settings=variant.settings or PruneSettings(),
        calibration=str(source / CALIBRATION),
        samples=plan.samples,
        sequence_length=plan.length,
    )


def _quality(
    variant: Variant, export: Export, plan: Plan, source: Path, output: Path
) -> list[Evaluate]:
    """The perplexity of a deployment on the evaluation text.

    In float32 it is the checkpoint's, which export has found to compute the same.
    """
    title = f"Perplexity: {variant.title}"
    text, windows = str(source / EVALUATION), plan.windows
    kept = measurement_file(export.output, "perplexity")
    if export.precision != "fp32":
        title += f", {export.precision}, as it runs"
        return [Evaluate(title=title, output=kept, model=export.output, text=text, windows=windows)]
    known = output / "checkpoints" / f"{variant.name}.perplexity.json"
    return [
        Evaluate(title=title, output=known, model=export.checkpoint, text=text, windows=windows),
        Evaluate(title=title, output=kept, model=export.output, text=text, known=known),
    ]


def prepare(say: Callable[[str], object]) -> tuple[Path, bool]:
    """The demo's input, and whether the engine owl is here; installs the engine deepsparse."""
    say("Demo input: SmolLM2-135M and a Wikipedia sample")
    source = demo_input()
    say("The engine deepsparse, in an environment of its own")
    error_console().print(inference.get_engine("deepsparse").licence, style="dim")
    inference.install("deepsparse", lambda line: error_console().print(line, style="dim"))
    try:
        library_path()
    except EnvironmentFailed as error:  # it is built with the package; the rest still runs
        error_console().print(f"Without the engine owl: {error}", style="yellow")
        return source, False
    return source, True


class Clock:
    """Tells on stderr what comes next, with the time since the start; and how long it took."""

    def __init__(self) -> None:
        self.started = self.told = time.monotonic()

    def __call__(self, text: str) -> None:
        """Print `text`, which begins now."""
        self.took()
        self.told = time.monotonic()
        since = clock_time(self.told - self.started)
        error_console().print(f"[{since:>5}] {text}", style="bold")

    def took(self) -> None:
        """Print how long the last step took, if that was a minute."""
        seconds = time.monotonic() - self.told
        if seconds >= 60:
            error_console().print(f"        took {clock_time(seconds)}", style="dim")


def clock_time(seconds: float) -> str:
    """Minutes and seconds, or hours, such as "3:05" and "1:02:45"."""
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def rows(result: Result, plan: Plan) -> list[dict[str, Any]]:
    """The demo's table: one row a deployment."""
    variants = {variant.name: variant for variant in plan.variants}
    found = []
    for subject in result.subjects:
        if not all(subject.latencies(scenario.key) for scenario in result.scenarios):
            continue
        decode, prefill = (result.statistics[s.key][subject.name] for s in result.scenarios)
        variant = variants[Path(subject.path).name.rsplit("-", 2)[0]]
        found.append(
            {
                "model": variant.title,
                "engine": subject.engine,
                "precision": subject.precision,
                "perplexity": subject.perplexity,
                "sparsity": variant.settings.sparsity if variant.settings else 0.0,
                "decode_tokens_per_s": decode["tokens_per_s"],
                "prefill_ms": prefill["median_ms"],
                "speedup": over_dense(result, subject),
                "dense": subject.role == "baseline",
            }
        )
    return found


def over_dense(result: Result, subject: Subject) -> str:
    """How much faster than dense in the same engine, in the first scenario; "" for a baseline."""
    return next(
        (
            short(comparison)
            for comparison in result.comparisons
            if comparison.candidate == subject.name
            and comparison.scenario == result.scenarios[0].key
            and "same engine" in comparison.against
        ),
        "",
    )


def short(comparison: Comparison) -> str:
    """A speed-up in 18 characters: "1.43x (1.38-1.47)", with "no" or "?" where it is none."""
    interval = f"({comparison.low:.2f}-{comparison.high:.2f})"
    if comparison.verdict in ("faster", "slower"):
        return f"{comparison.ratio:.2f}x {interval}"
    return f"no {interval}" if comparison.verdict == "no speed-up" else f"? {interval}"


def show(result: Result, table: list[dict[str, Any]]) -> None:
    """Print the table, the machine, and what it means."""
    console = result_console()
    view = Table(box=None, pad_edge=False)
    for heading in ("model", "engine", "", "ppl", "pruned", "tok/s", "ms", "decode speed-up"):
        text = heading in ("model", "engine", "", "decode speed-up")
        view.add_column(heading, justify="left" if text else "right", no_wrap=True)
    for row in table:
        view.add_row(
            row["model"],
            row["engine"],
            row["precision"],
            f"{row['perplexity']:.1f}",
            f"{row['sparsity']:.0%}",
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['prefill_ms']:.0f}",
            row["speedup"],
        )
    console.print(view)
    console.print(
        f"\n{result.machine.cpu}, {result.threads} threads. ppl: perplexity on text that was not "
        "calibrated on; pruned: the share of the blocks' weights that was removed; tok/s: "
        f"decoding at a context of {result.scenarios[0].tokens}; ms: a prompt of "
        f"{result.scenarios[1].tokens} tokens. Speed-ups are against dense in the same "
        f"engine, with their {interval_words(one.pairs for one in result.comparisons)}; no: none "
        f"that matters; ?: the machine is too noisy to tell. {MODEL_IS}\n"
    )
    console.print(sentence(judge(result)), soft_wrap=True)


def conclude(
    results: Sequence[Result],
    table: list[dict[str, Any]],
    output: Path,
    show: Callable[[Result, list[dict[str, Any]]], None],
    max_loss: float | None = None,
) -> None:
    """Leave the table and the report in the folder `output`, `show` the table, say where it is.

    `results`: the report has all of them, the table is the first one's. `max_loss`: as for `owl
    report`. Raises `EngineFailed` after all that where an engine has failed.
    """
    write_json(output / "table.json", table)
    write_report(results, output / "report.html", max_loss=max_loss, force=True)
    show(results[0], table)
    error_console().print(f"The report: {output}/report.html", style="dim")
    failures = [failure for result in results for failure in result.failures]
    if failures:
        raise EngineFailed(" ".join(failures), "The table and the report have the others.")


def main(
    output: options.Output,
    full: Annotated[
        bool, typer.Option("--full", help="More settings and exports: half an hour.")
    ] = False,
) -> None:
    """Prune SmolLM2-135M with OWL, export it, bench it against dense."""
    plan = FULL if full else FIRST_LOOK
    make_folder(output)  # what is in its way is said before anything is fetched
    say = Clock()
    source, has_owl = prepare(say)
    made = tasks(plan, source, output, has_owl=has_owl)
    execute(made, say)
    result = read_result(made[-1].output)
    conclude([result], rows(result, plan), output, show)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: typer.run(main)))
