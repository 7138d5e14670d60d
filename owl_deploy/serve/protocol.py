"""OpenAI's wire format: what a request asks for, and what answers and errors look like.

Source: the API reference at https://platform.openai.com/docs/api-reference (chat, completions).
"""

import re
import time
import uuid
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from owl_deploy.errors import BadInput
from owl_deploy.inference.rows import Speed
from owl_deploy.inference.sampling import LARGEST, UNLIMITED, Sampling
from owl_deploy.inference.writer import Writer

_SEEDS = LARGEST + 1
# JSON's NUL character; behind a backslash that is one itself, the same letters are text.
_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
# What would change an answer and is not done here: refused, but for values that ask for nothing.
_NOT_DONE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("n", "best_of"), (1,)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("logprobs", "echo"), (False,)),
    "top_logprobs": (0,),
    **dict.fromkeys(("tools", "functions", "logit_bias"), ([], {})),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "suffix": ("",),
    # Not OpenAI's, but llama.cpp's and vLLM's.
    **dict.fromkeys(("min_p", "min_tokens"), (0,)),
    "repeat_penalty": (1,),
    **dict.fromkeys(("grammar", "stop_token_ids"), ("", [])),
    **dict.fromkeys(("json_schema", "structured_outputs", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("typical_p", "length_penalty"), (1,)),
    **dict.fromkeys(("mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range"), (0,)),
    **dict.fromkeys(("bad_words", "allowed_token_ids"), ([],)),
    **dict.fromkeys(("continue_final_message", "use_beam_search"), (False,)),
    "include_stop_str_in_output": (False,),
    **dict.fromkeys(("add_generation_prompt", "add_special_tokens"), (True,)),
    "skip_special_tokens": (True,),
    **dict.fromkeys(("top_n_sigma", "n_predict"), (-1,)),
    **dict.fromkeys(("samplers", "truncate_prompt_tokens"), ()),
    "chat_template": ("",),
    "n_probs": (0,),
    "prompt_logprobs": (),  # 0 asks for those of the prompt's own tokens
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
}


class Refused(Exception):
    """A request that is not answered: an HTTP status, and a sentence."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's shape."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


# Each token's text is searched for all of them, for everybody's answers in one thread.
_MOST_STOPS, _LONGEST_STOP = 16, 256


def _wrong(message: str) -> PydanticCustomError:
    """A complaint in our words: pydantic's own, of a field that takes several types, name one."""
    return PydanticCustomError("owl", "{message}", {"message": message})


def _stops(given: Any) -> list[str]:  # noqa: ANN401 - a JSON value
    """The strings that end an answer; a single one need not be in a list."""
    listed = [given] if isinstance(given, str) else given
    if not (
        isinstance(listed, list)
        and len(listed) <= _MOST_STOPS
        and all(isinstance(one, str) and len(one) <= _LONGEST_STOP for one in listed)
    ):
        raise _wrong(f"at most {_MOST_STOPS} strings, of at most {_LONGEST_STOP} characters each")
    return listed


def _prompt(given: Any) -> str:  # noqa: ANN401
    """The one prompt, which may be in a list."""
    one = given[0] if isinstance(given, list) and len(given) == 1 else given
    if not isinstance(one, str):
        raise _wrong("one prompt a request, as text")
    if not one:
        raise _wrong("it is empty")
    return one


def _parts(given: Any) -> list[Any]:  # noqa: ANN401
    """The parts of a message, which may be a text instead."""
    if isinstance(given, str):
        return [{"type": "text", "text": given}]
    if not isinstance(given, list):
        raise _wrong("a text, or a list of parts")
    return given


class _StreamOptions(BaseModel):
    include_usage: bool | None = None


class Request(BaseModel):
    """What both kinds of request have in common; None is left out.

    Without a `model` the one that is served is meant. How tokens are chosen is then the
    deployment's; the rest is OpenAI's default.
    """

    model_config = ConfigDict(extra="allow")  # new clients send what old servers need not know

    whole: ClassVar[str]  # the `object` of an answer, and of a part of one
    part: ClassVar[str]
    prefix: ClassVar[str]
    usual_tokens: ClassVar[int]
    templated: ClassVar[bool]  # whether `text` is in the model's chat template

    model: str | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    stop: Annotated[list[str], BeforeValidator(_stops)] | None = None
    max_tokens: int | None = Field(None, ge=1, lt=_SEEDS)
    max_completion_tokens: int | None = Field(None, ge=1, lt=_SEEDS)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=_SEEDS)  # not OpenAI's, but llama.cpp's and vLLM's
    seed: int | None = None
    repetition_penalty: float | None = Field(None, gt=0, allow_inf_nan=False)  # vLLM's
    ignore_eos: bool | None = None  # theirs as well
    cache_prompt: bool | None = None  # llama.cpp's: whether what is known of the prompt is used

    @property
    def stops(self) -> list[str]:
        """The strings that end the answer."""
        return [one for one in self.stop or [] if one]

    def sampling(self) -> Sampling:
        """How the next token is chosen; what is left out is as the deployment says.

        A temperature of 0 takes the likeliest.
        """
        return Sampling(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or self.usual_tokens,
            do_sample=True,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=None if self.seed is None else self.seed % _SEEDS,
            ignore_eos=bool(self.ignore_eos),
        )

    def text(self, writer: Writer) -> str:
        """The prompt for the model."""
        raise NotImplementedError

    def opening(self) -> list[dict[str, Any]]:
        """The choices that a streamed answer begins with, before there is any text."""
        return []

    def choice(self, text: str, reason: str | None, *, part: bool) -> dict[str, Any]:
        """The one answer, or a `part` of it; `reason`: why it ended, once it did."""
        raise NotImplementedError


