"""`owl generate`: stream text from a deployment.

Through onnxruntime-genai, or, greedily, through the process of an engine that runs no ONNX graphs.
"""

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from owl_deploy.data.json_lines import in_template
from owl_deploy.data.text import load_tokenizer, token_before
from owl_deploy.errors import BadInput
from owl_deploy.inference import EngineProcess, threads_for
from owl_deploy.inference.deployment import Deployment, open_deployment, told_numbers
from owl_deploy.inference.draft import chosen_draft
from owl_deploy.inference.process import DEFAULT_CONTEXT
from owl_deploy.inference.rows import Speed, length_of
from owl_deploy.inference.sampling import GREEDY, Sampling
from owl_deploy.inference.speculate import Search
from owl_deploy.inference.writer import open_writer

STDIN = "-"


def read_prompt(text: str | None, file: Path | None) -> str:
    """The prompt: `text` itself, or what stands in `file`; of either, "-" is stdin.

    The line break that editors and `echo` put at the end of a file is no part of it. Raises
    `BadInput` for none, for two, and for what is not UTF-8 text.
    """
    if text is not None and file is not None:
        raise BadInput("There are two prompts.", "Leave out the prompt or --prompt-file.")
    if text is None and file is None:
        raise BadInput(
            "There is no prompt.", "Give it after the deployment, - for stdin, or --prompt-file."
        )
    if text is None or text == STDIN:
        where, content = _read(None if file == Path(STDIN) else file)
    else:
        where, content = "the arguments", text.encode(errors="surrogateescape")
    try:
        prompt = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(
            f"The prompt in {where} is not UTF-8 text ({error.reason}).", "Convert it to UTF-8."
        ) from error
    _check_prompt(prompt, f"The prompt in {where}")
    return prompt


def _read(file: Path | None) -> tuple[str, bytes]:
    """What `file` is called, and what stands in it but for its last line break; None is stdin."""
    if file is None and sys.stdin is None:
        raise BadInput("stdin is closed.", "Give the prompt itself, or --prompt-file.")
    try:
        content = sys.stdin.buffer.read() if file is None else file.read_bytes()
    except OSError as error:
        raise BadInput(
            f"The prompt file {file} cannot be read ({error.strerror}).", "Give a text file."
        ) from error
    return str(file or "stdin"), content.removesuffix(b"\n").removesuffix(b"\r")


def generate(
    deployment: str | Path,
    prompt: str,
    sampling: Sampling = GREEDY,
    speed: Speed | None = None,
    *,
    chat: bool = False,
    system: str | None = None,
    threads: int | None = None,
    trust_library: bool = False,
    draft: str | Path | None = None,
    draft_tokens: int | None = None,
) -> Iterator[str]:
    """Yield what `deployment` puts after `prompt`, by `sampling`; `speed` is filled in meanwhile.

    Nothing happens, and nothing is refused, before the first piece is asked for.
    With `chat` the prompt is a user's message, put into the model's chat template, behind `system`
    if that is given. `threads`: None for the physical cores; `trust_library`: run operators that
    the folder brings. `draft`: a deployment with the same tokens that proposes `draft_tokens` at a
    time (None: as many as pay), or "lookup" for proposals from the text itself; the text is the
    deployment's own with or without (speculate.py).
    Raises `BadInput` for a folder that cannot be opened so, for sampling in another engine than
    onnxruntime-genai, for a draft that does not fit, for a prompt that is too long, for `chat` with
    a model that has no template, and for `system` without `chat`; `EngineFailed` for what
    onnxruntime-genai stumbles over.
    """
    deployment, speed = Path(deployment), Speed() if speed is None else speed
    threads = threads_for(threads)
    opened = open_deployment(deployment, trust_library=trust_library)
    _check_prompt(prompt)
    messages = _messages(opened, prompt, system) if chat else None
    if system is not None and not chat:
        raise BadInput("--system is for a chat.", "Give --chat as well, or leave it out.")
    drafting = chosen_draft(opened, draft, draft_tokens, trust_library)
    if opened.folder.engine is not None:
        yield from _in_engine(
            opened, opened.folder.engine.name, prompt, sampling, speed, messages, threads
        )
        return
    writer = open_writer(opened, threads, drafting=drafting)
    if messages is not None:
        prompt = opened.chat_template.render(messages)
    yield from writer.write(prompt, sampling, speed, templated=chat)


