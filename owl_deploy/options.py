"""The options of the command line; a function of `cli.py` names those that its verb has.

An option without a default here or there is None until it is given: what decides lies in the
settings of the verb.
"""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from owl_deploy.allocation import ALLOCATIONS, DEFAULT
from owl_deploy.methods import METHODS

SEEDS = 2**31 - 1  # the largest that every library takes
_CORES = "Of an engine. [the physical cores]"
_SOURCE = "a file, a folder, a pattern, wikitext, c4, ptb, or hf:N:C:S:COL."

# --- of several verbs -----------------------------------------------------------------------------

Json = Annotated[bool, Option("--json", help="Print the result as JSON on stdout.")]
Force = Annotated[bool, Option("--force", "-f", help="Replace an output that is there.")]
Resume = Annotated[bool, Option("--resume", help="Continue a run that was stopped.")]
Output = Annotated[Path, Option("--output", "-o", help="The folder to write.")]
Threads = Annotated[int | None, Option("--threads", "-t", help=_CORES)]
ThreadsInFull = Annotated[int | None, Option("--threads", help=_CORES)]
TrustLibrary = Annotated[
    bool, Option("--trust-library", help="Run operators that a deployment brings, not owl's own.")
]
MaxLoss = Annotated[
    str | None,
    Option(help="Quality that may go in the choice of what to deploy, such as 2%. [none]"),
]
QualityMetric = Annotated[
    str | None,
    Option(
        help="What that quality is: perplexity, humaneval (pass@1), or another task that owl eval "
        "has measured. [humaneval if all have it, else perplexity]"
    ),
]
CheckpointFolder = Annotated[Path, Argument(help="A checkpoint: a Hugging Face model folder.")]
CalibrationText = Annotated[str | None, Option("--calibration", "-c", help=f"Text: {_SOURCE}")]
PerplexityText = Annotated[str | None, Option("--perplexity", "-p", help=f"Text: {_SOURCE}")]
Samples = Annotated[int, Option(help="Calibration windows.")]
CalibrationLength = Annotated[int, Option(help="Tokens a calibration window.")]

# --- prune ----------------------------------------------------------------------------------------

Model = Annotated[str, Argument(help="A model folder, or a name on the Hugging Face Hub.")]
Recipe = Annotated[
    Path | None,
    Option(help="A file in SparseML's grammar, or a shipped name; options override it."),
]
Method = Annotated[str | None, Option("--method", "-m", help=f"{', '.join(METHODS)}. [wanda]")]
_RULES = ", ".join(name for name, row in ALLOCATIONS.items() if row.divides)
Allocation = Annotated[
    str | None, Option("--allocation", "-a", help=f"How sparsity is divided: {_RULES}. [{DEFAULT}]")
]
Sparsity = Annotated[
    float | None, Option("--sparsity", "-s", help="Share of weights to remove. [0.7]")
]
Structure = Annotated[
    str | None, Option(help="unstructured, or N:M: N kept of M, mixed unless uniform.")
]
OutlierMultiple = Annotated[
    float | None, Option(help="OWL's M: an outlier is above M times the mean. [5]")
]
_SPREADS = ", ".join(f"{name} {row.spread:g}" for name, row in ALLOCATIONS.items() if row.spread)
Spread = Annotated[float | None, Option(help=f"Half the range of sparsities. [{_SPREADS}]")]
Skip = Annotated[
    list[str] | None, Option(help="A layer to leave dense, such as down_proj; repeat.")
]
HeadSparsity = Annotated[
    float | None,
    Option(help="Prune the output head too, and the embedding if they are one matrix."),
]
Bits = Annotated[
    int | None,
    Option(help="Round what survives to 8, 4 or 3 bits; the inputs say how. [as the model's]"),
]
HeadBits = Annotated[
    int | None,
    Option(
        help="Round the output head as well, to 4 or 3 bits. [8 by the export; of a budget in MB, "
        "what loses least]"
    ),
]
BitsGroup = Annotated[
    int | None, Option("--group", help="Columns that share a scale: 32, 64 or 128. [32]")
]
Budget = Annotated[
    str | None,
    Option(
        help="Bits a weight, such as 3.5, the size of all packed weights, such as 400MB, or the "
        "gain over int8 on this machine, such as 1.5x: each layer gets the bits and the sparsity "
        "that lose least within it. [none]"
    ),
]
Refit = Annotated[
    bool | None,
    Option("--refit", help="Give the weights that are left better values; alps always does."),
]
Reconstruct = Annotated[
    int | None,
    Option(help="Train what is left of each half block to give the dense one's output: epochs."),
]
WindowSeed = Annotated[int, Option(min=0, max=SEEDS, help="Of the draw of windows.")]
Device = Annotated[str, Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, Option(help="To compute in: auto, float32, bfloat16 or float16.")]
BatchSize = Annotated[int | None, Option(help="Windows at once. [by free memory]")]
Tune = Annotated[
    float | None,
    Option(help="Search each layer's sparsity on held-out text for so many minutes."),
]

