"""A model that people deploy, from its package to a decision: what `make showcase` runs.

`python -m owl_deploy.showcase -o DIR`: Qwen2.5-Coder-1.5B, dense, pruned to 50 % in one shot, both
of them rounded to 4 bits too, the dense one with a format for each matrix, and the pruned one
trained again, in each engine and precision that a user would take; beside them its sister of 0.5B,
which is a rival of all that, and a draft for the dense one. Judged by HumanEval and by perplexity
on code that was not calibrated on. Hours on two cores; every step leaves an artefact, and what is
there is not made again.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

from owl_deploy import inference, options
from owl_deploy.bench import BenchPlan, Result, read_result, stats
from owl_deploy.bench.decision import HUMANEVAL, judge, read_loss, refreshed, sentence
from owl_deploy.bench.scenario import KINDS
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.demo import Clock, Road, clock_time, conclude, over_dense
from owl_deploy.demo_input import CALIBRATION, EVALUATION
from owl_deploy.distributed.pipeline import (
    Bench,
    Evaluate,
    Export,
    Finetune,
    Prune,
    RunTasks,
    Task,
    execute,
    seconds,
)
from owl_deploy.errors import BadInput, EnvironmentFailed, not_installed
from owl_deploy.evaluate.sandbox import require_sandbox
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.export.targets import TARGETS
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.models.measurements import measurement_file
from owl_deploy.showcase_input import MODEL, SISTER, showcase_input, sister_input
from owl_deploy.utils.artefact import make_folder, write_json
from owl_deploy.utils.ending import exit_code
from owl_deploy.utils.progress import error_console, result_console

MODEL_IS = (
    "The model is Qwen2.5-Coder-1.5B-Instruct, from a GGUF file in 4 bits (Q4_K_M), expanded: what "
    'is "dense" here has been rounded once.'
)
_WIDTH = 80
_OWL: tuple[Road, ...] = tuple(
    ("owl", precision)
    for precision in TARGETS["owl"].precisions
    if precision != "int3"  # to nearest that is nothing to deploy
)
_INT4: Road = ("owl", "int4")
_RIVALS: tuple[Road, ...] = (
    *(("onnxruntime", precision) for precision in ("int8", "int4")),
    *(("llama.cpp", precision) for precision in ("Q8_0", "Q4_K_M", "Q3_K_M")),
)


@dataclass(frozen=True)
class Plan:
    """What is made, and how much of it is run.

    `roads`: the targets and precisions of the "dense" model, "dense-rounded" (by `rounding`, with
    compensation) and "dense-budget" (by `choosing`, likewise), the "sparse" one (by `pruning`), and
    what was made of that: "rounded" likewise and "recovered"; and of the smaller model, "sister",
    dense and rounded likewise. `samples` windows of `length` tokens to prune by; `windows` of
    `window` to evaluate on; of HumanEval's problems each `every`-th, and at most `limit`.
    """

    roads: dict[str, tuple[Road, ...]]
    pruning: PruneSettings
    rounding: PruneSettings
    choosing: PruneSettings
    recovery: FinetuneSettings
    samples: int = 64
    length: int = 512
    window: int = 2048
    windows: int = 5
    every: int = 1
    limit: int | None = None
    scenarios: tuple[str, ...] = (
        "decode@512",
        "decode@4096",
        "decode@512x4",
        "decode@512x8",
        "prefill@512",
        "prefill@2048",
    )
    pairs: int = 4

    def without(self, patterns: Sequence[str]) -> "Plan":
        """The plan without what one of `patterns` names: a model, a target, or a deployment.

        Raises `BadInput` for one that names nothing, and where nothing would be left.
        """
        every = [(model, road) for model, roads in self.roads.items() for road in roads]
        for pattern in patterns:
            if not any(_is_named(pattern, *one) for one in every):
                known = ", ".join(dict.fromkeys((*self.roads, *(road[0] for _, road in every))))
                raise BadInput(
                    f"--skip {pattern} names nothing in the showcase.",
                    f"Give one of {known}, or deployments such as dense-owl-fp32 or '*-fp32'.",
                )
        left = [one for one in every if not any(_is_named(pattern, *one) for pattern in patterns)]
        if not left:
            raise BadInput("--skip leaves nothing of the showcase.")
        roads = {name: tuple(road for model, road in left if model == name) for name in self.roads}
        return replace(self, roads=roads)


def _is_named(pattern: str, model: str, road: Road) -> bool:
    names = (model, road[0], "-".join((model, *road)))
    return any(fnmatchcase(name, pattern) for name in names)


SHOWCASE = Plan(
    roads={
        "dense": (*_OWL, *_RIVALS),
        "dense-rounded": (_INT4,),
        "dense-budget": (_INT4,),
        "sparse": tuple(road for road in _OWL if road != _INT4),
        "rounded": (_INT4,),
        "recovered": (("owl", "int8"),),
        "sister": (_INT4,),
    },
    pruning=PruneSettings(method="alps", allocation="fisher", sparsity=0.5),
    rounding=PruneSettings(method="none", bits=4),
    choosing=PruneSettings(method="none", budget="917MB"),  # as large as Q3_K_M
    # A quarter of the blocks at a time: some 16 GB with the teacher. A chat model that only read
    # code would forget how to answer: half of the loss is the dense one's.
    recovery=FinetuneSettings(
        method="masked",
        sequence_length=512,
        block_group=7,
        teacher_weight=0.5,
        max_minutes=120.0,
    ),
)


def tasks(plan: Plan, source: Path, sister: Path, output: Path) -> tuple[Task, ...]:
    """What makes the showcase in `output` from the `showcase_input` in `source` and the
    `sister_input` in `sister`; the bench is last.

    The problems are run with the user's leave: `main` asks.
    """
    checkpoints = _checkpoints(plan, source, output)
    exports = [
        Export(
            title=f"Exporting: {model} for {target}, {precision}",
            output=output / "deployments" / "-".join((model, target, precision)),
            checkpoint=checkpoints[model],
            target=target,
            precision=precision,
            **_calibrated(plan, source),
        )
        for model, roads in plan.roads.items()
        for target, precision in roads
    ]
    judged = [task for export in exports for task in _judge(plan, export.output, source)]
    folders = [export.output for export in exports]
    dense = tuple(folder for folder in folders if folder.name.startswith("dense"))
    sparse = tuple(folder for folder in folders if folder not in dense)
    drafts = _drafts(plan, folders, output / "drafts")
    bench = Bench(
        title=f"Benchmarking {len(folders)} deployments, {plan.pairs} rounds of fresh processes",
        output=output / "bench",
        plan=BenchPlan(
            candidates=sparse or dense,
            baselines=dense if sparse else (),
            scenarios=plan.scenarios,
            pairs=plan.pairs,
            repeats=3,  # a prompt of 2048 takes ten seconds and more, and two differ by little
        ),
    )
    return (*_made(plan, checkpoints, source, sister), *exports, *judged, *drafts, bench)


def _drafts(plan: Plan, folders: Sequence[Path], output: Path) -> Iterator[Bench]:
    """What the sister proposes to the dense model in the engine that takes drafts."""
    made = {folder.name: folder for folder in folders}
    draft = made.get("sister-owl-int4")
    drafted = tuple(made[name] for name in ("dense-owl-int8", "dense-owl-int4") if name in made)
    if draft and drafted:
        yield Bench(
            title="Benchmarking drafts by the smaller sister",
            output=output,
            plan=BenchPlan(
                candidates=drafted,
                scenarios=("answers",),
                draft=str(draft),
                pairs=plan.pairs,
            ),
        )


def _checkpoints(plan: Plan, source: Path, output: Path) -> dict[str, Path]:
    """Where the checkpoint of each model lies."""
    share = f"{100 * plan.pruning.sparsity:g}"
    pruned = f"{plan.pruning.method}-{share}"
    names = {
        "dense-rounded": "dense-int4",
        "dense-budget": f"dense-{plan.choosing.budget}",
        "sparse": pruned,
        "rounded": f"{pruned}-int4",
        "recovered": f"recovered-{share}",
        "sister": "sister-int4",
    }
    folder = output / "checkpoints"
    return {"dense": source / MODEL} | {model: folder / name for model, name in names.items()}


def _calibrated(plan: Plan, source: Path) -> dict[str, Any]:
    """What calibrates whatever is calibrated."""
    text = str(source / CALIBRATION)
    return {"calibration": text, "samples": plan.samples, "sequence_length": plan.length}


def _made(plan: Plan, checkpoints: dict[str, Path], source: Path, sister: Path) -> Iterator[Task]:
    """What makes the checkpoints that are deployed."""
    tokens = f"{plan.samples} windows of {plan.length} tokens of code"
    calibrated = _calibrated(plan, source)

    def rounding(
        model: str, what: str, source: Path, settings: PruneSettings = plan.rounding
    ) -> Prune:
        to = f"{settings.bits} bits" if settings.budget is None else settings.budget
        return Prune(
            title=f"Rounding {what} to {to}, {tokens}",
            output=checkpoints[model],
            model=source,
            settings=settings,
            **calibrated,
        )

    if plan.roads["sister"]:
        yield rounding("sister", "the smaller sister", sister / SISTER)
    if plan.roads["dense-rounded"]:
        yield rounding("dense-rounded", "the dense model", checkpoints["dense"])
    if plan.roads["dense-budget"]:
        yield rounding("dense-budget", "the dense model", checkpoints["dense"], plan.choosing)
    if any(plan.roads[model] for model in ("sparse", "rounded", "recovered")):
        yield Prune(
            title=f"Pruning: {plan.pruning.allocation} {plan.pruning.sparsity:.0%} with "
            f"{plan.pruning.method}, {tokens}",
            output=checkpoints["sparse"],
            model=checkpoints["dense"],
            settings=plan.pruning,
            **calibrated,
        )
    if plan.roads["rounded"]:
        yield rounding("rounded", "the weights that are left", checkpoints["sparse"])
    if plan.roads["recovered"]:
        yield Finetune(
            title=f"Training the weights that are left, {plan.recovery.max_minutes:g} minutes",
            output=checkpoints["recovered"],
            checkpoint=checkpoints["sparse"],
            text=calibrated["calibration"],
            settings=plan.recovery,
            teacher=checkpoints["dense"],
        )


def _judge(plan: Plan, deployment: Path, source: Path) -> tuple[Task, Task]:
    return (
        Evaluate(
            title=f"Perplexity on code: {deployment.name}",
            output=measurement_file(deployment, "perplexity"),
            model=deployment,
            text=str(source / EVALUATION),
            window=plan.window,
            windows=plan.windows,
        ),
        RunTasks(
            title=f"HumanEval: {deployment.name}",
            output=measurement_file(deployment, "tasks"),
            model=deployment,
            names=(HUMANEVAL,),
            limit=plan.limit,
            every=plan.every,
            window=plan.window,
            allow_code=True,
        ),
    )


def rows(result: Result) -> list[dict[str, Any]]:
    """The showcase's table: one row a deployment, with its speed in every scenario."""
    found = []
    for subject in result.subjects:
        score = subject.scores.get(HUMANEVAL)
        speeds = {
            scenario.key: result.statistics[scenario.key][subject.name]
            for scenario in result.scenarios
            if subject.latencies(scenario.key)
        }
        found.append(
            {
                "deployment": Path(subject.path).name,
                "size_bytes": subject.size_bytes,
                "peak_bytes": subject.peak_bytes if subject.samples else None,
                "load_s": subject.load_s if subject.samples else None,
                "perplexity": subject.perplexity,
                "pass_at_1": score and score.value,
                "pass_at_1_stderr": score and score.stderr,
                "problems": score and score.documents,
                "speed": speeds,
                "speedup": over_dense(result, subject),
            }
        )
    return found


