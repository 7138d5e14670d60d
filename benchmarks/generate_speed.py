"""Whether `owl generate` decodes as fast as `owl bench` says: both in turn, in fresh processes.

python benchmarks/generate_speed.py DEPLOYMENT TEXT [--rounds 6]

The last 32 tokens of a context of 512 in both. Prints the medians, and the median of the ratios of
the same round with their range; TEXT is a file of some thousand words.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from tokenizers import Tokenizer

from owl_deploy.bench.machine import look
from owl_deploy.inference import EngineProcess, engine_for, open_deployment, threads_for

CONTEXT, STEPS, WARMUP = 512, 32, 8


def prompt_of(tokenizer: Tokenizer, text: str, length: int) -> str:
    """The beginning of `text` that has `length` tokens."""
    ids = tokenizer.encode(text).ids
    for cut in range(length, length + 20):  # words that were cut have other tokens
        prompt: str = tokenizer.decode(ids[:cut])
        if len(tokenizer.encode(prompt).ids) == length:
            return prompt
    raise SystemExit("No beginning of this text has the length: take another.")


def benched(folder: Path, engine: str, threads: int, tokens: list[int]) -> float:
    """Tokens/s of decoding as `owl bench` times it: the mean, which `owl generate` tells."""
    with EngineProcess(engine, folder, threads=threads, context=CONTEXT) as process:
        prompt = tokens[: CONTEXT - STEPS - WARMUP]
        answer = process.request("decode", prompt=prompt, steps=STEPS, warmup=WARMUP)
    latencies: list[float] = answer["latencies_ms"]
    return 1e3 / mean(latencies)


def generated(folder: Path, threads: int, prompt: Path) -> float:
    """Tokens/s as `owl generate` tells them."""
    command = [sys.executable, "-m", "owl_deploy", "generate", str(folder), "--json"]
    command += ["--prompt-file", str(prompt), "-n", str(STEPS + 1), "--threads", str(threads)]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    if found["new_tokens"] != STEPS + 1 or found["prompt_tokens"] != CONTEXT - STEPS:
        raise SystemExit("The model ended its answer early: take another text.")
    return float(found["tokens_per_s"])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("deployment", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args()
    threads = threads_for(asked.threads)
    engine = engine_for(open_deployment(asked.deployment).target).name
    tokenizer = Tokenizer.from_file(str(asked.deployment / "tokenizer.json"))
    prompt = prompt_of(tokenizer, asked.text.read_text(encoding="utf-8"), CONTEXT - STEPS)
    rows: list[dict[str, float]] = []
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", suffix=".txt") as file:
        file.write(prompt)
        file.flush()
        measures = {
            "bench": lambda: benched(
                asked.deployment, engine, threads, tokenizer.encode(prompt).ids
            ),
            "generate": lambda: generated(asked.deployment, threads, Path(file.name)),
        }
        for index in range(asked.rounds):
            order = list(measures) if index % 2 == 0 else list(measures)[::-1]
            rows.append({name: measures[name]() for name in order})
    ratios = [row["generate"] / row["bench"] for row in rows]
    here = look()
    found = {
        "cpu": here.name,
        "busy_cores": here.busy_cores,
        "threads": threads,
        "bench_tokens_per_s": median(row["bench"] for row in rows),
        "generate_tokens_per_s": median(row["generate"] for row in rows),
        "generate_over_bench": [median(ratios), min(ratios), max(ratios)],
        "rounds": rows,
    }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
