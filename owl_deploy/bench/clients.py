"""Clients at once against a server of OpenAI's API, and what they see of it.

Each asks again as soon as it has its answer, greedily and streamed.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

_TIMEOUT_S = 600.0  # between two parts of an answer
_SAID = 200  # letters of a refusal that an error shows


@dataclass(frozen=True)
class Load:
    """What each client asks of `model` at `url`: answers of `new_tokens` tokens.

    `leave`: the share of the requests whose client goes away after the first text; `limit_s`: what
    one may take; `varied`: answers have that many tokens in the mean, drawn from 1 on.
    """

    url: str
    model: str
    new_tokens: int
    leave: float = 0.0
    key: str = "none"
    limit_s: float | None = None
    varied: bool = False

    def draw_tokens(self, generator: random.Random) -> int:
        """How many tokens the next answer is to have."""
        return generator.randrange(1, 2 * self.new_tokens) if self.varied else self.new_tokens


@dataclass
class Tally:
    """What all clients saw: seconds to the first text, between texts, and of it all; counts.

    `tokens`: of answers that were heard to the end, as the server counts them.
    """

    first_s: list[float] = field(default_factory=list)
    between_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    answered: int = 0
    tokens: int = 0
    left: int = 0
    refused: int = 0
    errors: list[str] = field(default_factory=list)


async def ask_all(load: Load, clients: int, prompts: Iterator[str]) -> Tally:
    """Have `clients` at once ask the next of `prompts` each, until there is none.

    A client that is refused with 429 waits as it is told. Other errors are counted. Raises
    `TimeoutError` for an answer that takes longer than the load's limit.
    """
    headers = {"authorization": f"Bearer {load.key}"}
    # A connection for each request: llama.cpp's server ends one with the stream that it carried,
    # and who asks again at once may still find it open.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    tally = Tally()
    # The environment may name a proxy, and what that takes is not to be measured.
    async with httpx.AsyncClient(
        timeout=_TIMEOUT_S, headers=headers, limits=limits, trust_env=False
    ) as connections:
        started = time.monotonic()
        asking = (_client(connections, load, number, prompts, tally) for number in range(clients))
        await asyncio.gather(*asking)
        tally.wall_s = time.monotonic() - started
    return tally


async def _client(
    connections: httpx.AsyncClient, load: Load, number: int, prompts: Iterator[str], tally: Tally
) -> None:
    generator = random.Random(number)
    for prompt in prompts:
        leaves = generator.random() < load.leave
        tokens = load.draw_tokens(generator)
        try:
            async with asyncio.timeout(load.limit_s):
                await _ask(connections, load, prompt, tokens, leaves, tally)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            tally.errors.append(f"{type(error).__name__}: {error}")


async def _ask(
    connections: httpx.AsyncClient,
    load: Load,
    prompt: str,
    tokens: int,
    leaves: bool,
    tally: Tally,
) -> None:
    """One request, for `tokens` tokens; the client `leaves` after the first text."""
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        # No fields of OpenAI's; servers that do not know them count the tokens all the same.
        "ignore_eos": True,
        "cache_prompt": False,
    }
    last = time.monotonic()
    async with connections.stream("POST", f"{load.url}/completions", json=body) as answer:
        if answer.status_code == httpx.codes.TOO_MANY_REQUESTS:
            tally.refused += 1
            await asyncio.sleep(float(answer.headers.get("retry-after", 1)))
            return
        if answer.is_error:
            said = (await answer.aread()).decode(errors="replace")[:_SAID]
            raise ValueError(f"{answer.status_code} {said}")
        texts = usage = 0
        async for part in _parts(answer):
            now = time.monotonic()
            usage = (part.get("usage") or {}).get("completion_tokens", usage)
            if part["choices"] and part["choices"][0]["text"]:
                (tally.between_s if texts else tally.first_s).append(now - last)
                last, texts = now, texts + 1
                if leaves:
                    tally.left += 1
                    return
    if not texts and not usage:
        raise ValueError("an answer without a token")
    tally.answered += 1
    tally.tokens += usage or texts


async def _parts(answer: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The server-sent events of a streamed answer; raises `ValueError` for one that is an error."""
    is_whole = False
    async for line in answer.aiter_lines():
        if not line.startswith("data: "):
            continue
        if is_whole := line == "data: [DONE]":
            continue
        part = json.loads(line.removeprefix("data: "))
        if "error" in part:
            raise ValueError(f"the server said {str(part['error'])[:_SAID]}")
        yield part
    if not is_whole:
        raise ValueError("an answer that breaks off")