def show(
    result: Result,
    table: list[dict[str, Any]],
    max_loss: float | None = None,
    drafts: Sequence[Result] = (),
) -> None:
    """Print what to deploy, tables of 80 columns, what drafts bring, the machine, and what all of
    it means.
    """
    console = result_console()
    console.print(sentence(judge(result), max_loss), soft_wrap=True)
    for view in _tables([row["deployment"] for row in table], _columns(result, table)):
        console.print()
        console.print(view)
    for line in chain.from_iterable(map(_gains, drafts)):
        console.print(f"\n{line}", soft_wrap=True)
    intervals = stats.interval_words(one.pairs for one in result.comparisons)
    console.print(
        f"\n{result.machine.cpu}, {result.threads} threads. pass@1: of {table[0]['problems']} of "
        "HumanEval's problems, greedy, in %, with its standard error; ppl: perplexity on code that "
        "was not calibrated on; @: tokens/s, decoding at a context of so many tokens; over dense: "
        f"that, in the same engine, with its {intervals}; prompt: seconds for so many tokens; "
        f"peak: of resident memory. {MODEL_IS}"
    )


def _gains(drafted: Result) -> Iterator[str]:
    """What each deployment gains by the draft, with its own answers."""
    first = drafted.scenarios[0].metrics[0].key
    alone = {one.path: one.name for one in drafted.subjects if not one.draft}
    compared = {
        (one.candidate, one.baseline): one for one in drafted.comparisons if one.scenario == first
    }
    for subject in drafted.subjects:
        gain = compared.get((subject.name, alone.get(subject.path, "")))
        if subject.tally and gain:
            yield (
                f"{subject.name}: {gain.ratio:.2f}x ({gain.low:.2f}-{gain.high:.2f}) as fast, "
                "with the same answers; "
                f"{subject.tally['share_accepted']:.0%} of the draft's tokens accepted."
            )


