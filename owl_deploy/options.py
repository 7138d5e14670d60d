"""The options of the command line; a function of `cli.py` names those that its verb has.

An option without a default here or there is None until it is given: what decides lies in the
settings of the verb.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, BadParameter, Option

from owl_deploy.compression.allocation.rules import ALLOCATIONS, DEFAULT
from owl_deploy.compression.methods import PRUNING

SEEDS = 2**31 - 1  # the largest that every library takes
_CORES = "CPU threads of the engine. [the physical cores]"
_SOURCE = "file, folder, quoted pattern, wikitext, c4, ptb, or hf:NAME:CONFIG:SPLIT:COLUMN."


def text(given: str) -> str:
    """A name or a path, which no verb takes empty."""
    if not given:
        raise BadParameter("it is empty; perhaps a variable is not set.")
    return given


def path(given: str | Path) -> Path:
    """A path, as such; the empty one would be the working folder."""
    return Path(text(str(given)))


# --- of several verbs -----------------------------------------------------------------------------

Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, Option("--force", "-f", help="Replace an output that is there.")]
Resume = Annotated[bool, Option("--resume", help="Continue a run that was stopped.")]
Output = Annotated[Path, Option("--output", "-o", parser=path, help="The folder to write.")]
Threads = Annotated[int | None, Option("--threads", "-t", help=_CORES)]
ThreadsInFull = Annotated[int | None, Option("--threads", min=1, help=_CORES)]
TrustLibrary = Annotated[
    bool, Option("--trust-library", help="Run operators that a deployment brings, not owl's own.")
]
MaxLoss = Annotated[
    str | None,
    Option(
        parser=text,
        help="Loss of quality that is acceptable in the choice of what to deploy, such as 2%. "
        "[0.5% of log-perplexity, or one standard error of the difference in a task's score]",
    ),
]
QualityMetric = Annotated[
    str | None,
    Option(
        help="Quality to choose by: perplexity, humaneval (pass@1), or another task that owl eval "
        "has measured. [humaneval if all were asked the same problems, else perplexity]"
    ),
]
CheckpointFolder = Annotated[
    Path, Argument(parser=path, help="A model folder, or a name on the Hugging Face Hub.")
]
CalibrationText = Annotated[
    str | None,
    Option("--calibration", "-c", parser=text, help=f"Text to calibrate on: {_SOURCE}"),
]
PerplexityText = Annotated[
    str | None, Option("--perplexity", "-p", help=f"Text to measure on: {_SOURCE}")
]
Samples = Annotated[int, Option(help="Calibration windows.")]
WeighingText = Annotated[
    str | None,
    Option(
        "--calibration",
        "-c",
        parser=text,
        help="For llama.cpp's types: text on which it counts what a weight is worth (its "
        f"importance matrix); IQ2_M needs it. {_SOURCE}",
    ),
]
CalibrationLength = Annotated[int, Option(help="Tokens in a calibration window.")]

# --- prune ----------------------------------------------------------------------------------------

Model = Annotated[
    str, Argument(parser=text, help="A model folder, or a name on the Hugging Face Hub.")
]
Recipe = Annotated[
    Path | None,
    Option(
        parser=path,
        help="A SparseML recipe: file, shipped name, or pruned checkpoint; options override it.",
    ),
]
Method = Annotated[
    str | None,
    Option(
        "--method",
        "-m",
        help=f"{', '.join(PRUNING)}. [wanda; sparsegpt with --budget]",
    ),
]
_RULES = ", ".join(name for name, row in ALLOCATIONS.items() if row.divides)
Allocation = Annotated[
    str | None,
    Option(
        "--allocation", "-a", help=f"How sparsity is divided over layers: {_RULES}. [{DEFAULT}]"
    ),
]
Sparsity = Annotated[
    float | None, Option("--sparsity", "-s", help="Share of weights to remove. [0.5]")
]
Structure = Annotated[
    str | None,
    Option(
        help="unstructured, or N:M: keep N of every M weights; N varies by layer unless "
        "--allocation uniform. [unstructured]"
    ),
]
OutlierMultiple = Annotated[
    float | None,
    Option(help="For owl: an outlier is above this many times the mean. [5]"),
]
_SPREADS = ", ".join(f"{name} {row.spread:g}" for name, row in ALLOCATIONS.items() if row.spread)
Spread = Annotated[float | None, Option(help=f"Half the range of sparsities. [{_SPREADS}]")]
Skip = Annotated[
    list[str] | None, Option(help="A layer to leave dense, such as down_proj; repeatable. [none]")
]
HeadSparsity = Annotated[
    float | None,
    Option(
        help="Share to remove of the output head (and of the embedding, if the same matrix). [none]"
    ),
]
Bits = Annotated[
    int | None,
    Option(help="Round what survives to 8, 4 or 3 bits, compensated by the text. [as the model's]"),
]
HeadBits = Annotated[
    int | None,
    Option(
        help="Round the output head as well, to 4 or 3 bits. [no: the export takes 8; a budget in "
        "MB decides itself]"
    ),
]
QuantizeBits = Annotated[int | None, Option(help="8, 4 or 3 bits a weight. [4, without --budget]")]
QuantizeBudget = Annotated[
    str | None,
    Option(
        help="Give each layer the bits that lose least within bits per weight (3.5), a "
        "deployment's size (400MB), or a speed-up over int8 on this machine (1.5x). [none]"
    ),
]
QuantizeAsymmetric = Annotated[
    bool | None,
    Option(help="Asymmetric calibration (GPTAQ): make up for earlier layers' errors, too. [yes]"),
]
BitsGroup = Annotated[
    int | None, Option("--group", help="Columns that share a scale: 32, 64 or 128. [32]")
]
Budget = Annotated[
    str | None,
    Option(
        help="Give each layer the bits and sparsity that lose least within bits per weight (3.5), "
        "a deployment's size (400MB), or a speed-up over int8 on this machine (1.5x). "
        "[none]"
    ),
]
Refit = Annotated[
    bool | None,
    Option(
        "--refit", help="Refit the weights that are left to the calibration text; alps always does."
    ),
]
Reconstruct = Annotated[
    int | None,
    Option(help="Epochs of training each half block to give the dense one's output. [off]"),
]
Asymmetric = Annotated[
    bool | None,
    Option(
        help="Let each layer make up for what those before it lost, too: sparsegpt, alps, "
        "--refit, --bits, --budget. [where weights are rounded]",
    ),
]
WindowSeed = Annotated[int, Option(min=0, max=SEEDS, help="Random seed for the choice of windows.")]
Device = Annotated[str, Option(help="Where to compute: auto, cpu or cuda.")]
Dtype = Annotated[str, Option(help="Type to compute in: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, Option(help="Windows at once. [by free memory]")]
Tune = Annotated[str | None, Option(hidden=True)]  # gone, and refused with what to use instead

# --- export, generate, verify ---------------------------------------------------------------------

Target = Annotated[str, Option("--target", "-t", help="onnxruntime, owl, llama.cpp or deepsparse.")]
Precision = Annotated[
    str | None,
    Option(
        "--precision",
        "-p",
        help="How the weights are held: fp32, int8 or int4 for onnxruntime; bf16, int8, int4, "
        "int3 or fp32 for owl; Q8_0, Q4_K_M, Q4_0, IQ4_XS, Q3_K_M, IQ3_M, Q2_K or IQ2_M for "
        "llama.cpp; fp32 for deepsparse. [the first of the target]",
    ),
]
Head = Annotated[
    str | None,
    Option(
        help="For owl, how the output head is stored: screened (int8; for unlikely tokens only 4 "
        "bits are read) or whole (like the other weights). [screened for int8, int4 and int3, "
        "unless the head was rounded to fewer bits; else whole]"
    ),
]
GenaiDeployment = Annotated[
    Path, Argument(parser=path, help="A deployment for owl, onnxruntime or llama.cpp.")
]
ServedDeployment = Annotated[
    Path, Argument(parser=path, help="A deployment for owl or onnxruntime.")
]
Host = Annotated[str, Option(help="Address to listen on; one that others reach needs OWL_API_KEY.")]
Port = Annotated[int, Option(min=0, max=65535, help="The port; 0 takes a free one.")]
ServedBatch = Annotated[
    int, Option(min=1, help="Requests answered side by side, at most (32 is the limit).")
]
Waiting = Annotated[
    int, Option(min=0, help="Requests that may wait behind those; one more gets 429.")
]
ServedContext = Annotated[
    int | None,
    Option(
        min=2,
        help="Most tokens of a prompt and its answer together. [4096, or what the model takes]",
    ),
]
ServedNames = Annotated[
    list[str] | None,
    Option(
        "--name",
        parser=text,
        help="What requests call the model; repeatable. [the folder's name]",
    ),
]
RequestLog = Annotated[
    bool, Option("--log", help="Say a line of each request: its tokens, not its text.")
]
AnyDeployment = Annotated[
    Path, Argument(parser=path, help="A deployment, which may be a stranger's.")
]
Prompt = Annotated[str | None, Argument(help="What the model continues; - reads it from stdin.")]
PromptFile = Annotated[
    Path | None, Option(parser=path, help="A UTF-8 file with the prompt, instead of PROMPT.")
]
Chat = Annotated[bool, Option("--chat", help="Put the prompt into the model's chat template.")]
System = Annotated[
    str | None, Option(help="With --chat: the system's message, before the prompt. [none]")
]
Stop = Annotated[
    list[str] | None,
    Option("--stop", parser=text, help="End before this string; repeatable. [none]"),
]
MaxNewTokens = Annotated[
    int | None,
    Option(
        "--max-new-tokens",
        "-n",
        help="Most tokens to generate; -1: until the context is full. [128, or what fits]",
    ),
]
DoSample = Annotated[
    bool,
    Option(
        "--do-sample",
        help="Choose tokens at random by probability, instead of always the likeliest.",
    ),
]
Temperature = Annotated[
    float | None,
    Option(
        help="With --do-sample: divides the logits; above 1 is more varied, 0 takes the likeliest. "
        "[the model's, or 1]"
    ),
]
TopK = Annotated[
    int | None,
    Option(
        help="With --do-sample: choose among this many likeliest tokens; 0 or -1: all. "
        "[the model's, or 50]"
    ),
]
TopP = Annotated[
    float | None,
    Option(
        help="With --do-sample: choose among the likeliest tokens of this total probability. "
        "[the model's, or 1]"
    ),
]
RepetitionPenalty = Annotated[
    float | None,
    Option(
        help="Above 1: tokens that occurred before become less likely. [1; with --do-sample the "
        "deployment's]"
    ),
]
DraftFolder = Annotated[
    str | None,
    Option(
        "--draft",
        help="Speed up with a smaller deployment of the same vocabulary, whose proposals this "
        "one verifies, or with lookup, which finds them in the text. The text stays this one's.",
    ),
]
DraftTokens = Annotated[
    int | None, Option(help="Tokens the draft proposes at a time. [as many as pay, up to 15]")
]
SamplingSeed = Annotated[
    int | None, Option(min=0, max=SEEDS, help="Random seed, with --do-sample. [another each time]")
]

# --- eval -----------------------------------------------------------------------------------------

Models = Annotated[
    list[Path],
    Argument(
        parser=path, help="Model folders, Hub names and deployments; several stand side by side."
    ),
]
Tasks = Annotated[
    list[str] | None,
    Option(help="lm-evaluation-harness tasks, separated by commas; paper: the paper's seven."),
]
TasksPath = Annotated[
    Path | None, Option(parser=path, help="A folder with task files (YAML) of your own.")
]
AllowCode = Annotated[
    bool, Option("--allow-code", help="Run what the model writes for humaneval, in a sandbox.")
]
Limit = Annotated[
    int | None, Option(help="Use only the first this many documents of a task. [all]")
]
Every = Annotated[
    int,
    Option(min=1, metavar="N", help="Use every N-th document of a task, starting with the first."),
]
Window = Annotated[int, Option(help="Tokens in a window; for tasks, the most the model sees.")]
Windows = Annotated[int | None, Option(help="Most windows of the text to use. [all]")]
Divergence = Annotated[
    bool,
    Option(
        "--divergence",
        help="Also tell how far each model's predictions are from the first's (KL). Takes disk: "
        "2 bytes a token of the text and word of the vocabulary.",
    ),
]
CheckpointDevice = Annotated[str, Option(help="For checkpoints: auto, cpu or cuda.")]
CheckpointDtype = Annotated[
    str, Option(help="For checkpoints: auto, float32, bfloat16 or float16.")
]
CheckpointBatch = Annotated[
    int | None,
    Option(
        help="For checkpoints: windows at once, a block at a time (--blockwise), or requests. "
        "[windows by free memory, 1 request]"
    ),
]
Blockwise = Annotated[
    bool | None, Option(help="Perplexity with one block in memory at a time. [if memory is short]")
]
Engine = Annotated[
    str | None, Option("--engine", "-e", help="For deployments: the engine. [the one exported for]")
]
Adapter = Annotated[
    Path | None, Option(parser=path, help="A LoRA adapter for the checkpoint, in PEFT's format.")
]

# --- finetune -------------------------------------------------------------------------------------

TrainingText = Annotated[
    list[str], Option("--text", help=f"Text to train on; repeatable: {_SOURCE}")
]
TrainingMethod = Annotated[
    str,
    Option(
        "--method", "-m", help="lora: train an adapter; masked: train the weights that are left."
    ),
]
Merge = Annotated[
    str | None, Option(help="masked: fold the LoRA adapter into the weights, and keep the zeros.")
]
Teacher = Annotated[
    str | None, Option(parser=text, help="A dense checkpoint to learn from as well.")
]
LogitTemperature = Annotated[
    float | None,
    Option(help="Distillation: temperature of the teacher's and the student's logits. [1]"),
]
TeacherWeight = Annotated[
    float | None, Option(help="Distillation: the teacher's share in the loss. [0.5]")
]
FeatureWeight = Annotated[
    float | None,
    Option(help="Distillation: weight of the blocks' squared errors against the teacher. [0]"),
]
TeacherTop = Annotated[
    int | None,
    Option(help="Distillation: how many of the teacher's likeliest tokens count. [all]"),
]
MaxSteps = Annotated[
    int | None,
    Option(help="Optimizer steps. [one pass over the text; with --max-minutes at most four]"),
]
MaxMinutes = Annotated[
    float | None, Option(help="Stop after this many minutes, if steps are left. [no limit]")
]
LearningRate = Annotated[
    float | None,
    Option(
        help="Peak learning rate; masked: as a share of the size of each tensor's weights. "
        "[lora 1e-4, masked 0.0013]"
    ),
]
TrainingBatch = Annotated[int, Option(help="Windows at once, in each process.")]
TrainingLength = Annotated[int, Option(help="Tokens in a window.")]
GradientAccumulation = Annotated[int, Option(help="Batches per optimizer step.")]
Warmup = Annotated[
    float, Option(help="Share of the run in which the learning rate rises to its peak.")
]
TrainingSeed = Annotated[
    int, Option(min=0, max=SEEDS, help="Random seed for the order of windows and for dropout.")
]
BlockGroup = Annotated[
    int | None, Option(help="masked: train this many blocks at a time, to save memory. [all]")
]
Shard = Annotated[
    bool, Option("--shard", help="Divide the model over the processes (FSDP2), to save memory.")
]
Rank = Annotated[int | None, Option(help="lora: rank of the adapter. [8]")]
Alpha = Annotated[int | None, Option(help="lora: scale of the adapter (alpha). [16]")]
Dropout = Annotated[float | None, Option(help="lora: dropout. [0.05]")]
TargetModules = Annotated[
    list[str] | None,
    Option(
        "--target-module", help="lora: a layer to adapt; repeatable. [query and value projections]"
    ),
]
TrainingDtype = Annotated[
    str,
    Option(help="Type of matrix products: auto, float32 or bfloat16; weights train in float32."),
]

# --- bench ----------------------------------------------------------------------------------------

Candidates = Annotated[list[Path], Argument(parser=path, help="The deployments to judge.")]
Baselines = Annotated[
    list[Path] | None,
    Option("--baseline", "-b", parser=path, help="A dense deployment to compare with; repeatable."),
]
Dense = Annotated[
    Path | None,
    Option(
        parser=path,
        help="A dense model folder to export baselines from: onnxruntime in fp32, int8 and int4, "
        "and whatever the deployments run in, if that skips zeros.",
    ),
]
Engines = Annotated[
    list[str] | None,
    Option("--engine", "-e", help="Engine to run in; repeatable. [the one each was exported for]"),
]
Scenarios = Annotated[
    list[str] | None,
    Option(
        "--scenario",
        help="What to time: decode, prefill, generate, throughput, answers, requests, or one exact "
        "case such as decode@512x4; repeatable. [decode, prefill; with --draft answers]",
    ),
]
Context = Annotated[
    list[int] | None,
    Option(help="Context length while decoding; repeatable. [512, or what fits]"),
]
PromptTokens = Annotated[
    list[int] | None, Option(help="Prompt length in tokens; repeatable. [128, or what fits]")
]
Prompts = Annotated[
    Path | None,
    Option(parser=path, help="JSON lines with a prompt each, for answers. [some shipped ones]"),
]
BenchDraft = Annotated[
    str | None,
    Option(
        "--draft",
        help="Measure each deployment with this draft (as for generate) against itself without.",
    ),
]
Batch = Annotated[list[int] | None, Option(help="Sequences decoded together; repeatable. [1]")]
Streams = Annotated[
    list[int] | None, Option(help="Streams at once, for throughput; repeatable. [2]")
]
Clients = Annotated[
    list[int] | None,
    Option(help="Clients at once, for requests; repeatable. [1, 4, 16]"),
]
NewTokens = Annotated[
    int | None, Option(help="Tokens of an answer, for generate, answers and requests. [64]")
]
Pairs = Annotated[
    int, Option(help="Rounds, each a fresh process per deployment; 8 or more for a gate.")
]
Looks = Annotated[
    int | None,
    Option(help="Repeat the rounds up to this many times while undecided. [1; 3 with --check]"),
]
TimeLimit = Annotated[
    float, Option("--time-limit", help="Seconds that one step of an engine may take.")
]
SaveBaseline = Annotated[
    Path | None,
    Option(
        parser=path, help="Write a file for later --check, of one deployment and one --baseline."
    ),
]
Check = Annotated[
    Path | None,
    Option(
        parser=path, help="Judge against such a file; exit code 0: fine, 1: worse, 3: undecided."
    ),
]
Margin = Annotated[
    float | None, Option(help="With --save-baseline: share of time that may be lost. [0.05]")
]
Strict = Annotated[bool, Option("--strict", help="With --check: exit with 1 instead of 3.")]
Summary = Annotated[
    Path | None,
    Option(parser=path, help="With --check: a Markdown file to append the verdicts to."),
]
ResultFolder = Annotated[
    Path | None, Option("--output", "-o", parser=path, help="A folder to write result.json to.")
]

# --- sweep, report --------------------------------------------------------------------------------

DenseModel = Annotated[
    Path, Argument(parser=path, help="A dense Hugging Face model folder (no Hub name).")
]
SweepCalibration = Annotated[
    str, Option("--calibration", "-c", help="Text to prune by, as for prune.")
]
SweepText = Annotated[str, Option("--perplexity", "-p", help="Text to evaluate on.")]
SweepFile = Annotated[
    Path | None,
    Option("--plan", parser=path, help="A YAML file with these settings; options override it."),
]
Methods = Annotated[
    list[str] | None, Option("--method", "-m", help="As for prune; repeatable. [wanda]")
]
Allocations = Annotated[
    list[str] | None, Option("--allocation", "-a", help=f"As for prune; repeatable. [{DEFAULT}]")
]
Sparsities = Annotated[
    list[float] | None,
    Option("--sparsity", "-s", help="Share of weights to remove; repeatable. [0.5, 0.7]"),
]
Targets = Annotated[
    list[str] | None,
    Option(
        "--target",
        "-t",
        metavar="NAME[:PRECISION]",
        help="As for export: owl, onnxruntime:int8, ...; repeatable. [onnxruntime]",
    ),
]
SweepPairs = Annotated[int | None, Option(min=1, help="Rounds of the benchmark. [8]")]
SweepSamples = Annotated[int | None, Option(min=1, help="Calibration windows. [128]")]
SweepLength = Annotated[int | None, Option(min=2, help="Tokens in a calibration window. [2048]")]
SweepWindow = Annotated[int | None, Option(min=2, help="Tokens in a window for perplexity. [2048]")]
SweepWindows = Annotated[int | None, Option(min=1, help="Most windows for perplexity. [all]")]
DryRun = Annotated[
    bool, Option("--dry-run", help="Only say what would be done, and what is done already.")
]
Ray = Annotated[
    str | None,
    Option(
        parser=text,
        metavar="ADDRESS",
        help="Run the tasks on the Ray cluster there: auto, HOST:PORT, or local for one on this "
        "machine. [here, one after the other]",
    ),
]
Store = Annotated[
    str | None,
    Option(
        parser=text,
        metavar="ADDRESS",
        help="Where the artefacts go on --ray, such as s3://BUCKET/FOLDER, if the nodes share no "
        "folder; results are copied to --output. [the output folder]",
    ),
]
Needs = Annotated[
    list[str] | None,
    Option(
        metavar="KIND=AMOUNTS",
        help="What a task has for itself on --ray, such as prune=4cpu,16GB,1gpu; repeatable. "
        "KIND: prune, export, evaluate or bench, which has all cores of its node.",
    ),
]
RecipeName = Annotated[
    str,
    Argument(parser=text, help="A file, a pruned checkpoint, or the name of a shipped recipe."),
]
Results = Annotated[
    list[Path], Argument(parser=path, help="Folders that owl bench -o or owl finetune wrote.")
]
Page = Annotated[Path, Option("--output", "-o", parser=path, help="The page to write.")]
