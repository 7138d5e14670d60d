"""Clients at once against `owl serve`, or another server of OpenAI's API, for as long as you like.

    python benchmarks/serve_load.py DEPLOYMENT [--clients 1 2 4 8 16] [--seconds 60] [-o FILE]
        [--new-tokens 64] [--varied] [--words 60] [--leave 0.1] [--threads N] [--batch 8]
        [--waiting 16]
    python benchmarks/serve_load.py --url http://127.0.0.1:8080/v1 --model NAME --pid PID

What `owl bench --scenario requests` does not do: minutes of load, clients that leave, memory. Each
client asks again as soon as it has its answer, greedily and streamed; prompts have other words from
their first on, so that no cache helps. Per number of clients: requests and tokens a second;
p50 and p99 of the time to the first text and between texts, in ms; errors; refusals (429, upon
which a client waits as it is told); the server's resident memory before and after. `--leave`: the
share of the requests whose client goes away within the answer; `--varied`: answers of 1 to twice
`--new-tokens` tokens, drawn. Clients take a core's share, too.
"""

import argparse
import asyncio
import contextlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from owl_deploy.bench.clients import Load, ask_all
from owl_deploy.bench.machine import look
from owl_deploy.bench.prompts import WORDS
from owl_deploy.utils.artefact import write_json


def prompts(words: int, seconds: float, seed: int = 0) -> Iterator[str]:
    """Prompts of so many words each, for so many seconds."""
    generator, until = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < until:
        yield " ".join(generator.choices(WORDS, k=words))


def measure(
    load: Load, clients: int, asked: Iterator[str], server: psutil.Process
) -> dict[str, Any]:
    """What `clients` at once saw until there was nothing more to ask."""
    before = server.memory_info().rss
    tally = asyncio.run(ask_all(load, clients, asked))
    return {
        "clients": clients,
        "seconds": tally.wall_s,
        "requests_per_s": tally.answered / tally.wall_s,
        "tokens_per_s": tally.tokens / tally.wall_s,
        "first_ms": percentiles(tally.first_s),
        "between_ms": percentiles(tally.between_s),
        "answered": tally.answered,
        "left": tally.left,
        "refused": tally.refused,
        "errors": len(tally.errors),
        "error": tally.errors[0] if tally.errors else "",
        "rss_bytes": [before, server.memory_info().rss],
    }


def percentiles(times_s: list[float]) -> dict[str, float]:
    """p50 and p99 in ms; nothing of nothing."""
    if not times_s:
        return {}
    return {f"p{q}": float(np.percentile(times_s, q)) * 1e3 for q in (50, 99)}


def said(row: dict[str, Any]) -> str:
    """A row for people."""

    def both(name: str) -> str:
        found = row[name]
        return f"{found['p50']:.0f} / {found['p99']:.0f}" if found else "-"

    memory = " -> ".join(f"{rss / 2**20:.0f}" for rss in row["rss_bytes"])
    return (
        f"{row['clients']:>2} clients, {row['seconds']:.0f} s: {row['requests_per_s']:.2f} "
        f"requests/s, {row['tokens_per_s']:.1f} tokens/s; first {both('first_ms')} ms, between "
        f"{both('between_ms')} ms (p50 / p99); {row['answered']} answered, {row['left']} left, "
        f"{row['refused']} refused, {row['errors']} errors {row['error']}; {memory} MiB"
    )


@contextlib.contextmanager
def served(arguments: argparse.Namespace) -> Iterator[tuple[str, str, psutil.Process]]:
    """The URL, the model's name and the process of the server that was named, or of our own."""
    if arguments.url:
        yield arguments.url, arguments.model, psutil.Process(arguments.pid)
        return
    options = ["--port", "0", "--batch", str(arguments.batch), "--waiting", str(arguments.waiting)]
    if arguments.threads:
        options += ["--threads", str(arguments.threads)]
    command = [sys.executable, "-m", "owl_deploy", "serve", str(arguments.deployment), *options]
    environment = {key: value for key, value in os.environ.items() if key != "OWL_API_KEY"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            before = []  # a server may have something to say before it says where it is
            for line in process.stderr:
                if " at http" in line:
                    break
                before.append(line)
            else:
                raise SystemExit("".join(before))
            # A pipe that nobody reads fills, and then a server that has something to say stops.
            said_later = (process.stderr, sys.stderr)
            threading.Thread(target=shutil.copyfileobj, args=said_later, daemon=True).start()
            name = arguments.deployment.resolve().name
            yield line.split()[-1], name, psutil.Process(process.pid)
        finally:
            process.terminate()


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("deployment", type=Path, nargs="?")
    parser.add_argument("--url")
    parser.add_argument("--model")
    parser.add_argument("--pid", type=int)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--varied", action="store_true")
    parser.add_argument("--words", type=int, default=60)
    parser.add_argument("--leave", type=float, default=0.0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--waiting", type=int, default=16)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    if bool(arguments.deployment) == bool(arguments.url):
        parser.error("give a deployment, or --url")
    if arguments.url and not (arguments.model and arguments.pid):
        parser.error("--url needs --model and --pid")
    return arguments


def main() -> None:
    """Measure each number of clients, after an unmeasured request."""
    arguments, rows = parsed(), []
    with served(arguments) as (url, model, server):
        load = Load(url, model, arguments.new_tokens, arguments.leave, varied=arguments.varied)
        measure(load, 1, prompts(arguments.words, 0.1), server)
        for clients in arguments.clients:
            asked = prompts(arguments.words, arguments.seconds)
            rows.append(measure(load, clients, asked, server))
            print(said(rows[-1]), flush=True)
    result = {"command": " ".join(sys.argv), "machine": look().model_dump(), "rows": rows}
    if arguments.output:
        write_json(arguments.output, result)
    if any(row["errors"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