# --- export, generate, verify ---------------------------------------------------------------------

Target = Annotated[str, Option("--target", "-t", help="onnxruntime, owl, llama.cpp or deepsparse.")]
Precision = Annotated[
    str | None,
    Option(
        "--precision",
        "-p",
        help="How the weights are held: fp32, int8 or int4 for onnxruntime; bf16, int8, int4, "
        "int3 or fp32 for owl; Q8_0, Q4_K_M, Q4_0, Q3_K_M or Q2_K for llama.cpp; fp32 for "
        "deepsparse. [the first]",
    ),
]
Head = Annotated[
    str | None,
    Option(
        help="For owl: screened, an int8 head of which tokens far from the likeliest get 4 "
        "bits, or whole, like the other weights. [screened for integers that it was not rounded "
        "to before, else whole]"
    ),
]
GenaiDeployment = Annotated[Path, Argument(help="A deployment for owl, onnxruntime or llama.cpp.")]
ServedDeployment = Annotated[Path, Argument(help="A deployment for owl or onnxruntime.")]
Host = Annotated[str, Option(help="The address to listen at; OWL_API_KEY must be set for others'.")]
Port = Annotated[int, Option(min=0, max=65535, help="The port; 0 takes a free one.")]
ServedBatch = Annotated[
    int, Option(min=1, help="Requests that wait are answered together, up to so many.")
]
Waiting = Annotated[int, Option(min=0, help="Requests in line behind those that are answered.")]
ServedContext = Annotated[int, Option(min=2, help="Tokens of a prompt and its answer, at most.")]
AnyDeployment = Annotated[Path, Argument(help="A deployment, also one that others made.")]
Prompt = Annotated[str | None, Argument(help="What the model continues; - reads it from stdin.")]
PromptFile = Annotated[Path | None, Option(help="A UTF-8 file with the prompt, instead of PROMPT.")]
Chat = Annotated[bool, Option("--chat", help="Put the prompt into the model's chat template.")]
MaxNewTokens = Annotated[
    int | None,
    Option(
        "--max-new-tokens",
        "-n",
        help="At most so many; -1: on until the context is full. [128, or what fits]",
    ),
]
DoSample = Annotated[
    bool, Option("--do-sample", help="Sample; without it the likeliest token is taken.")
]
DraftFolder = Annotated[
    str | None,
    Option(
        "--draft",
        help="A deployment with the same tokens that proposes some, for this one to verify; or "
        "lookup, to find them in the text itself. The text stays the deployment's own.",
    ),
]
DraftTokens = Annotated[int | None, Option(help="Proposed at a time. [as many as pay, up to 15]")]
SamplingSeed = Annotated[int | None, Option(min=0, max=SEEDS, help="Of sampling.")]

# --- eval -----------------------------------------------------------------------------------------

