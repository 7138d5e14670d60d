"""How soon each answer of a conversation begins, with and without what is known of its prompt.

    python benchmarks/conversation.py DEPLOYMENT [--turns 8] [--words 400] [--new-tokens 64]
        [--rounds 3] [--threads N] [-o FILE]

Serves DEPLOYMENT by `owl serve` and talks to it: a system message of so many words, then a turn
after the other, each with 30 words of the user's and all that was said before, answered greedily.
Per turn: the tokens of its prompt, how many of them were known (`cached_tokens`), the milliseconds
to the first text, and the same of the same prompt with `"cache_prompt": false`; medians of rounds,
each with other words. Fails where the two answers differ.
"""

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
from serve_load import served

from owl_deploy.bench.machine import look
from owl_deploy.bench.prompts import WORDS
from owl_deploy.utils.artefact import write_json

_SAID = 30  # words of the user's in a turn


def ask(url: str, body: dict[str, Any]) -> tuple[str, float, dict[str, Any]]:
    """The answer, the milliseconds to its first text, and its usage."""
    usage: dict[str, Any] = {}
    text, first_ms = "", 0.0
    started = time.perf_counter()
    with httpx.stream("POST", f"{url}/chat/completions", json=body, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            part = json.loads(line.removeprefix("data: "))
            usage = part.get("usage") or usage
            said = part["choices"][0]["delta"].get("content") if part["choices"] else None
            if said and not text:
                first_ms = (time.perf_counter() - started) * 1e3
            text += said or ""
    return text, first_ms, usage


def talk(url: str, model: str, given: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    """A row for each turn of one conversation."""
    words = random.Random(seed)

    def some(count: int) -> str:
        return " ".join(words.choices(WORDS, k=count))

    messages = [{"role": "system", "content": some(given.words)}]
    rows = []
    for turn in range(1, given.turns + 1):
        messages.append({"role": "user", "content": some(_SAID)})
        body = {
            "model": model,
            "messages": messages,
            "max_tokens": given.new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        text, known_ms, usage = ask(url, body)
        again, anew_ms, _ = ask(url, {**body, "cache_prompt": False})
        if text != again:
            raise SystemExit(f"turn {turn}: {text!r} is not {again!r}")
        messages.append({"role": "assistant", "content": text})
        rows.append(
            {
                "turn": turn,
                "prompt_tokens": usage["prompt_tokens"],
                "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                "first_ms": known_ms,
                "anew_ms": anew_ms,
            }
        )
    return rows


def main() -> None:
    """Talk as often as asked, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("deployment", type=Path)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--words", type=int, default=400)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    given.url, given.batch, given.waiting = None, 8, 16
    with served(given) as (url, model, _):
        rounds = [talk(url, model, given, seed) for seed in range(given.rounds)]
    rows = [
        {name: statistics.median(row[name] for row in turn) for name in turn[0]}
        for turn in zip(*rounds, strict=True)
    ]
    print("turn  prompt  known  first text, ms  anew, ms")
    for row in rows:
        print(
            f"{row['turn']:>4}{row['prompt_tokens']:>8.0f}{row['cached_tokens']:>7.0f}"
            f"{row['first_ms']:>16.0f}{row['anew_ms']:>10.0f}"
        )
    if given.output:
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        result = {"command": command, "machine": look().model_dump(), "rows": rows}
        write_json(given.output, {**result, "rounds": rounds})


if __name__ == "__main__":
    main()
