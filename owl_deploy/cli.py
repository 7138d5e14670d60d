"""The command line: it forwards to `api`, prints what comes back, and sets the exit code.

Results go to stdout, progress and errors to stderr. Nothing heavy is imported until a verb runs.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from owl_deploy import __version__, api
from owl_deploy.ending import exit_code


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:  # noqa: ANN401 - typer has the type to itself
        """Say what Ctrl-C left, which typer ends on without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            left = str(error) or "finished outputs are untouched"
            typer.echo(f"owl: interrupted; {left}.", err=True)
            raise typer.Exit(130) from error


app = typer.Typer(
    name="owl",
    cls=_Group,
    help="Prune a causal language model, export it to ONNX, and measure what that bought on a CPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SEEDS = 2**31 - 1  # the largest that every library takes
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, typer.Option("--force", "-f", help="Replace an existing output folder.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-t", help="Of an engine. [the physical cores]")
]
TrustLibrary = Annotated[
    bool,
    typer.Option("--trust-library", help="Run operators that a deployment brings, not owl's own."),
]
MaxLoss = Annotated[
    str | None,
    typer.Option(help="Quality that may go in the choice of what to deploy, such as 2%. [none]"),
]
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


def _emit(result: dict[str, Any], as_json: bool, show: Callable[[], object]) -> None:
    """Print a verb's result: as JSON for machines, else by `show`."""
    if as_json:
        typer.echo(json.dumps(result, indent=2))
    else:
        show()


@app.command()
def prune(
    model: Annotated[
        str, typer.Argument(help="A model folder, or a name on the Hugging Face Hub.")
    ],
    output: Output,
    recipe: Annotated[
        Path | None,
        typer.Option(help="A file in SparseML's grammar, or a shipped name; options override it."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method", "-m", help="magnitude, wanda, wanda-variant or sparsegpt. [wanda]"
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation", "-a", help="Sparsity over the blocks: owl, dlp, linear, uniform. [owl]"
        ),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="Share of weights to remove. [0.7]")
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(help="unstructured, or N:M: N kept of M, mixed unless uniform."),
    ] = None,
    outlier_multiple: Annotated[
        float | None, typer.Option(help="OWL's M: an outlier is above M times the mean. [5]")
    ] = None,
    spread: Annotated[
        float | None,
        typer.Option(help="Half the range of sparsities. [owl 0.08, dlp and linear 0.15]"),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="A layer to leave dense, such as down_proj; repeat.")
    ] = None,
    head_sparsity: Annotated[
        float | None,
        typer.Option(help="Prune the output head too, and the embedding if they are one matrix."),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option(help="SparseGPT: columns a block. [128]")
    ] = None,
    dampening: Annotated[
        float | None, typer.Option(help="SparseGPT: share of the mean diagonal. [0.01]")
    ] = None,
    preserve_mask: Annotated[
        bool | None, typer.Option("--preserve-mask", help="SparseGPT: zeros stay zeros.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration", "-c", help="Text: a file, wikitext, c4, ptb, or hf:N:C:S:COL."
        ),
    ] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, max=SEEDS, help="Of the draw of windows.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="To compute in: auto, float32, bfloat16 or float16.")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="Windows at once. [by free memory]")
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Search the allocation's parameters on held-out text.")
    ] = False,
    resume: Resume = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prune a model in one shot and write a sparse checkpoint."""
    from owl_deploy.recipe import origin

    given = {
        "method": method,
        "allocation": allocation,
        "sparsity": sparsity,
        "structure": structure,
        "outlier_multiple": outlier_multiple,
        "spread": spread,
        "skip": tuple(skip) if skip else None,
        "head_sparsity": head_sparsity,
        "block_size": block_size,
        "dampening": dampening,
        "preserve_mask": preserve_mask,
    }
    overrides = {key: value for key, value in given.items() if value is not None}
    settings = api.prune_settings(recipe, overrides)

    from owl_deploy.prune.show import show

    text = api.Calibration(calibration, samples, sequence_length, seed) if calibration else None
    manifest = api.prune(
        model,
        output,
        settings,
        text,
        api.Hardware(device, dtype, batch_size),
        tune_allocation=tune,
        force=force,
        resume=resume,
        origin=origin(recipe, overrides) if recipe else None,
    )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: a Hugging Face model folder.")],
    output: Output,
    target: Annotated[
        str, typer.Option("--target", "-t", help="onnxruntime, owl or deepsparse.")
    ] = "onnxruntime",
    precision: Annotated[
        str | None,
        typer.Option(
            "--precision",
            "-p",
            help="How the weights are held: fp32, int8 or int4 for onnxruntime; bf16, int8 or "
            "fp32 for owl; fp32 for deepsparse. [the first]",
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="For owl: screened, an int8 head of which tokens far from the likeliest get 4 "
            "bits, or whole, like the other weights. [screened for int8, else whole]"
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Export a checkpoint to ONNX with a KV cache, and check it against PyTorch."""
    from owl_deploy.export.show import show, steps

    with steps() as progress:
        manifest = api.export(
            checkpoint,
            output,
            target=target,
            precision=precision,
            head=head,
            force=force,
            progress=progress,
        )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def generate(
    deployment: Annotated[Path, typer.Argument(help="A deployment for owl or onnxruntime.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What the model continues; - reads it from stdin.")
    ] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 file with the prompt, instead of PROMPT.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="At most so many; -1: on until the context is full. [128, or what fits]",
        ),
    ] = None,
    do_sample: Annotated[
        bool, typer.Option("--do-sample", help="Sample; without it the likeliest token is taken.")
    ] = False,
    temperature: Annotated[float, typer.Option()] = 1.0,
    top_k: Annotated[int, typer.Option()] = 50,
    top_p: Annotated[float, typer.Option()] = 1.0,
    repetition_penalty: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int | None, typer.Option(min=0, max=SEEDS, help="Of sampling.")] = None,
    threads: Threads = None,
    trust_library: TrustLibrary = False,
    as_json: Json = False,
) -> None:
    """Stream text from a deployment, and say how fast it came."""
    from owl_deploy.generate import read_prompt

    sampling = api.Sampling(
        max_new_tokens, do_sample, temperature, top_k, top_p, repetition_penalty, seed
    )
    speed = api.Speed()
    pieces = []
    text = read_prompt(prompt, prompt_file)
    for piece in api.generate(
        deployment,
        text,
        sampling,
        speed,
        chat=chat,
        threads=threads,
        trust_library=trust_library,
    ):
        pieces.append(piece)
        if not as_json:
            typer.echo(piece, nl=False)
    result = {"text": "".join(pieces), **vars(speed), "tokens_per_s": speed.tokens_per_s}
    _emit(
        result,
        as_json,
        lambda: typer.echo(
            f"\n{speed.prompt_tokens} tokens read in {speed.first_token_s:.2f} s, then "
            f"{speed.tokens_per_s:.1f} tokens/s"
            + ("; the context is full" if speed.context_full else ""),
            err=True,
        ),
    )