Models = Annotated[
    list[Path], Argument(help="Checkpoints and deployments; several stand side by side.")
]
Tasks = Annotated[
    list[str] | None,
    Option(help="Of lm-evaluation-harness, by commas; `paper` is the paper's seven."),
]
TasksPath = Annotated[Path | None, Option(help="A folder with task files (YAML) of your own.")]
AllowCode = Annotated[
    bool, Option("--allow-code", help="Run what the model writes for humaneval, in a sandbox.")
]
Limit = Annotated[int | None, Option(help="At most so many documents a task.")]
Every = Annotated[
    int, Option(min=1, metavar="N", help="Of a task every N-th document, the first among them.")
]
Window = Annotated[int, Option(help="Tokens a window; for tasks, at most.")]
Windows = Annotated[int | None, Option(help="At most so many windows; the whole text without it.")]
CheckpointDevice = Annotated[str, Option(help="For checkpoints: auto, cpu or cuda.")]
CheckpointDtype = Annotated[
    str, Option(help="For checkpoints: auto, float32, bfloat16 or float16.")
]
CheckpointBatch = Annotated[
    int | None, Option(help="For checkpoints: windows or requests at once.")
]
Blockwise = Annotated[
    bool | None, Option(help="Perplexity with one block in memory at a time. [if short of it]")
]
Engine = Annotated[
    str | None, Option("--engine", "-e", help="For deployments. [the one made for it]")
]
Adapter = Annotated[
    Path | None, Option(help="A LoRA adapter for the checkpoint, in PEFT's format.")
]

# --- finetune -------------------------------------------------------------------------------------

Trained = Annotated[str, Argument(help="A checkpoint: a Hugging Face model folder.")]
TrainingText = Annotated[list[str], Option("--text", help=f"To train on; repeat: {_SOURCE}")]
TrainingMethod = Annotated[
    str, Option("--method", "-m", help="lora, or masked: the weights that are left.")
]
Merge = Annotated[str | None, Option(help="masked: fold LoRA's adapter in, and keep the zeros.")]
Teacher = Annotated[str | None, Option(help="A dense checkpoint to learn from as well.")]
LogitTemperature = Annotated[
    float | None, Option(help="Of the teacher's and the student's logits. [1]")
]
TeacherWeight = Annotated[float | None, Option(help="The teacher's share in the loss. [0.5]")]
FeatureWeight = Annotated[
    float | None,
    Option(help="Of the squared errors of the blocks' outputs against the teacher's. [0]"),
]
TeacherTop = Annotated[
    int | None,
    Option(help="Its likeliest tokens that count, kept on disk where windows repeat. [all]"),
]
MaxSteps = Annotated[int | None, Option(help="Steps of the optimizer. [one pass over the text]")]
MaxMinutes = Annotated[float | None, Option(help="Stop then, if the steps are not over before.")]
LearningRate = Annotated[float | None, Option(help="At its highest. [lora 1e-4, masked 5e-4]")]
TrainingBatch = Annotated[int, Option(help="Windows at once.")]
TrainingLength = Annotated[int, Option(help="Tokens a window.")]
GradientAccumulation = Annotated[int, Option(help="Batches a step.")]
Warmup = Annotated[float, Option(help="Share in which the learning rate rises.")]
TrainingSeed = Annotated[
    int, Option(min=0, max=SEEDS, help="Of the order of windows, and of dropout.")
]
BlockGroup = Annotated[
    int | None, Option(help="masked: train so many blocks at a time, to save memory.")
]
Shard = Annotated[
    bool, Option("--shard", help="Divide the model over the processes (FSDP2), to save memory.")
]
Rank = Annotated[int | None, Option(help="LoRA's. [8]")]
Alpha = Annotated[int | None, Option(help="LoRA's. [16]")]
Dropout = Annotated[float | None, Option(help="LoRA's. [0.05]")]
TargetModules = Annotated[
    list[str] | None,
    Option("--target-module", help="A layer for LoRA; repeat. [what makes queries and values]"),
]
TrainingDtype = Annotated[
    str, Option(help="To compute in: auto, float32 or bfloat16; it trains float32.")
]

# --- bench ----------------------------------------------------------------------------------------

