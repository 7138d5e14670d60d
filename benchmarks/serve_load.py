"""Clients at once against `owl serve`, or another server of OpenAI's API, for as long as you like.

    python benchmarks/serve_load.py DEPLOYMENT [--clients 1 2 4 8 16] [--seconds 60] [-o FILE]
        [--new-tokens 64] [--words 60] [--leave 0.1] [--threads N] [--batch 8] [--waiting 16]
    python benchmarks/serve_load.py --url http://127.0.0.1:8080/v1 --model NAME --pid PID

Each client asks again as soon as it has its answer, greedily and streamed; prompts have other words
from their first on, so that no cache helps. Per number of clients: requests and tokens a second;
p50 and p99 of the time to the first text and between texts, in ms; errors; refusals (429, upon
which a client waits as it is told); the server's resident memory before and after. `--leave`: the
share of the requests whose client goes away within the answer. Clients take a core's share, too.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import psutil

from owl_deploy.artefact import write_json
from owl_deploy.bench.machine import look

WORDS = ("river", "mill", "clock", "snow", "hills", "wind", "lantern", "letter", "stone", "road")
TIMEOUT_S = 600.0


@dataclass
class Tally:
    """What all clients saw: seconds to the first text and between texts; counts."""

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    answered: int = 0
    tokens: int = 0
    left: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Load:
    """What each client asks of `model` at `url`."""

    url: str
    model: str
    new_tokens: int = 64
    words: int = 60
    leave: float = 0.0
    seed: int = 0
    key: str = "none"


async def client(load: Load, number: int, until: float, tally: Tally) -> None:
    """Ask one request after another until `until`, on the monotonic clock."""
    generator = random.Random(f"{load.seed}-{number}")
    headers = {"authorization": f"Bearer {load.key}"}
    async with httpx.AsyncClient(timeout=TIMEOUT_S, headers=headers) as connection:
        while time.monotonic() < until:
            prompt = " ".join(generator.choices(WORDS, k=load.words))
            leaves = generator.random() < load.leave
            try:
                await ask(connection, load, prompt, leaves, tally)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                tally.errors.append(f"{type(error).__name__}: {error}")


async def ask(
    connection: httpx.AsyncClient, load: Load, prompt: str, leaves: bool, tally: Tally
) -> None:
    """One request; the client `leaves` after the first text."""
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.new_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    last = started = time.monotonic()
    async with connection.stream("POST", f"{load.url}/completions", json=body) as answer:
        if answer.status_code == 429:
            tally.refused += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
            return
        answer.raise_for_status()
        heard = usage = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            part, now = json.loads(line.removeprefix("data: ")), time.monotonic()
            usage = (part.get("usage") or {}).get("completion_tokens", usage)
            if part["choices"] and part["choices"][0]["text"]:
                (tally.between_s if heard else tally.first_s).append(now - last)
                last, heard = now, heard + 1
                if leaves:
                    tally.left += 1
                    return
        if last == started and not usage:
            raise ValueError("an answer without a token")
        tally.answered += 1
        tally.tokens += usage or heard


async def measure(
    load: Load, clients: int, seconds: float, server: psutil.Process
) -> dict[str, Any]:
    """`clients` at once for `seconds`, and what they saw."""
    tally, before, started = Tally(), server.memory_info().rss, time.monotonic()
    await asyncio.gather(
        *(client(load, number, started + seconds, tally) for number in range(clients))
    )
    wall_s = time.monotonic() - started
    return {
        "clients": clients,
        "seconds": wall_s,
        "requests_per_s": tally.answered / wall_s,
        "tokens_per_s": tally.tokens / wall_s,
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
            line = process.stderr.readline()
            if " at http" not in line:
                raise SystemExit(line + process.stderr.read())
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
        load = Load(url, model, arguments.new_tokens, arguments.words, arguments.leave)
        asyncio.run(measure(load, 1, 0.1, server))
        for clients in arguments.clients:
            rows.append(asyncio.run(measure(load, clients, arguments.seconds, server)))
            print(said(rows[-1]), flush=True)
    result = {"command": " ".join(sys.argv), "machine": look().model_dump(), "rows": rows}
    if arguments.output:
        write_json(arguments.output, result)
    if any(row["errors"] for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