@app.command()
def verify(
    deployment: Annotated[Path, typer.Argument(help="A deployment, also one that others made.")],
    as_json: Json = False,
) -> None:
    """Say what opening a deployment would load, and whether that is what was exported."""
    from owl_deploy.verify import show

    found = api.verify(deployment)
    _emit(found.to_json(), as_json, lambda: show(found, str(deployment)))
    sys.exit(0 if found.whole else 1)


@app.command(name="eval")
def evaluate(
    models: Annotated[
        list[Path], typer.Argument(help="Checkpoints and deployments; several stand side by side.")
    ],
    perplexity: Annotated[
        str | None,
        typer.Option(
            "--perplexity", "-p", help="Text: a file, wikitext, c4, ptb, or hf:N:C:S:COL."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Of lm-evaluation-harness, by commas; `paper` is the paper's seven."),
    ] = None,
    tasks_path: Annotated[
        Path | None, typer.Option(help="A folder with task files (YAML) of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many documents a task.")] = None,
    window: Annotated[int, typer.Option(help="Tokens a window; for tasks, at most.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(help="At most so many windows; the whole text without it.")
    ] = None,
    device: Annotated[str, typer.Option(help="For checkpoints: auto, cpu or cuda.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="For checkpoints: auto, float32, bfloat16 or float16.")
    ] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(help="For checkpoints: windows or requests at once.")
    ] = None,
    blockwise: Annotated[
        bool | None,
        typer.Option(help="Perplexity with one block in memory at a time. [if short of it]"),
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", "-e", help="For deployments. [the one made for it]")
    ] = None,
    threads: Threads = None,
    trust_library: TrustLibrary = False,
    adapter: Annotated[
        Path | None, typer.Option(help="A LoRA adapter for the checkpoint, in PEFT's format.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity and tasks, of checkpoints and of deployments as they run."""
    from owl_deploy.evaluate.show import show

    asked = api.Asked(
        text=perplexity,
        tasks=tuple(name for part in tasks or () for name in part.split(",") if name),
        tasks_path=tasks_path,
        window=window,
        windows=windows,
        limit=limit,
        hardware=api.Hardware(device, dtype, batch_size),
        blockwise=blockwise,
        engine=engine,
        threads=threads,
        trust_library=trust_library,
        adapter=adapter,
    )
    found = api.evaluate(models, asked)
    records = [one.to_json() for one in found]
    whole = records[0] if len(records) == 1 else {"models": records}
    _emit(whole, as_json, lambda: show(found))


@app.command()
def finetune(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: a Hugging Face model folder.")],
    output: Output,
    text: Annotated[
        str, typer.Option("--text", help="To train on: a file, wikitext, c4, ptb, or hf:N:C:S:COL.")
    ],
    method: Annotated[
        str, typer.Option("--method", "-m", help="lora, or masked: the weights that are left.")
    ] = "lora",
    merge: Annotated[
        str | None, typer.Option(help="masked: fold LoRA's adapter in, and keep the zeros.")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="A dense checkpoint to learn from as well.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the teacher's and the student's logits. [1]")
    ] = None,
    teacher_weight: Annotated[
        float | None, typer.Option(help="The teacher's share in the loss. [0.5]")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Steps of the optimizer. [one pass over the text]")
    ] = None,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop then, if the steps are not over before.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest. [lora 1e-4, masked 5e-4]")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 1,
    sequence_length: Annotated[int, typer.Option(help="Tokens a window.")] = 1024,
    gradient_accumulation: Annotated[int, typer.Option(help="Batches a step.")] = 1,
    warmup: Annotated[float, typer.Option(help="Share in which the learning rate rises.")] = 0.05,
    seed: Annotated[
        int, typer.Option(min=0, max=SEEDS, help="Of the order of windows, and of dropout.")
    ] = 0,
    block_group: Annotated[
        int | None, typer.Option(help="masked: train so many blocks at a time, to save memory.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="LoRA's. [8]")] = None,
    alpha: Annotated[int | None, typer.Option(help="LoRA's. [16]")] = None,
    dropout: Annotated[float | None, typer.Option(help="LoRA's. [0.05]")] = None,
    target_module: Annotated[
        list[str] | None, typer.Option(help="A layer for LoRA; repeat. [q_proj, v_proj]")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="To compute in: auto, float32 or bfloat16; it trains float32.")
    ] = "auto",
    resume: Resume = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Train a sparse checkpoint, or an adapter for it, so that it wins quality back."""
    from owl_deploy.finetune.show import show

    values = {
        "method": method,
        "merge": merge,
        "temperature": temperature,
        "teacher_weight": teacher_weight,
        "max_steps": max_steps,
        "max_minutes": max_minutes,
        "learning_rate": learning_rate,
        "batch_size": batch_size,
        "sequence_length": sequence_length,
        "gradient_accumulation": gradient_accumulation,
        "warmup": warmup,
        "seed": seed,
        "block_group": block_group,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": tuple(target_module) if target_module else None,
        "dtype": dtype,
    }
    manifest = api.finetune(
        checkpoint, output, text, values, teacher=teacher, force=force, resume=resume
    )
    _emit(manifest.to_json(), as_json, lambda: show(manifest, str(output)))


@app.command()
def bench(
    deployments: Annotated[list[Path], typer.Argument(help="The deployments to judge.")],
    baseline: Annotated[
        list[Path] | None,
        typer.Option("--baseline", "-b", help="A dense deployment to compare with; repeatable."),
    ] = None,
    dense: Annotated[
        Path | None,
        typer.Option(help="A dense checkpoint: make the baselines of it that a user would have."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", "-e", help="Instead of the one each is made for; repeatable."),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="decode, prefill, generate, throughput; repeatable. [decode, prefill]"),
    ] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(help="Tokens that decoding attends to; repeatable. [512, or what fits]"),
    ] = None,
    prompt: Annotated[
        list[int] | None, typer.Option(help="Tokens of a prompt; repeatable. [128, or what fits]")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Rows decoded together; repeatable. [1]")
    ] = None,
    streams: Annotated[
        list[int] | None, typer.Option(help="Streams at once, for throughput; repeatable. [2]")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer, for generate. [64]")
    ] = None,
    threads: Threads = None,
    trust_library: TrustLibrary = False,
    pairs: Annotated[int, typer.Option(help="Rounds; each is a fresh process a deployment.")] = 8,
    looks: Annotated[
        int | None,
        typer.Option(help="Up to so many times --pairs while inconclusive. [1; 3 with --check]"),
    ] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for one step of an engine.")] = 600,
    save_baseline: Annotated[
        Path | None, typer.Option(help="A file for later --check: one deployment, one baseline.")
    ] = None,
    check: Annotated[
        Path | None, typer.Option(help="Judge against a saved file: exit 0, 1 (worse), 3.")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Share of time that may be lost, when saved.")
    ] = 0.05,
    max_loss: MaxLoss = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit 1 where it would be 3.")] = False,
    summary: Annotated[
        Path | None, typer.Option(help="A file to append the verdicts to, as markdown.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A folder to write result.json to.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Measure deployments against dense baselines, with intervals; or gate a change."""
    from owl_deploy.bench.decision import read_loss
    from owl_deploy.bench.run import CHECK_LOOKS
    from owl_deploy.bench.table import show_outcome

    loss = read_loss(max_loss) if max_loss else None
    baselines = tuple(baseline or ())
    if dense:
        from owl_deploy.bench.dense import baselines_for

        baselines += baselines_for(dense, deployments, _export, trust_library=trust_library)
    sizes: dict[str, Any] = {"context": context, "prompt": prompt, "new_tokens": new_tokens}
    plan = api.BenchPlan(
        candidates=tuple(deployments),
        baselines=baselines,
        engines=tuple(engine or ()),
        scenarios=tuple(scenario or ("decode", "prefill")),
        batch=tuple(batch or (1,)),
        streams=tuple(streams or (2,)),
        threads=threads,
        trust_library=trust_library,
        pairs=pairs,
        looks=looks or (CHECK_LOOKS if check else 1),
        time_limit_s=time_limit,
        **{name: value for name, value in sizes.items() if value not in (None, [])},
    )
    outcome = api.run_gate(
        plan,
        save=save_baseline,
        check=check,
        margin=margin,
        output=output,
        force=force,
        summary=summary,
    )
    _emit(outcome.to_json(), as_json, lambda: show_outcome(outcome, max_loss=loss))
    sys.exit(outcome.exit_code(strict))


def _export(checkpoint: Path, output: Path, target: str, precision: str) -> None:
    """Export for another verb."""
    from owl_deploy.export.show import steps

    with steps() as progress:
        api.export(checkpoint, output, target=target, precision=precision, progress=progress)


@app.command()
def sweep(
    model: Annotated[Path, typer.Argument(help="A dense checkpoint: a Hugging Face model folder.")],
    output: Output,
    calibration: Annotated[
        str, typer.Option("--calibration", "-c", help="Text to prune by, as for prune.")
    ],
    perplexity: Annotated[str, typer.Option("--perplexity", "-p", help="Text to evaluate on.")],
    plan: Annotated[Path | None, typer.Option(help="A YAML file; options go over it.")] = None,
    method: Annotated[list[str] | None, typer.Option("--method", "-m")] = None,
    allocation: Annotated[list[str] | None, typer.Option("--allocation", "-a")] = None,
    sparsity: Annotated[list[float] | None, typer.Option("--sparsity", "-s")] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            "-t",
            metavar="NAME[:PRECISION]",
            help="As for export: owl, onnxruntime:int8, ...; repeatable. [onnxruntime]",
        ),
    ] = None,
    pairs: Annotated[int | None, typer.Option(help="Rounds of the benchmark. [8]")] = None,
    threads: Annotated[int | None, typer.Option(help="Of an engine. [the physical cores]")] = None,
    samples: Annotated[int, typer.Option(help="Calibration windows.")] = 128,
    sequence_length: Annotated[int, typer.Option(help="Tokens a calibration window.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens a window for perplexity.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="At most so many for perplexity.")] = None,
    as_json: Json = False,
) -> None:
    """Prune, export, evaluate and bench every combination; run it again to go on or to widen it."""
    from owl_deploy.bench import sweep as sweeps
    from owl_deploy.bench.table import show_trade_off
    from owl_deploy.export.targets import precision_of

    def prune_to(folder: Path, settings: dict[str, Any]) -> None:
        text = api.Calibration(calibration, samples, sequence_length)
        api.prune(model, folder, api.prune_settings(None, settings), text)

    def evaluate_it(folder: Path) -> None:
        from owl_deploy.evaluate.perplexity import deployment_perplexity

        deployment_perplexity(folder, perplexity, window=window, limit=windows, threads=threads)

    given = {
        "methods": method,
        "allocations": allocation,
        "sparsities": sparsity,
        "targets": target,
        "pairs": pairs,
        "threads": threads,
    }
    chosen = sweeps.read_plan(plan, {key: value for key, value in given.items() if value})
    steps = sweeps.Steps(
        validate=lambda settings: api.prune_settings(None, settings),
        precision=precision_of,
        prune=prune_to,
        export=_export,
        perplexity=evaluate_it,
        say=lambda text: typer.echo(text, err=True),
    )
    result = sweeps.sweep(model, output, chosen, steps)
    rows = sweeps.trade_off(result)
    _emit({"trade_off": rows}, as_json, lambda: show_trade_off(rows, output / sweeps.REPORT))
    sys.exit(4 if result.failures else 0)


@app.command()
def report(
    results: Annotated[
        list[Path], typer.Argument(help="What owl bench wrote; checkpoints that owl finetune did.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path(
        "report.html"
    ),
    max_loss: MaxLoss = None,
    as_json: Json = False,
) -> None:
    """Write benchmark results as one page with pictures and tables."""
    from owl_deploy.bench.decision import read_loss
    from owl_deploy.bench.report import write_report
    from owl_deploy.finetune.picture import learning_curve_svg
    from owl_deploy.finetune.show import caption
    from owl_deploy.manifest import Manifest, read_manifest

    found = {path: read_manifest(path, Manifest) for path in results}
    trained = {path: getattr(manifest, "finetune", None) for path, manifest in found.items()}
    curves = [
        (caption(str(path), done), learning_curve_svg(done.curve))
        for path, done in trained.items()
        if done
    ]
    loss = read_loss(max_loss) if max_loss else None
    measured = [api.read_result(path) for path in results if not trained[path]]
    write_report(measured, output, curves, loss)
    _emit({"report": str(output)}, as_json, lambda: typer.echo(output))


recipes_app = typer.Typer(no_args_is_help=True, help="The pruning recipes.")
app.add_typer(recipes_app, name="recipes")


@recipes_app.command(name="ls")
def list_recipes(as_json: Json = False) -> None:
    """List the recipes that come with owl, with what each is for."""
    from owl_deploy import recipe as recipes

    purposes = {
        name: path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
        for name, path in recipes.shipped().items()
    }
    width = max(map(len, purposes))
    _emit(
        purposes,
        as_json,
        lambda: typer.echo("\n".join(f"{n:{width}}  {text}" for n, text in purposes.items())),
    )


@recipes_app.command(name="show")
def show_recipe(
    name: Annotated[str, typer.Argument(help="A file, or the name of a shipped recipe.")],
) -> None:
    """Print a recipe."""
    from owl_deploy import recipe as recipes

    typer.echo(recipes.find(name).read_text(encoding="utf-8"), nl=False)


@recipes_app.command(name="validate")
def validate_recipe(
    name: Annotated[str, typer.Argument(help="A file, or the name of a shipped recipe.")],
    as_json: Json = False,
) -> None:
    """Read a recipe as `owl prune` does, and say what it means."""
    settings = api.prune_settings(Path(name), {}).model_dump(mode="json", exclude_defaults=False)
    _emit(
        settings,
        as_json,
        lambda: typer.echo("\n".join(f"{k:17} {v}" for k, v in settings.items() if v)),
    )


engines_app = typer.Typer(no_args_is_help=True, help="The inference engines.")
app.add_typer(engines_app, name="engines")


@engines_app.command(name="ls")
def list_engines(as_json: Json = False) -> None:
    """List the engines: installed version, what they open, what their licences allow."""
    from owl_deploy import engines
    from owl_deploy.engines.table import show

    known = engines.list_engines()
    _emit({"engines": known}, as_json, lambda: show(known))


@engines_app.command(name="install")
def install_engine(name: Annotated[str, typer.Argument(help="deepsparse.")]) -> None:
    """Make the environment of an engine that needs one of its own."""
    from owl_deploy import engines

    typer.echo(f"{name}: {engines.get_engine(name).licence}", err=True)
    folder = engines.install(name, lambda line: typer.echo(line, err=True))
    typer.echo(folder)


@engines_app.command(name="path")
def engine_path(name: Annotated[str, typer.Argument(help="owl, or another engine.")]) -> None:
    """Print where the owl operator library is, or the Python that drives another engine."""
    from owl_deploy import engines
    from owl_deploy.runtime import library_path

    engines.get_engine(name)
    typer.echo(library_path() if name == "owl" else engines.python_of(name))


@engines_app.command(name="remove")
def remove_engine(name: Annotated[str, typer.Argument(help="deepsparse.")]) -> None:
    """Delete the environment of an engine."""
    from owl_deploy import engines

    gone = engines.remove(name)
    typer.echo(f"{name} is removed" if gone else f"{name} was not installed", err=True)


def main() -> None:
    """Run `owl`; whatever it ends with becomes an exit code, and a sentence on stderr."""
    sys.exit(exit_code(app))
