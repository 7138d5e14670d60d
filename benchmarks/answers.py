"""A chat model's own answers to requests about Python functions: a text for its sparse form.

    owl serve DENSE --batch 16 --waiting 32 --context 1024
    python benchmarks/answers.py PACKAGE... -o answers.jsonl [--url http://127.0.0.1:8000/v1]
        [--requests 200] [--of-one 70] [--new-tokens 512] [--clients 16] [--seed 0]

The requests are made of the functions in the folders PACKAGE that have a docstring and are short:
to write one from its signature and docstring, or from what it does; to test one; to say what one
does. At most `--of-one` of them are about one PACKAGE. None is HumanEval's, nor in its words. FILE
gets a line for each conversation, as `owl finetune --text` and `owl prune --calibration` read it,
and is gone on with; an answer that is not finished after so many tokens is left out.
"""

import argparse
import ast
import asyncio
import json
import random
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from openai import APIConnectionError, AsyncOpenAI

from owl_deploy.utils.progress import bar

_DOCSTRING = range(60, 700)  # characters
_LINES = 70
_SOURCE = 1500  # characters of a function that is asked about as a whole


class Function(NamedTuple):
    """A function: its name, arguments and docstring, the lines to that's end, and all of it."""

    name: str
    arguments: str
    docstring: str
    head: str
    source: str


def functions(file: Path) -> Iterator[Function]:
    """Those of a module that say what they do, are short, and are not for their module alone."""
    try:
        source = file.read_text(encoding="utf-8")
        module = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.splitlines()
    for node in module.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or len(node.body) < 2:
            continue
        docstring = ast.get_docstring(node) or ""
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        if len(docstring) not in _DOCSTRING or not node.args.args or last - first > _LINES:
            continue
        yield Function(
            node.name,
            ast.unparse(node.args),
            re.sub(r"\n{2,}", "\n", docstring),
            "\n".join(lines[first : node.body[0].end_lineno]),
            "\n".join(lines[first:last])[:_SOURCE],
        )


def request(function: Function, drawn: float) -> str:
    """What is asked about a function, by a number from 0 to 1."""
    if drawn < 0.45:
        return (
            "Please write the body of this function and give me the complete code.\n\n"
            f"```python\n{function.head}\n```"
        )
    if drawn < 0.75:
        called = f"{function.name}({function.arguments})"
        return f"Write a Python function `{called}`. {function.docstring}"
    if drawn < 0.85:
        return (
            "Write a few test cases for this function, with plain asserts.\n\n"
            f"```python\n{function.head}\n```"
        )
    return (
        "What does this code do? Is there a mistake in it, or something to make simpler?\n\n"
        f"```python\n{function.source}\n```"
    )


def requests(packages: list[Path], of_one: int, seed: int) -> list[str]:
    """All of them, in an order drawn by `seed`."""
    generator = random.Random(seed)
    chosen: list[Function] = []
    for package in packages:
        files = sorted(file for file in package.rglob("*.py") if "test" not in file.name)
        found = [one for file in files for one in functions(file)]
        chosen += generator.sample(found, min(of_one, len(found)))
    generator.shuffle(chosen)
    return [request(one, generator.random()) for one in chosen]


async def ask(asked: list[str], file: Path, arguments: argparse.Namespace) -> None:
    """Write what the model answers to each into `file`, a line each."""
    client = AsyncOpenAI(base_url=arguments.url, api_key="none", timeout=900)
    model = (await client.models.list()).data[0].id
    waiting = iter(asked)

    async def one_client() -> None:
        for text in waiting:
            message = {"role": "user", "content": text}
            answer = await client.chat.completions.create(
                model=model,
                messages=[message],  # type: ignore[list-item] # a TypedDict
                max_tokens=arguments.new_tokens,
                temperature=0.7,
                top_p=0.95,
            )
            advance(1)
            if answer.choices[0].finish_reason != "stop":
                continue
            said = {"role": "assistant", "content": answer.choices[0].message.content}
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"messages": [message, said]}) + "\n")

    with bar("Asking", len(asked)) as advance:
        await asyncio.gather(*(one_client() for _ in range(arguments.clients)))


def main() -> None:
    """Ask what was not asked before."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="+", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--of-one", type=int, default=70)
    parser.add_argument("--new-tokens", type=int, default=512)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    before = arguments.output.read_text().splitlines() if arguments.output.exists() else []
    answered = {json.loads(line)["messages"][0]["content"] for line in before}
    every = requests(arguments.packages, arguments.of_one, arguments.seed)
    left = (one for one in every if one not in answered)
    try:
        asyncio.run(ask(list(islice(left, arguments.requests)), arguments.output, arguments))
    except APIConnectionError:
        parser.error(f"No server answers at {arguments.url}. Start `owl serve` there; give --url.")


if __name__ == "__main__":
    main()
