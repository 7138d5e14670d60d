"""How a user has tokens chosen, and how a model's own files do."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from owl_deploy.errors import BadInput, first_line, option
from owl_deploy.inference.speculate import Search

DEFAULT_NEW_TOKENS = 128
UNLIMITED = -1  # new tokens: on until the context is full, as in llama.cpp
LARGEST = 2**31 - 1  # of onnxruntime-genai's integers
LEAST_TOP_P = 1e-6  # onnxruntime-genai takes the 0 that less may become for no limit
# What each option may be, and how that is said.
_POSSIBLE: dict[str, tuple[Callable[[float], bool], str]] = {
    "max_new_tokens": (
        lambda count: count == UNLIMITED or 1 <= count <= LARGEST,
        f"1 to {LARGEST}, or {UNLIMITED} to go on until the context is full",
    ),
    "temperature": (lambda value: 0 <= value < math.inf, "0 (the likeliest token) or more"),
    "top_k": (
        lambda count: -1 <= count <= LARGEST and count == int(count),
        f"1 to {LARGEST}, or 0 for all tokens",
    ),
    "top_p": (lambda share: 0 <= share <= 1, "0 to 1"),
    "repetition_penalty": (lambda value: 0 < value < math.inf, "more than 0; 1 is none"),
}


@dataclass(frozen=True)
class Sampling:
    """Search options, by their names in onnxruntime-genai and transformers.

    `max_new_tokens`: None for `DEFAULT_NEW_TOKENS`, or as many as the context has room for;
    `UNLIMITED` for all that it has room for. Without `do_sample` the likeliest token is taken, as
    with a `temperature` of 0. With it, what is None of `temperature`, `top_k` (0 or -1: all
    tokens), `top_p` and `repetition_penalty` is as the deployment says (`search_told`); `seed`:
    None for another each time. `ignore_eos`: no token that ends a text is chosen, or of a GGUF it
    ends none. Raises `BadInput` for what is impossible, and for options of sampling without
    `do_sample`, which would do nothing.
    """

    max_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (fits, said) in _POSSIBLE.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise BadInput(f"{option(name)} {value} is impossible.", f"Give {said}.")
        drawn_by = (self.temperature, self.top_k, self.top_p, self.seed)
        if not self.do_sample and drawn_by != (None,) * 4:
            raise BadInput(
                "--temperature, --top-k, --top-p and --seed are for sampling.",
                "Give --do-sample as well, or leave them out.",
            )

    def search(self, usual: Search) -> Search:
        """How a token is chosen; what is None here is as `usual`, if tokens are drawn at all."""
        temperature = usual.temperature if self.temperature is None else self.temperature
        if not self.do_sample or temperature == 0:
            return Search(repetition_penalty=self.repetition_penalty or 1.0)
        return self.drawing(usual)

    def drawing(self, usual: Search) -> Search:
        """How a token is drawn; what is None here is as `usual`. At a temperature of 0 none is."""
        wishes = {one.name: getattr(self, one.name) for one in fields(Search)}
        found = replace(usual, **{k: value for k, value in wishes.items() if value is not None})
        top_k = found.top_k if found.top_k > 0 else LARGEST
        return replace(found, top_k=top_k, top_p=max(found.top_p, LEAST_TOP_P))


GREEDY = Sampling()  # the likeliest token, always


def search_told(told: Mapping[str, Any], file: Path) -> Search:
    """How tokens are drawn where nobody says otherwise: as `file` has told.

    Where that has no `do_sample`, and for what it leaves out, that is OpenAI's way. Raises
    `BadInput` for settings that are impossible.
    """
    names = [one.name for one in fields(Search)]
    given = {name: told[name] for name in names if told.get(name) is not None}
    if not given.get("do_sample"):
        return Search()
    if isinstance(top_k := given.get("top_k"), float) and top_k.is_integer():
        given["top_k"] = int(top_k)  # which onnxruntime-genai takes
    try:
        return Sampling(**given).drawing(Search())
    except (BadInput, TypeError) as error:
        raise BadInput(
            f"{file} has a sampling that is none ({first_line(error)}).",
            "Correct it in the model's generation_config.json, and export again.",
        ) from error
