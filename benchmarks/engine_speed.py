"""Time whole deployments in onnxruntime-genai: decode at a context, and prefill of prompts.

python benchmarks/engine_speed.py NAME=DEPLOYMENT ... [-o benchmarks/results/engine_speed.json]

The first deployment is the baseline of the ratios. Every round starts one fresh process for each
candidate, in an order that turns round from one round to the next; a candidate's figure is the
median over rounds of its process's median.
All engines get the same random prompt tokens and thread count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from owl_deploy.bench.machine import look

# Each worker prints a line of JSON: milliseconds of decode (median), of each prefill (best of two).
GENAI_WORKER = """
import json, statistics, sys, time
import numpy as np, onnxruntime_genai as og
folder, context, tokens, prompts, threads, vocabulary = sys.argv[1], *json.loads(sys.argv[2])
started = time.perf_counter()
config = og.Config(folder)
options = {"session_options": {"intra_op_num_threads": threads}}
config.overlay(json.dumps({"model": {"decoder": options}}))
model = og.Model(config)
out = {"load": (time.perf_counter() - started) * 1e3}
ids = np.random.default_rng(0).integers(10, vocabulary, max(context, *prompts)).astype(np.int32)
def generator(length):
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
    return og.Generator(model, parameters)
for prompt in prompts:
    times = []
    for _ in range(2):
        g = generator(prompt + 2)
        start = time.perf_counter()
        g.append_tokens(ids[:prompt])
        g.generate_next_token()
        times.append(time.perf_counter() - start)
        del g
    out[f"prefill_{prompt}"] = min(times) * 1e3
g = generator(context + tokens + 8)
g.append_tokens(ids[:context])
for _ in range(4):
    g.generate_next_token()
times = []
for _ in range(tokens):
    start = time.perf_counter()
    g.generate_next_token()
    times.append(time.perf_counter() - start)
out["decode"] = statistics.median(times) * 1e3
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        out["peak_mb"] = int(line.split()[1]) / 1024
print(json.dumps(out))
"""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("deployments", nargs="+", metavar="NAME=DEPLOYMENT")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--prompts", type=int, nargs="*", default=[128, 512])
    parser.add_argument(
        "--vocabulary", type=int, default=5000, help="prompt tokens are drawn below this"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--lock", type=Path, help="a file to lock around each process, on a shared machine"
    )
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    settings = json.dumps(
        [
            arguments.context,
            arguments.tokens,
            arguments.prompts,
            arguments.threads,
            arguments.vocabulary,
        ]
    )
    candidates = {
        name: [sys.executable, "-c", GENAI_WORKER, path, settings]
        for name, path in (item.split("=", 1) for item in arguments.deployments)
    }
    samples = collect(candidates, arguments.rounds, arguments.lock)
    table = summarise(samples)
    for name, row in table.items():
        print(name, json.dumps(row))
    if arguments.output:
        arguments.output.write_text(
            json.dumps(
                {
                    "command": " ".join(sys.argv),
                    "machine": look(0.1).cpu,
                    "load_average": os.getloadavg(),
                    "baseline": next(iter(table)),
                    "summary": table,
                    "samples": samples,
                },
                indent=1,
            )
            + "\n"
        )


def collect(
    candidates: dict[str, list[str]], rounds: int, lock: Path | None
) -> dict[str, list[dict[str, float]]]:
    """One process of each candidate a round; the order is reversed every other round."""
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in candidates}
    for turn in range(rounds):
        order = list(candidates) if turn % 2 == 0 else list(reversed(candidates))
        for name in order:
            command = candidates[name] if lock is None else ["flock", str(lock), *candidates[name]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
            samples[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(turn, name, samples[name][-1], file=sys.stderr, flush=True)
    return samples


def summarise(samples: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians in ms (MB for memory), and speed-ups over the first candidate, pair by pair."""
    baseline = next(iter(samples.values()))
    table = {}
    for name, runs in samples.items():
        row = {key: round(statistics.median(run[key] for run in runs), 2) for key in runs[0]}
        for key in row.copy():
            if key == "decode" or key.startswith("prefill"):
                ratios = [b[key] / run[key] for b, run in zip(baseline, runs, strict=True)]
                row[f"{key}_speedup"] = round(statistics.median(ratios), 2)
        table[name] = row
    return table


if __name__ == "__main__":
    main()