def _columns(result: Result, table: list[dict[str, Any]]) -> dict[str, list[str]]:
    """The cells of each column, by its heading, what counts first."""

    def speeds(key: str, name: str, scale: float, digits: int) -> list[str]:
        found = (row["speed"].get(key, {}).get(name) for row in table)
        return [_said(value, digits, scale) for value in found]

    scenarios = {kind: [s for s in result.scenarios if s.kind == kind] for kind in KINDS}
    decode = {
        f"@{s.key.partition('@')[2]}": speeds(s.key, "tokens_per_s", 1, 1)
        for s in scenarios["decode"]
    }
    first = next(iter(decode), "")
    return {
        "MB": [_said(row["size_bytes"], 0, 1e6) for row in table],
        "pass@1": [_passed(row) for row in table],
        "ppl": [_said(row["perplexity"], 2) for row in table],
        **({first: decode.pop(first)} if first else {}),
        "over dense": [row["speedup"] for row in table],
        **decode,
        **{f"prompt {s.tokens}": speeds(s.key, "median_ms", 1000, 2) for s in scenarios["prefill"]},
        "open s": [_said(row["load_s"], 1) for row in table],
        "peak MB": [_said(row["peak_bytes"], 0, 1e6) for row in table],
    }


def _tables(names: list[str], columns: dict[str, list[str]]) -> Iterator[Table]:
    """As many tables, each with the `names` first, as it takes to keep within 80 columns."""
    widths = {heading: max(map(len, (heading, *cells))) + 2 for heading, cells in columns.items()}
    left = list(columns)
    while left:
        room, chosen = _WIDTH - max(map(len, ("deployment", *names))), [left.pop(0)]
        while left and sum(widths[heading] for heading in (*chosen, left[0])) <= room:
            chosen.append(left.pop(0))
        view = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        view.add_column("deployment", no_wrap=True)
        for heading in chosen:
            justify: Literal["left", "right"] = "left" if heading == "over dense" else "right"
            view.add_column(heading, justify=justify, no_wrap=True)
        for index, name in enumerate(names):
            view.add_row(name, *(columns[heading][index] for heading in chosen))
        yield view


