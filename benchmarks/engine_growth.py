"""How the engine's decode time, load time and memory grow with size, sparsity and context.

python benchmarks/engine_growth.py [--sizes NAME ...] [--sparsities S ...] [--lock FILE] [--resume]
                                   [-o benchmarks/results/engine_growth.json]

Llama models with random weights, of which the blocks lose a random share, exported to `owl` int8;
and dense fp32 in onnxruntime-genai beside them (sparsity "fp32"). One fresh process a measurement;
each figure is the median over the rounds, which go through all contexts before one comes again.
Load time is the second opening's of a file that is in the page cache. `peak_mb`
is the process's peak memory (a part of the prompt has logits of all its tokens), `model_mb` what is
resident after some tokens, less what a process holds that has the runtime and a model of next to
nothing; the KV cache is in both, and stated beside them.
Writes data and a picture.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from owl_deploy.bench.machine import look
from owl_deploy.utils.picture import plain_log_scale, svg

# hidden, ffn, blocks, heads, KV heads, head size, vocabulary
SIZES: dict[str, tuple[int, int, int, int, int, int, int]] = {
    "nothing": (64, 64, 1, 1, 1, 64, 300),  # for the memory that the runtime itself takes
    "24M": (320, 864, 12, 5, 5, 64, 32768),
    "135M": (576, 1536, 30, 9, 3, 64, 49152),  # SmolLM2-135M
    "360M": (960, 2560, 32, 15, 5, 64, 49152),  # SmolLM2-360M
    "1B": (2048, 8192, 16, 32, 8, 64, 128256),  # Llama-3.2-1B
}
SPARSITIES = ("0", "0.5", "0.6", "0.7", "0.8", "0.9")
DENSE = "fp32"
CONTEXTS = (128, 512, 2048)

# A line of JSON: ms of decode (median) and of the second load, MB of memory and of the KV cache.
WORKER = """
import json, statistics, sys, time
import numpy as np, onnxruntime_genai as og
folder, context, tokens, threads, vocabulary = sys.argv[1], *json.loads(sys.argv[2])
def kilobytes(name):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(name))
def opened():
    config = og.Config(folder)
    options = {"session_options": {"intra_op_num_threads": threads}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    start = time.perf_counter()
    model = og.Model(config)
    return model, (time.perf_counter() - start) * 1e3
loads = []
for _ in range(2):
    model = None
    model, load = opened()
    loads.append(load)
parameters = og.GeneratorParams(model)
length = context + tokens + 4
parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
generator = og.Generator(model, parameters)
ids = np.random.default_rng(0).integers(10, vocabulary, context).astype(np.int32)
generator.append_tokens(ids)
for _ in range(4):
    generator.generate_next_token()
times = []
for _ in range(tokens - 1):
    start = time.perf_counter()
    generator.generate_next_token()
    times.append((time.perf_counter() - start) * 1e3)
print(json.dumps({"decode_ms": statistics.median(times), "load_ms": loads[-1],
                  "peak_mb": kilobytes("VmHWM") / 1024, "resident_mb": kilobytes("VmRSS") / 1024}))
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES)[1:], choices=SIZES)
    parser.add_argument("--sparsities", nargs="+", default=[DENSE, *SPARSITIES])
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS))
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--lock", type=Path, help="a file to lock around each process, on a shared machine"
    )
    parser.add_argument("--resume", action="store_true", help="keep what the output holds already")
    parser.add_argument("--work", type=Path, help="keep the models and deployments there")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("benchmarks/results/engine_growth.json")
    )
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    asked = {name: getattr(arguments, name) for name in ("contexts", "tokens", "rounds", "threads")}
    if arguments.resume and arguments.output.is_file():
        known = json.loads(arguments.output.read_text())
        if known.get("asked", asked) != asked:
            parser.error(f"{arguments.output} was made with other options")
        rows = known["rows"]
    with tempfile.TemporaryDirectory() as scratch:
        work = arguments.work or Path(scratch)
        runtime = runtime_mb(work)
        for size in arguments.sizes:
            for sparsity in arguments.sparsities:
                if any(r["size"] == size and r["sparsity"] == sparsity for r in rows):
                    continue
                deployment = deployed(work, size, sparsity)
                rows += measured(deployment, size, sparsity, runtime, arguments)
                if arguments.work is None:
                    shutil.rmtree(deployment)
                write(arguments.output, asked, rows, runtime)
    draw(arguments.output.with_suffix(".svg"), rows)