class _Part(BaseModel):
    type: str
    text: str = ""

    @model_validator(mode="after")
    def _has_its_text(self) -> Self:
        """What stands elsewhere by mistake would be lost, and the rest answered."""
        if self.type == "text" and "text" not in self.model_fields_set:
            raise _wrong('a part of type "text" has its text in "text"')
        return self


class _Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[_Part], Field(fail_fast=True), BeforeValidator(_parts)] | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None

    @model_validator(mode="after")
    def _has_content(self) -> Self:
        """Only an assistant says nothing at times, when it calls tools."""
        if self.content is None and self.role != "assistant":
            raise _wrong('a message has its text in "content"')
        return self

    def said(self) -> dict[str, str]:
        """It as templates have it; raises `Refused` for what they would leave out."""
        if self.tool_calls or self.function_call:
            raise Refused(400, "Messages with tool calls are not supported here.")
        parts = self.content or []
        if other := [part.type for part in parts if part.type != "text"]:
            raise Refused(400, f"A message has a part of type {other[0]!r}: only text is read.")
        # OpenAI's newer name, which templates do not know.
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in parts)}


class Chat(Request):
    """POST /v1/chat/completions."""

    whole = "chat.completion"
    part = "chat.completion.chunk"
    prefix = "chatcmpl"
    usual_tokens = UNLIMITED
    templated = True

    # The first error is told, and an error for each of many would take its time and memory.
    messages: list[_Message] = Field(min_length=1, fail_fast=True)

    def text(self, writer: Writer) -> str:
        """The messages in the model's chat template; raises `Refused` where that fails."""
        said = [one.said() for one in self.messages]
        if writer.chat_template.source is None:
            raise Refused(400, "The model has no chat template: its texts go to /v1/completions.")
        try:
            return writer.chat_template.render(said)
        except BadInput as error:
            raise Refused(400, error.message) from error

    def opening(self) -> list[dict[str, Any]]:
        """Who speaks."""
        said = {"role": "assistant", "content": ""}
        return [{"index": 0, "delta": said, "logprobs": None, "finish_reason": None}]

    def choice(self, text: str, reason: str | None, *, part: bool) -> dict[str, Any]:
        """A message, or what comes to it."""
        said = {"delta": {"content": text}}
        if not part:
            said = {"message": {"role": "assistant", "content": text}}
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}


class Completion(Request):
    """POST /v1/completions."""

    whole = part = "text_completion"
    prefix = "cmpl"
    usual_tokens = 16
    templated = False

    prompt: Annotated[str, BeforeValidator(_prompt)]

    def text(self, writer: Writer) -> str:
        """The prompt as it is."""
        return self.prompt

    def choice(self, text: str, reason: str | None, *, part: bool) -> dict[str, Any]:
        """A text, or what comes to it."""
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": reason}


Kind = TypeVar("Kind", bound=Request)


def parse(kind: type[Kind], body: bytes) -> Kind:
    """The request in `body`; raises `Refused` for what is none, or asks for what is not done."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        param = str(first["loc"][0]) if first["loc"] else None
        raise Refused(400, f"{place or 'the body'}: {first['msg']}", param=param) from error
    for name, value in (asked.model_extra or {}).items():
        if name in _NOT_DONE and value is not None and not _asks_nothing(name, value):
            raise Refused(400, f"{name} is not supported here.", "unsupported_parameter", name)
    if _NUL.search(body):  # onnxruntime-genai would read no further
        raise Refused(400, "The text has a NUL character.")
    return asked


def _asks_nothing(name: str, value: Any) -> bool:  # noqa: ANN401 - a JSON value
    # 0 is equal to False, and of `logprobs` another wish.
    return any(
        isinstance(value, bool) == isinstance(x, bool) and value == x for x in _NOT_DONE[name]
    )


def usage(speed: Speed) -> dict[str, Any]:
    """Tokens read and made, and those of the prompt that were known."""
    made = {"prompt_tokens": speed.prompt_tokens, "completion_tokens": speed.new_tokens}
    known = {"prompt_tokens_details": {"cached_tokens": speed.cached_tokens}}
    return {**made, "total_tokens": sum(made.values()), **known}


def header(asked: Request, *, part: bool) -> dict[str, Any]:
    """What an answer, and each part of it, begins with."""
    return {
        "id": f"{asked.prefix}-{uuid.uuid4().hex}",
        "object": asked.part if part else asked.whole,
        "created": int(time.time()),
        "model": asked.model,
    }