def _passed(row: dict[str, Any]) -> str:
    value, error = row["pass_at_1"], row["pass_at_1_stderr"]
    return _said(value, 1, 0.01) + ("" if error is None else f" ± {100 * error:.1f}")


def _said(value: float | None, digits: int, scale: float = 1) -> str:
    return "" if value is None else f"{value / scale:.{digits}f}"


def show_steps(plan: Sequence[Task], output: Path) -> None:
    """Print how long each step took when it was last done, and leave it in steps.json."""
    took = {task.title: seconds(task) for task in plan}
    write_json(output / "steps.json", took)
    for title, found in took.items():
        time = "" if found is None else clock_time(found)
        error_console().print(f"{time:>8}  {title}", style="dim", highlight=False)


def prepare(plan: Plan, say: Callable[[str], object]) -> None:
    """See that each engine of `plan` is here, or install it; raises `EnvironmentFailed`."""
    for target in dict.fromkeys(target for roads in plan.roads.values() for target, _ in roads):
        engine = inference.engine_for(target)
        try:
            if engine.lock and not inference.is_installed(engine.name):
                say(f"The engine {engine.name}, in an environment of its own")
                inference.install(engine.name, lambda x: error_console().print(x, style="dim"))
            inference.require(engine.name)
        except EnvironmentFailed as error:
            raise EnvironmentFailed(
                error.message, f"{error.hint} Or go on without its rows: --skip {target}."
            ) from error


