"""The command line: it forwards to `api`, prints what comes back, and sets the exit code.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported until a verb runs.
"""

import json
import sys
import textwrap
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from owl_deploy import __version__, api, options
from owl_deploy.compression.allocation.rules import DEFAULT
from owl_deploy.compression.methods import METHODS, ROUNDS_ONLY
from owl_deploy.errors import option
from owl_deploy.utils.ending import Interrupted, exit_code, explained
from owl_deploy.utils.ranks import leads, leave, local_rank

if TYPE_CHECKING:
    from owl_deploy.distributed.pipeline import Export, Plan, State
    from owl_deploy.utils.record import Record


# What Ctrl-C leaves of the verbs that have no outputs.
_LEFT = {"generate": "the text ends here", "serve": "nothing is served any more"}


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer has the type to itself
        """Let it be said what Ctrl-C left, for typer ends on that without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or _LEFT.get(str(ctx.invoked_subcommand), "")) from error
        except EOFError as error:  # of a file that was cut short, which click takes for Ctrl-D
            raise explained(error) from error


app = typer.Typer(
    name="owl",
    cls=_Group,
    help="Prune or round a language model, run it on a CPU, and measure what that gains and costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"owl-deploy {__version__}")
        raise typer.Exit


# Of these verbs the processes of torchrun divide the work.
_SHARED = ("prune", "quantize", "eval", "finetune")


@app.callback()
def _options(
    ctx: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    if local_rank() is not None and ctx.invoked_subcommand not in _SHARED:
        raise api.BadInput(
            f"owl {ctx.invoked_subcommand} runs in one process.", "Start it without torchrun."
        )


def _emit(result: dict[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """Print a verb's result: as JSON for machines, else by `show`; the leading process does."""
    if not leads():
        return
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        show()


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _given(values: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """Those of a command's `values` that are settings of the names `known`, and were given."""
    found = {name: values[name] for name in known if values.get(name) not in (None, [], {})}
    return {k: tuple(value) if isinstance(value, list) else value for k, value in found.items()}


def _calibration(
    ctx: typer.Context, source: str | None, samples: int, sequence_length: int, seed: int
) -> "api.Calibration | None":
    """The windows of a text; raises `BadInput` for a number of theirs where there is no text."""
    if source:
        return api.Calibration(source, samples, sequence_length, seed)
    for name in ("samples", "sequence_length", "seed"):
        said = ctx.get_parameter_source(name)
        if said is not None and said.name != "DEFAULT":
            raise api.BadInput(
                f"{option(name)} is of a calibration text.", "Give --calibration, or leave it out."
            )
    return None


def _with_method_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command` an option for each that a method has, in place of its `**own`."""
    own = [one for one in signature(command).parameters.values() if one.kind != one.VAR_KEYWORD]
    found: dict[str, Parameter] = {}
    for method, row in METHODS.items():
        for name, field in row.options.model_fields.items():
            default = "" if field.annotation is bool else f" [{field.default}]"
            told = f"Of {method}: {field.description}.{default}"
            if name in found:  # of another method, too
                told = f"{found[name].default.help} {told}"
            given = typer.Option(None, option(name), help=told)
            kind: Any = field.annotation
            found[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=given, annotation=kind)
    command.__signature__ = Signature([*own, *found.values()])  # type: ignore[attr-defined]
    return command


@app.command()
@_with_method_options
def prune(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    recipe: options.Recipe = None,
    method: options.Method = None,
    allocation: options.Allocation = None,
    sparsity: options.Sparsity = None,
    structure: options.Structure = None,
    outlier_multiple: options.OutlierMultiple = None,
    spread: options.Spread = None,
    skip: options.Skip = None,
    head_sparsity: options.HeadSparsity = None,
    refit: options.Refit = None,
    reconstruct: options.Reconstruct = None,
    asymmetric: options.Asymmetric = None,
    bits: options.Bits = None,
    bits_group: options.BitsGroup = None,
    head_bits: options.HeadBits = None,
    budget: options.Budget = None,
    calibration: options.CalibrationText = None,
    samples: options.Samples = 128,
    sequence_length: options.CalibrationLength = 2048,
    seed: options.WindowSeed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = None,
    tune: options.Tune = None,
    resume: options.Resume = False,
    force: options.Force = False,
    as_json: options.Json = False,
    **own: Any,  # noqa: ANN401 - the methods' own, each of its type
) -> None:
    """Prune a model in one shot, and write a checkpoint."""
    if method == ROUNDS_ONLY:
        raise api.BadInput(
            "--method none is gone, since it pruned nothing.", "Use owl quantize to round weights."
        )
    if tune is not None:
        raise api.BadInput(
            "--tune is gone: it gained nothing at 50 %.", f"Use --allocation {DEFAULT}."
        )
    overrides = _given({**locals(), "options": _given(own, own)}, api.PruneSettings.model_fields)
    settings = api.prune_settings(recipe, overrides)
    if bits and not recipe and {"method", "sparsity", "structure"}.isdisjoint(overrides):
        _say(f"{settings.sparsity:.0%} of the weights go, too; owl quantize rounds only.")

    from owl_deploy.compression.recipe import origin
    from owl_deploy.compression.show import show

    text = _calibration(ctx, calibration, samples, sequence_length, seed)
    manifest = api.prune(
        model,
        output,
        settings,
        text,
        api.Hardware(device, dtype, batch_size),
        force=force,
        resume=resume,
        origin=origin(recipe, overrides) if recipe else None,
    )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def quantize(
    ctx: typer.Context,
    model: options.Model,
    output: options.Output,
    bits: options.QuantizeBits = None,
    budget: options.QuantizeBudget = None,
    calibration: options.CalibrationText = None,
    bits_group: options.BitsGroup = None,
    head_bits: options.HeadBits = None,
    skip: options.Skip = None,
    reconstruct: options.Reconstruct = None,
    asymmetric: options.QuantizeAsymmetric = None,
    samples: options.Samples = 128,
    sequence_length: options.CalibrationLength = 2048,
    seed: options.WindowSeed = 0,
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    batch_size: options.BatchSize = None,
    resume: options.Resume = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Round a model's weights to few bits (GPTQ); none is removed."""
    settings = _given(locals(), api.PruneSettings.model_fields)

    from owl_deploy.compression.show import show

    manifest = api.quantize(
        model,
        output,
        settings,
        _calibration(ctx, calibration, samples, sequence_length, seed),
        api.Hardware(device, dtype, batch_size),
        force=force,
        resume=resume,
    )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def export(
    ctx: typer.Context,
    checkpoint: options.CheckpointFolder,
    output: options.Output,
    target: options.Target = "onnxruntime",
    precision: options.Precision = None,
    head: options.Head = None,
    calibration: options.WeighingText = None,
    samples: options.Samples = 128,
    sequence_length: options.CalibrationLength = 512,
    seed: options.WindowSeed = 0,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Export a checkpoint as a deployment, checked against PyTorch."""
    from owl_deploy.export.show import advise, show, steps

    text = _calibration(ctx, calibration, samples, sequence_length, seed)
    with steps() as progress:
        manifest = api.export(
            checkpoint,
            output,
            target=target,
            precision=precision,
            head=head,
            calibration=text,
            force=force,
            progress=progress,
        )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))
    if precision is None:
        advise(manifest)


@app.command()
def generate(
    deployment: options.GenaiDeployment,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    chat: options.Chat = False,
    system: options.System = None,
    stop: options.Stop = None,
    max_new_tokens: options.MaxNewTokens = None,
    do_sample: options.DoSample = False,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    seed: options.SamplingSeed = None,
    draft: options.DraftFolder = None,
    draft_tokens: options.DraftTokens = None,
    threads: options.Threads = None,
    trust_library: options.TrustLibrary = False,
    as_json: options.Json = False,
) -> None:
    """Stream text from a deployment, and say how fast it came."""
    from owl_deploy.inference.generate import read_prompt
    from owl_deploy.serve.stops import Stops

    sampling = api.Sampling(
        max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed
    )
    speed = api.Speed()
    pieces = []
    text = read_prompt(prompt, prompt_file)
    how: dict[str, Any] = {"chat": chat, "system": system, "threads": threads}
    how |= {"trust_library": trust_library, "draft": draft, "draft_tokens": draft_tokens}
    for piece in Stops(stop or ()).before(api.generate(deployment, text, sampling, speed, **how)):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    result = {"text": "".join(pieces), **speed.to_json()}
    _emit(result, as_json, lambda: _say(f"\n{speed.sentence()}"))


@app.command()
def serve(
    deployment: options.ServedDeployment,
    host: options.Host = "127.0.0.1",
    port: options.Port = 8000,
    batch: options.ServedBatch = 8,
    waiting: options.Waiting = 16,
    context: options.ServedContext = None,
    names: options.ServedNames = None,
    threads: options.Threads = None,
    trust_library: options.TrustLibrary = False,
    draft: options.DraftFolder = None,
    draft_tokens: options.DraftTokens = None,
    log: options.RequestLog = False,
) -> None:
    """Serve a deployment through OpenAI's HTTP API."""
    from owl_deploy.serve.server import serve as run

    how: dict[str, Any] = {"threads": threads, "trust_library": trust_library}
    how |= {"batch": batch, "waiting": waiting, "context": context, "names": names or ()}
    how |= {"draft": draft, "draft_tokens": draft_tokens, "log": log}
    run(deployment, host, port, say=_say, **how)


@app.command()
def verify(deployment: options.AnyDeployment, as_json: options.Json = False) -> None:
    """Check that a deployment is as exported, without running it."""
    from owl_deploy.inference.verify import show

    found = api.verify(deployment)
    _emit(found.to_json(), as_json, lambda: show(found, str(deployment)))
    sys.exit(0 if found.whole else 1)


@app.command(name="eval")
def evaluate(
    models: options.Models,
    perplexity: options.PerplexityText = None,
    tasks: options.Tasks = None,
    tasks_path: options.TasksPath = None,
    allow_code: options.AllowCode = False,
    limit: options.Limit = None,
    every: options.Every = 1,
    window: options.Window = 2048,
    windows: options.Windows = None,
    divergence: options.Divergence = False,
    device: options.CheckpointDevice = "auto",
    dtype: options.CheckpointDtype = "auto",
    batch_size: options.CheckpointBatch = None,
    blockwise: options.Blockwise = None,
    engine: options.Engine = None,
    threads: options.Threads = None,
    trust_library: options.TrustLibrary = False,
    adapter: options.Adapter = None,
    as_json: options.Json = False,
) -> None:
    """Measure perplexity and task scores of models and deployments."""
    from owl_deploy.evaluate.run import to_json
    from owl_deploy.evaluate.show import show

    asked = api.EvaluationSettings(
        text=perplexity,
        tasks=tuple(name for part in tasks or () for name in part.split(",") if name),
        tasks_path=tasks_path,
        allow_code=allow_code,
        window=window,
        windows=windows,
        divergence=divergence,
        limit=limit,
        every=every,
        hardware=api.Hardware(device, dtype, batch_size),
        blockwise=blockwise,
        engine=engine,
        threads=threads,
        trust_library=trust_library,
        adapter=adapter,
    )
    found = api.evaluate(models, asked)
    _emit(to_json(found), as_json, lambda: show(found))


@app.command()
def finetune(
    checkpoint: options.Model,
    output: options.Output,
    text: options.TrainingText,
    method: options.TrainingMethod = "lora",
    merge: options.Merge = None,
    teacher: options.Teacher = None,
    temperature: options.LogitTemperature = None,
    teacher_weight: options.TeacherWeight = None,
    feature_weight: options.FeatureWeight = None,
    teacher_top: options.TeacherTop = None,
    max_steps: options.MaxSteps = None,
    max_minutes: options.MaxMinutes = None,
    learning_rate: options.LearningRate = None,
    batch_size: options.TrainingBatch = 1,
    sequence_length: options.TrainingLength = 1024,
    gradient_accumulation: options.GradientAccumulation = 1,
    warmup: options.Warmup = 0.05,
    seed: options.TrainingSeed = 0,
    block_group: options.BlockGroup = None,
    shard: options.Shard = False,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    dropout: options.Dropout = None,
    target_modules: options.TargetModules = None,
    dtype: options.TrainingDtype = "auto",
    resume: options.Resume = False,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Train a sparse checkpoint, or an adapter, to win quality back."""
    given = _given(locals(), api.FinetuneSettings.model_fields)

    from owl_deploy.finetune.show import show

    manifest = api.finetune(
        checkpoint, output, text, given, teacher=teacher, force=force, resume=resume
    )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def bench(
    deployments: options.Candidates,
    baselines: options.Baselines = None,
    dense: options.Dense = None,
    engines: options.Engines = None,
    scenarios: options.Scenarios = None,
    context: options.Context = None,
    prompt: options.PromptTokens = None,
    batch: options.Batch = None,
    streams: options.Streams = None,
    clients: options.Clients = None,
    new_tokens: options.NewTokens = None,
    draft: options.BenchDraft = None,
    draft_tokens: options.DraftTokens = None,
    prompts: options.Prompts = None,
    threads: options.Threads = None,
    trust_library: options.TrustLibrary = False,
    pairs: options.Pairs = 8,
    looks: options.Looks = None,
    time_limit_s: options.TimeLimit = 600,
    save_baseline: options.SaveBaseline = None,
    check: options.Check = None,
    margin: options.Margin = None,
    max_loss: options.MaxLoss = None,
    quality_metric: options.QualityMetric = None,
    strict: options.Strict = False,
    summary: options.Summary = None,
    output: options.ResultFolder = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Time deployments against dense baselines, or gate a change."""
    given = _given(locals(), api.BenchPlan.model_fields)

    from owl_deploy.bench.decision import check_measured, read_loss
    from owl_deploy.bench.show import show_outcome
    from owl_deploy.utils.artefact import check_apart

    loss = read_loss(max_loss) if max_loss else None
    if strict and not check:
        raise api.BadInput("--strict is for the verdicts of --check.", "Give both, or neither.")
    if dense and output:
        check_apart(output, dense)
    exports = _dense(dense, deployments, trust_library) if dense else ()
    given["baselines"] = (*given.get("baselines", ()), *(one.output for one in exports))
    plan = api.BenchPlan(candidates=tuple(deployments), **given)

    def prepare() -> None:
        if exports:
            from owl_deploy.bench.measure import check_ahead
            from owl_deploy.distributed import pipeline

            check_ahead(plan, {one.output: one.target for one in exports})
            pipeline.execute(exports, _say)
        check_measured((*plan.candidates, *plan.baselines), quality_metric)

    outcome = api.run_gate(
        plan,
        save=save_baseline,
        check=check,
        margin=margin,
        output=output,
        force=force,
        summary=summary,
        prepare=prepare,
    )
    whole = outcome.to_json(loss, quality_metric)
    _emit(whole, as_json, lambda: show_outcome(outcome, loss, quality_metric))
    sys.exit(outcome.exit_code(strict))


def _dense(checkpoint: Path, deployments: list[Path], trust_library: bool) -> "tuple[Export, ...]":
    """What makes the dense baselines that suit these deployments."""
    from owl_deploy.distributed import pipeline
    from owl_deploy.inference import open_deployment

    opened = [open_deployment(path, trust_library=trust_library) for path in deployments]
    return pipeline.dense_exports(checkpoint, [(one.target, one.precision) for one in opened])


@app.command()
def sweep(
    model: options.DenseModel,
    output: options.Output,
    calibration: options.SweepCalibration,
    perplexity: options.SweepText,
    file: options.SweepFile = None,
    methods: options.Methods = None,
    allocations: options.Allocations = None,
    sparsities: options.Sparsities = None,
    targets: options.Targets = None,
    pairs: options.SweepPairs = None,
    threads: options.ThreadsInFull = None,
    samples: options.SweepSamples = None,
    sequence_length: options.SweepLength = None,
    window: options.SweepWindow = None,
    windows: options.SweepWindows = None,
    ray: options.Ray = None,
    store: options.Store = None,
    needs: options.Needs = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Prune, export, evaluate and bench every combination.

    Run it again to go on, or to widen it.
    """
    values = locals()

    from owl_deploy.bench.show import show_trade_off
    from owl_deploy.distributed import pipeline
    from owl_deploy.distributed import sweep as sweeps
    from owl_deploy.inference import threads_for
    from owl_deploy.utils.record import Unfinished

    if needs and not ray:
        raise api.BadInput("--needs is of the tasks on a cluster.", "Say which by --ray.")
    if store and not ray:
        raise api.BadInput("--store is for the nodes of a cluster.", "Say which by --ray.")
    plan = sweeps.read_plan(file, _given(values, sweeps.SweepPlan.model_fields))
    tasks = sweeps.tasks(model, output, plan, calibration, perplexity)
    if ray:
        from owl_deploy.distributed.cluster.needs import read_needs

        read_needs(needs or [])
    else:
        threads_for(plan.threads)  # which another machine may have
        sweeps.check_here(model, plan, calibration, perplexity)
    if dry_run:
        states = _stored(tasks, output, store) if store else pipeline.survey(tasks)
        lines = [f"{state:8}  {one.title}" for state, one in zip(states, tasks, strict=True)]
        whole = {"tasks": [one.model_dump(mode="json") for one in tasks], "states": states}
        return _emit(whole, as_json, lambda: typer.echo("\n".join(lines)))
    execute = (
        _on_cluster(model, output, ray, needs or [], store)
        if ray
        else lambda some: pipeline.attempt(some, _say)
    )
    result, left = sweeps.run(tasks, output, execute)
    rows = sweeps.trade_off(result) if result else []
    if result or as_json:
        whole = {"trade_off": rows, "left": [one.model_dump(mode="json") for one in left]}
        _emit(whole, as_json, lambda: show_trade_off(rows, output / sweeps.REPORT))
    if left:
        raise Unfinished(left, len(tasks), output / ("logs" if ray else sweeps.REPORT))
    sys.exit(4 if result and result.failures else 0)


def _stored(tasks: "Plan", output: Path, store: str) -> "list[State]":
    """How the tasks stand by what lies in a store."""
    from owl_deploy.distributed.cluster.store import Store
    from owl_deploy.distributed.cluster.stored import StoredPlan

    return StoredPlan(Store(store), tasks, output).survey()


def _on_cluster(
    model: Path, output: Path, address: str, needs: list[str], store: str | None
) -> "Callable[[Plan], dict[int, Record]]":
    """What executes a sweep's tasks on the Ray cluster at `address`."""
    from owl_deploy.distributed.cluster.needs import read_needs
    from owl_deploy.distributed.cluster.run import execute

    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    given = read_needs(needs)
    return lambda plan: execute(plan, output, address, given, size, store)


@app.command()
def report(
    results: options.Results,
    output: options.Page = Path("report.html"),
    max_loss: options.MaxLoss = None,
    quality_metric: options.QualityMetric = None,
    force: options.Force = False,
    as_json: options.Json = False,
) -> None:
    """Write benchmark results as one page with pictures and tables."""
    from owl_deploy.bench.decision import read_loss
    from owl_deploy.bench.report import write_report
    from owl_deploy.finetune.picture import learning_curve_svg
    from owl_deploy.finetune.show import caption
    from owl_deploy.models.manifest import Manifest, read_manifest

    found = {path: read_manifest(path, Manifest) for path in results}
    trained = {path: getattr(manifest, "finetune", None) for path, manifest in found.items()}
    curves = [
        (caption(str(path), done), learning_curve_svg(done, on_page=True))
        for path, done in trained.items()
        if done
    ]
    loss = read_loss(max_loss) if max_loss else None
    measured = [api.read_result(path) for path in results if not trained[path]]
    write_report(measured, output, curves, loss, quality_metric, force=force, made_of=results)
    _emit({"report": str(output)}, as_json, lambda: typer.echo(output))


recipes_app = typer.Typer(no_args_is_help=True, help="List, show and validate pruning recipes.")
app.add_typer(recipes_app, name="recipes")


@recipes_app.command(name="ls")
def list_recipes(as_json: options.Json = False) -> None:
    """List the recipes that come with owl, with what each is for."""
    from owl_deploy.compression import recipe as recipes

    purposes = {
        name: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for name, path in recipes.shipped().items()
    }
    width = max(map(len, purposes)) + 2
    lines = [
        textwrap.fill(text, 80, initial_indent=f"{name:{width}}", subsequent_indent=width * " ")
        for name, text in purposes.items()
    ]
    _emit(purposes, as_json, lambda: typer.echo("\n".join(lines)))


@recipes_app.command(name="show")
def show_recipe(name: options.RecipeName) -> None:
    """Print a recipe."""
    from owl_deploy.compression import recipe as recipes

    typer.echo(recipes.read(recipes.find(name)), nl=False)


@recipes_app.command(name="validate")
def validate_recipe(name: options.RecipeName, as_json: options.Json = False) -> None:
    """Read a recipe as `owl prune` does, and say what it means."""
    found = api.prune_settings(Path(name), {})
    # Where layers are named, theirs is the sparsity.
    settings = found.model_dump(mode="json", exclude={"sparsity"} if found.layers else None)
    layers = settings.get("layers") or {}
    told = {name: value for name, value in settings.items() if value and name != "layers"}
    lines = [f"{name:17} {value}" for name, value in told.items()]
    lines += [f"{layer}: {sparsity:.4f}" for layer, sparsity in layers.items()]
    _emit(settings, as_json, lambda: typer.echo("\n".join(lines)))


engines_app = typer.Typer(no_args_is_help=True, help="List, install and remove inference engines.")
app.add_typer(engines_app, name="engines")


@engines_app.command(name="ls")
def list_engines(as_json: options.Json = False) -> None:
    """List the engines: version, what they open, their licences."""
    from owl_deploy import inference
    from owl_deploy.inference.show import show

    known = inference.list_engines()
    _emit({"engines": known}, as_json, lambda: show(known))


@engines_app.command(name="install")
def install_engine(name: Annotated[str, typer.Argument(help="llama.cpp or deepsparse.")]) -> None:
    """Install an engine that needs an environment of its own."""
    from owl_deploy import inference

    typer.echo(f"{name}: {inference.public_engine(name).licence}", err=True)
    folder = inference.install(name, lambda line: typer.echo(line, err=True))
    typer.echo(folder)


@engines_app.command(name="path")
def engine_path(
    name: Annotated[str, typer.Argument(help="owl, onnxruntime, llama.cpp or deepsparse.")],
) -> None:
    """Print the path of owl's library, or of another engine's Python."""
    from owl_deploy import inference
    from owl_deploy.runtime import library_path

    carried = inference.public_engine(name).operators
    typer.echo(library_path() if carried else inference.python_of(name))


@engines_app.command(name="remove")
def remove_engine(name: Annotated[str, typer.Argument(help="llama.cpp or deepsparse.")]) -> None:
    """Delete the environment of an engine."""
    from owl_deploy import inference

    gone = inference.remove(inference.public_engine(name).name)
    typer.echo(f"{name} is removed" if gone else f"{name} was not installed", err=True)


def main() -> None:
    """Run `owl`; whatever it ends with becomes an exit code, and a sentence on stderr."""
    leave(exit_code(app))