Candidates = Annotated[list[Path], Argument(help="The deployments to judge.")]
Baselines = Annotated[
    list[Path] | None,
    Option("--baseline", "-b", help="A dense deployment to compare with; repeatable."),
]
Dense = Annotated[
    Path | None,
    Option(help="A dense checkpoint: make the baselines of it that a user would have."),
]
Engines = Annotated[
    list[str] | None,
    Option("--engine", "-e", help="Instead of the one each is made for; repeatable."),
]
Scenarios = Annotated[
    list[str] | None,
    Option(
        "--scenario",
        help="decode, prefill, generate, throughput, answers, requests, or one such as "
        "decode@512x4; repeatable. [decode, prefill; with --draft answers]",
    ),
]
Context = Annotated[
    list[int] | None,
    Option(help="Tokens that decoding attends to; repeatable. [512, or what fits]"),
]
PromptTokens = Annotated[
    list[int] | None, Option(help="Tokens of a prompt; repeatable. [128, or what fits]")
]
Prompts = Annotated[
    Path | None, Option(help="JSON lines with a prompt each, for answers. [some shipped ones]")
]
BenchDraft = Annotated[
    str | None,
    Option(
        "--draft",
        help="Measure the deployments with a draft, as for generate, against themselves without.",
    ),
]
Batch = Annotated[list[int] | None, Option(help="Rows decoded together; repeatable. [1]")]
Streams = Annotated[
    list[int] | None, Option(help="Streams at once, for throughput; repeatable. [2]")
]
Clients = Annotated[
    list[int] | None,
    Option(help="Clients at once of a server, for requests; repeatable. [1, 4, 16]"),
]
NewTokens = Annotated[
    int | None, Option(help="Tokens of an answer, for generate, answers and requests. [64]")
]
Pairs = Annotated[int, Option(help="Rounds; each is a fresh process a deployment.")]
Looks = Annotated[
    int | None,
    Option(help="Up to so many times --pairs while inconclusive. [1; 3 with --check]"),
]
TimeLimit = Annotated[float, Option("--time-limit", help="Seconds for one step of an engine.")]
SaveBaseline = Annotated[
    Path | None, Option(help="A file for later --check: one deployment, one baseline.")
]
Check = Annotated[Path | None, Option(help="Judge against a saved file: exit 0, 1 (worse), 3.")]
Margin = Annotated[
    float | None, Option(help="Share of time that may be lost, for --save-baseline. [0.05]")
]
Strict = Annotated[bool, Option("--strict", help="Exit 1 where it would be 3.")]
Summary = Annotated[Path | None, Option(help="A file to append the verdicts to, as markdown.")]
ResultFolder = Annotated[
    Path | None, Option("--output", "-o", help="A folder to write result.json to.")
]

# --- sweep, report --------------------------------------------------------------------------------

DenseModel = Annotated[Path, Argument(help="A dense checkpoint: a Hugging Face model folder.")]
SweepCalibration = Annotated[
    str, Option("--calibration", "-c", help="Text to prune by, as for prune.")
]
SweepText = Annotated[str, Option("--perplexity", "-p", help="Text to evaluate on.")]
SweepFile = Annotated[Path | None, Option("--plan", help="A YAML file; options go over it.")]
Methods = Annotated[list[str] | None, Option("--method", "-m")]
Allocations = Annotated[list[str] | None, Option("--allocation", "-a")]
Sparsities = Annotated[list[float] | None, Option("--sparsity", "-s")]
Targets = Annotated[
    list[str] | None,
    Option(
        "--target",
        "-t",
        metavar="NAME[:PRECISION]",
        help="As for export: owl, onnxruntime:int8, ...; repeatable. [onnxruntime]",
    ),
]
SweepPairs = Annotated[int | None, Option(help="Rounds of the benchmark. [8]")]
SweepSamples = Annotated[int | None, Option(help="Calibration windows. [128]")]
SweepLength = Annotated[int | None, Option(help="Tokens a calibration window. [2048]")]
SweepWindow = Annotated[int | None, Option(help="Tokens a window for perplexity. [2048]")]
SweepWindows = Annotated[int | None, Option(help="At most so many for perplexity.")]
DryRun = Annotated[
    bool, Option("--dry-run", help="Only say what would be done, and what is done already.")
]
Ray = Annotated[
    str | None,
    Option(
        metavar="ADDRESS",
        help="Run the tasks on the Ray cluster there: auto, HOST:PORT, or local for one on this "
        "machine. [here, one after the other]",
    ),
]
Store = Annotated[
    str | None,
    Option(
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
Results = Annotated[
    list[Path], Argument(help="What owl bench wrote; checkpoints that owl finetune did.")
]
Page = Annotated[Path, Option("--output", "-o", help="The page to write.")]