def _check_code(allowed: bool) -> None:
    """Raise, before hours go by, where the model's programs may not or cannot be run."""
    if not allowed:
        raise BadInput(
            "The showcase runs programs that the model wrote, in a sandbox.",
            "Give --allow-code; make showcase does.",
        )
    require_sandbox()
    try:
        from owl_deploy.evaluate.humaneval import problems
    except ModuleNotFoundError as error:
        raise not_installed(error) or error from error
    problems()


_Skipped = Annotated[
    list[str] | None,
    typer.Option(
        help="Leave out a model (recovered), a target (llama.cpp) or deployments (*-fp32); repeat."
    ),
]


def main(
    output: options.Output,
    allow_code: options.AllowCode = False,
    every: options.Every = SHOWCASE.every,
    limit: options.Limit = None,
    minutes: Annotated[
        float, typer.Option(help="To train the pruned model for.")
    ] = SHOWCASE.recovery.max_minutes or 0.0,
    method: Annotated[
        str, typer.Option(help="To prune with; sparsegpt takes a fifth of the time.")
    ] = SHOWCASE.pruning.method,
    pairs: options.Pairs = SHOWCASE.pairs,
    skip: _Skipped = None,
    max_loss: options.MaxLoss = None,
) -> None:
    """Prune, train, export, judge and bench Qwen2.5-Coder-1.5B: hours on two cores."""
    say = Clock()
    _check_code(allow_code)
    loss = read_loss(max_loss) if max_loss else None
    recovery = FinetuneSettings(**SHOWCASE.recovery.model_dump() | {"max_minutes": minutes})
    kept = SHOWCASE.pruning.model_dump(include={"allocation", "sparsity"})
    plan = replace(
        SHOWCASE,
        every=every,
        limit=limit,
        pruning=PruneSettings(**kept | {"method": method}),
        recovery=recovery,
        pairs=pairs,
    )
    plan = plan.without(skip or ())
    _check_numbers(plan, output)
    make_folder(output)
    prepare(plan, say)
    say("Input: Qwen2.5-Coder-1.5B-Instruct and Python sources")
    sister = sister_input() if plan.roads["sister"] else Path()
    made = tasks(plan, showcase_input(), sister, output)
    execute(made, say)
    say.took()
    show_steps(made, output)
    *drafts, result = (read_result(one.output) for one in made if isinstance(one, Bench))
    result = refreshed(result)
    shown = partial(show, drafts=drafts, max_loss=loss)
    conclude([result, *drafts], rows(result), output, shown, loss)


def _check_numbers(plan: Plan, output: Path) -> None:
    """Raise `BadInput` now for what would be refused after hours."""
    EvaluationSettings(limit=plan.limit, every=plan.every)
    for task in tasks(plan, Path(), Path(), output):
        if isinstance(task, Bench):
            task.plan.described()


if __name__ == "__main__":
    sys.exit(exit_code(lambda: typer.run(main)))