def _messages(opened: Deployment, prompt: str, system: str | None) -> list[dict[str, str]]:
    """What a chat begins with; raises `BadInput` for a model without a template."""
    if opened.chat_template.source is None:
        raise BadInput(f"{opened.path} has no chat template.", "Leave out --chat.")
    said = {"role": "user", "content": prompt}
    if system is None:
        return [said]
    _check_prompt(system, "The text of --system")
    return [{"role": "system", "content": system}, said]


def _check_prompt(prompt: str, what: str = "The prompt") -> None:
    if not prompt:
        raise BadInput(f"{what} is empty.", "Give a text to go on from.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise BadInput(f"{what} is not UTF-8 text.", "Give it in that encoding.")
    if "\0" in prompt:  # onnxruntime-genai would read no further
        raise BadInput(f"{what} has a NUL character.", "Is it UTF-16? Convert it to UTF-8.")


def _in_engine(
    opened: Deployment,
    engine: str,
    prompt: str,
    sampling: Sampling,
    speed: Speed,
    messages: list[dict[str, str]] | None,
    threads: int,
) -> Iterator[str]:
    """The greedy road through an engine's own process, for what is no ONNX graph."""
    if sampling.search(Search()) != Search():
        raise BadInput(
            f"{opened.path} runs in {engine}, from which owl takes the likeliest token only.",
            "Leave out --do-sample and --repetition-penalty.",
        )

    tokenizer = load_tokenizer(opened.path)
    if messages is not None:
        prompt = in_template("--chat", messages, tokenizer, add_generation_prompt=True)
    tokens: list[int] = tokenizer.encode(prompt, add_special_tokens=messages is None)
    opened.check_tokens(tokens)
    told = told_numbers(opened.path / "config.json", "max_position_embeddings")
    context = opened.max_context or next(iter(told), DEFAULT_CONTEXT)
    length = length_of(len(tokens), sampling.max_new_tokens, context)
    room = length - len(tokens)
    ends = set() if sampling.ignore_eos else {*opened.ends, tokenizer.eos_token_id}
    speed.prompt_tokens = len(tokens)
    with EngineProcess(engine, opened.path, threads=threads, context=length) as process:
        yield from _words(_greedy(process, tokens, room, ends, speed), tokenizer)
    speed.context_full = speed.prompt_tokens + speed.new_tokens >= context


def _greedy(
    process: EngineProcess, tokens: list[int], count: int, ends: set[int], speed: Speed
) -> Iterator[int]:
    """Up to `count` tokens after `tokens`, each as it comes, until one of `ends`."""
    started = time.perf_counter()
    while speed.new_tokens < count:
        answer = process.request("greedy", tokens=tokens, count=1, fresh=not speed.new_tokens)
        tokens = answer["tokens"]
        speed.count(time.perf_counter() - started)
        if tokens[0] in ends:
            return
        yield tokens[0]


def _words(tokens: Iterable[int], tokenizer: Any) -> Iterator[str]:  # noqa: ANN401
    """The text of `tokens` in pieces, none of which ends within a character."""
    # Of the piece before, which decides whether a space stands between.
    told = token_before(tokenizer)
    new: list[int] = []
    for token in tokens:
        new.append(token)
        before = tokenizer.decode(told, skip_special_tokens=True)
        text = tokenizer.decode(told + new, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            yield text[len(before) :]
            told, new = new, []