def deployed(work: Path, size: str, sparsity: str) -> Path:
    """The deployment, made if it is not in `work`."""
    out = work / f"{size}-{sparsity}"
    if out.is_dir():
        return out
    dense = sparsity == DENSE
    model = checkpoint(work / f"{size}-{sparsity}-model", size, 0.0 if dense else float(sparsity))
    target = ["onnxruntime"] if dense else ["owl", "--precision", "int8"]
    command = [sys.executable, "-m", "owl_deploy", "export", str(model), "-o", str(out)]
    subprocess.run([*command, "--target", *target], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(model)
    return out


def checkpoint(folder: Path, size: str, sparsity: float) -> Path:
    """A Llama with random weights, `sparsity` of its blocks' zero, and a tokenizer of bytes."""
    import tokenizers
    import torch
    import transformers

    hidden, ffn, blocks, heads, kv_heads, head, vocabulary = SIZES[size]
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                parameter[torch.rand_like(parameter) < sparsity] = 0
    model.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bytes_only = tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    tokenizer = tokenizers.Tokenizer(bytes_only)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def measured(
    deployment: Path, size: str, sparsity: str, runtime: float, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row a context: medians over the rounds, and the samples."""
    samples: dict[int, list[dict[str, float]]] = {c: [] for c in arguments.contexts}
    hidden, ffn, blocks, heads, kv_heads, head, vocabulary = SIZES[size]
    block = 2 * hidden * head * (heads + kv_heads) + 3 * hidden * ffn
    for _ in range(arguments.rounds):
        for context in arguments.contexts:
            settings = json.dumps([context, arguments.tokens, arguments.threads, vocabulary])
            command = [sys.executable, "-c", WORKER, str(deployment), settings]
            if arguments.lock is not None:
                command = ["flock", str(arguments.lock), *command]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            samples[context].append(json.loads(done.stdout.splitlines()[-1]))
            print(size, sparsity, context, samples[context][-1], file=sys.stderr, flush=True)
    cached = 2 * blocks * kv_heads * head * (4 if sparsity == DENSE else 2)  # bytes a token
    return [
        {
            "size": size,
            "sparsity": sparsity,
            "context": context,
            "file_mb": sum(file.stat().st_size for file in deployment.iterdir()) / 2**20,
            "kv_cache_mb": cached * (context + arguments.tokens + 4) / 2**20,
            "million_weights": (blocks * block + vocabulary * hidden) / 1e6,
            **{key: statistics.median(s[key] for s in found) for key in found[0]},
            "model_mb": statistics.median(s["resident_mb"] for s in found) - runtime,
            "samples": found,
        }
        for context, found in samples.items()
    ]


def runtime_mb(work: Path) -> float:
    """Resident MB of a process that holds onnxruntime-genai and a model of next to nothing."""
    command = [sys.executable, "-c", WORKER, str(deployed(work, "nothing", "0"))]
    command.append(json.dumps([64, 8, 2, 300]))
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mb"])


def write(path: Path, asked: dict[str, Any], rows: list[dict[str, Any]], runtime: float) -> None:
    """The data so far: a stopped run goes on with --resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python benchmarks/engine_growth.py",
        "asked": asked,
        "machine": look().model_dump(),
        "load_average": os.getloadavg(),
        "runtime_mb": round(runtime, 1),
        "rows": rows,
    }
    path.write_text(json.dumps(result, indent=1) + "\n")


def draw(path: Path, rows: list[dict[str, Any]]) -> None:
    """Four pictures: time against size, sparsity and context; memory against the file."""
    contexts = sorted({row["context"] for row in rows})
    middle = contexts[len(contexts) // 2]
    rows = [{**row, "name": f"{row['size']} {row['sparsity']}"} for row in rows]
    here = [row for row in rows if row["context"] == middle]
    sparse = [row for row in here if row["sparsity"] != DENSE]
    zeros = [{**row, "zeros": 100 * float(row["sparsity"])} for row in sparse]
    usual = [row for row in rows if row["sparsity"] in ("0", "0.7")]

    def pictures(grid: Any) -> None:  # noqa: ANN401
        (by_size, by_zeros), (by_context, memory) = grid
        lines(by_size, here, "million_weights", "decode_ms", "sparsity")
        by_size.set(xlabel="weights, millions", ylabel=f"decode at {middle} tokens, ms")
        lines(by_zeros, zeros, "zeros", "decode_ms", "size")
        by_zeros.set(xlabel="sparsity, %", ylabel=f"decode at {middle} tokens, ms")
        lines(by_context, usual, "context", "decode_ms", "name")
        by_context.set(xlabel="context, tokens", ylabel="decode, ms")
        lines(memory, here, "file_mb", "model_mb", "size")
        top = max(row["file_mb"] for row in here)
        memory.plot([0, top], [0, 1.2 * top], color="grey", linewidth=1, label="file + 20 %")
        memory.set(xlabel="file, MB", ylabel="resident memory over the runtime's, MB")
        for axes in (by_size, by_zeros, by_context):
            plain_log_scale(axes)
        for axes in grid.flat:
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        memory.figure.suptitle(look().cpu)

    path.write_text(svg(pictures, (10, 7.5), (2, 2)))


def lines(axes: Any, rows: list[dict[str, Any]], x: str, y: str, label: str) -> None:  # noqa: ANN401
    """A line for each value of the column `label`."""
    for value in dict.fromkeys(row[label] for row in rows):
        points = sorted((row[x], row[y]) for row in rows if row[label] == value)
        axes.plot(*zip(*points, strict=True), "o-", markersize=4, label=value)


if __name__ == "__main__":
    main()
