"""`owl generate`: stream text from a deployment through onnxruntime-genai."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from owl_deploy.engines.deployment import GENAI_CONFIG, genai_number, open_deployment
from owl_deploy.errors import BadInput, EngineFailed

_LARGEST = 2**31 - 1  # of onnxruntime-genai's integers


@dataclass(frozen=True)
class Sampling:
    """Search options, by their names in onnxruntime-genai and transformers."""

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, fits in (
            ("--max-new-tokens", self.max_new_tokens, 1 <= self.max_new_tokens <= _LARGEST),
            ("--temperature", self.temperature, 0 < self.temperature < math.inf),
            ("--top-k", self.top_k, 1 <= self.top_k <= _LARGEST),
            ("--top-p", self.top_p, 0 < self.top_p <= 1),
            (
                "--repetition-penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
            ),
        ):
            if not fits:
                raise BadInput(f"{name} {value} is impossible.")


@dataclass
class Speed:
    """What a generation took: seconds to the first token, and after it; tokens made."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second after the first."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


def generate(
    deployment: Path, prompt: str, sampling: Sampling, speed: Speed, *, chat: bool = False
) -> Iterator[str]:
    """Yield the text that follows `prompt`, piece by piece; `speed` is filled in meanwhile.

    With `chat` the prompt is a user's message, put into the model's chat template. Raises
    `BadInput` for a folder that onnxruntime-genai cannot open, and for a prompt that is too long.
    """
    open_deployment(deployment)
    if not (deployment / GENAI_CONFIG).is_file():
        raise BadInput(
            f"{deployment} has no {GENAI_CONFIG}, so onnxruntime-genai cannot open it.",
            "Export the checkpoint with --target owl or onnxruntime.",
        )
    if not prompt:
        raise BadInput("The prompt is empty.", "Give a text to go on from.")
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise BadInput("The prompt is not UTF-8 text.", "Give it in that encoding.")
    context = genai_number(deployment, "context_length")
    import onnxruntime_genai

    try:
        model = onnxruntime_genai.Model(str(deployment))
        tokenizer = onnxruntime_genai.Tokenizer(model)
        if chat:
            prompt = _in_template(tokenizer, prompt)
        tokens = tokenizer.encode(prompt)
        if len(tokens) + sampling.max_new_tokens > context:
            raise BadInput(
                f"The prompt's {len(tokens)} tokens and {sampling.max_new_tokens} new ones are "
                f"more than the {context} that the model takes.",
                "Shorten the prompt, or give a smaller --max-new-tokens (-n).",
            )
        generator = _generator(onnxruntime_genai, model, len(tokens), sampling)
        yield from _stream(generator, tokenizer, tokens, speed)
    except RuntimeError as error:  # whatever is wrong, onnxruntime-genai has this one type for it
        reason = str(error).splitlines()[0]
        raise EngineFailed(f"onnxruntime-genai failed with {deployment}: {reason}") from error


def _in_template(tokenizer: Any, message: str) -> str:  # noqa: ANN401 - no stubs
    import json

    messages = json.dumps([{"role": "user", "content": message}])
    text: str = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    return text


def _generator(genai: Any, model: Any, prompt_tokens: int, sampling: Sampling) -> Any:  # noqa: ANN401
    options: dict[str, Any] = {
        "max_length": prompt_tokens + sampling.max_new_tokens,
        "do_sample": sampling.do_sample,
        "repetition_penalty": sampling.repetition_penalty,
    }
    if sampling.do_sample:
        options |= {
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
        }
    if sampling.seed is not None:
        options["random_seed"] = sampling.seed
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(**options)
    return genai.Generator(model, parameters)


def _stream(
    generator: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    tokens: Any,  # noqa: ANN401
    speed: Speed,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[str]:
    started = clock()
    generator.append_tokens(tokens)
    stream = tokenizer.create_stream()
    speed.prompt_tokens = len(tokens)
    while not generator.is_done():
        generator.generate_next_token()
        now = clock()
        if speed.new_tokens == 0:
            speed.first_token_s = now - started
        speed.new_tokens += 1
        speed.decode_s = now - started - speed.first_token_s
        yield stream.decode(generator.get_next_tokens()[0])
