"""What a benchmark measures: the user's numbers, fitted to the models, as scenarios."""

import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from owl_deploy.bench.scenario import KINDS, Scenario
from owl_deploy.errors import BadInput, option, unknown_name
from owl_deploy.inference import Deployment

_KEY = re.compile(
    rf"(?P<kind>{'|'.join(KINDS)})@(?P<tokens>\d+)(\+(?P<new>\d+))?(x(?P<several>\d+))?"
)
# What x4 in a key counts.
_SEVERAL = {"decode": "batch", "throughput": "streams", "requests": "streams"}
_ATTENDING = {"decode", "throughput"}  # to so many tokens
_ANSWERING = {"generate", "requests"}  # so many new tokens after a prompt of so many
# The kinds of scenarios that read a number; keys have their own, and --context makes room in all.
_READERS = {
    "prompt": {"prefill", *_ANSWERING},
    "batch": {"decode"},
    "streams": {"throughput"},
    "clients": {"requests"},
    "new_tokens": {"answers", *_ANSWERING},
    "prompts": {"answers"},
}
_LEAST_NEW = 2  # tokens: of fewer none comes after the first, to be timed
_EXAMPLES = (
    "decode@4096, decode@512x4, prefill@2048, generate@128+64, throughput@512x2 or "
    "requests@128+64x8"
)


class BenchPlan(BaseModel):
    """What to measure.

    `engines` empty: each deployment in the engine it was made for; else in each of these that opens
    it. `scenarios`: kinds, of which each number below makes one, or single ones by their keys, such
    as "decode@512x4". `context`, `prompt`, `batch`, `streams`: tokens attended to in decoding,
    tokens of a prompt, rows, streams, and clients of a server, which takes as many requests at
    once, one or several each. `new_tokens` an answer's length; `pairs` the rounds, taken up to
    `looks` times while a comparison is inconclusive (None: once, and in a check of `run_gate` as
    often as a gate takes); `steps` the tokens decoded, `repeats` the prompts run, in each process
    (of a server: by each client). Of `context`, `prompt` and `new_tokens` what nobody gave is a
    wish, which `fitted` makes smaller for a model that takes less. `draft`: a deployment, or
    "lookup", that proposes `draft_tokens` at a time (None: as many as pay) to each candidate, which
    alone is a baseline then, in the scenario `answers`, which is meant where none is named;
    `prompts` a file of what is asked in that.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: tuple[Path, ...] = Field(min_length=1)
    baselines: tuple[Path, ...] = ()
    engines: tuple[str, ...] = ()
    scenarios: tuple[str, ...] = Field(default=("decode", "prefill"), min_length=1)
    context: tuple[int, ...] = Field(default=(512,), min_length=1)
    prompt: tuple[int, ...] = Field(default=(128,), min_length=1)
    batch: tuple[int, ...] = Field(default=(1,), min_length=1)
    streams: tuple[int, ...] = Field(default=(2,), min_length=1)
    clients: tuple[int, ...] = Field(default=(1, 4, 16), min_length=1)
    new_tokens: int = 64
    threads: int | None = None
    trust_library: bool = False
    pairs: int = 8
    looks: int | None = None
    steps: int = 32
    repeats: int = 5
    time_limit_s: float = 600.0
    seed: int = 0
    draft: str | None = None
    draft_tokens: int | None = None
    prompts: Path | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_draft(cls, values: Any) -> Any:  # noqa: ANN401 - before validation
        """There is one scenario for a draft, which nobody has to name then."""
        if isinstance(values, dict) and values.get("draft") is not None:
            return {"scenarios": ("answers",)} | values
        return values

    @field_validator("draft", mode="before")
    @classmethod
    def _folder_or_lookup(cls, value: Any) -> Any:  # noqa: ANN401 - before validation
        return str(value) if isinstance(value, Path) else value

    @field_validator("context", "prompt", "batch", "streams", "clients", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:  # noqa: ANN401 - before validation
        return (value,) if isinstance(value, int) else value

    @property
    def most_looks(self) -> int:
        """How many times the rounds are taken at most."""
        return 1 if self.looks is None else self.looks

    def described(self) -> tuple[Scenario, ...]:
        """The scenarios; raises `BadInput` for an unknown one, or a number that cannot be."""
        for name, values, least in (
            ("--context", self.context, 1),
            ("--prompt", self.prompt, 1),
            ("--batch", self.batch, 1),
            ("--streams", self.streams, 1),
            ("--clients", self.clients, 1),
            ("--new-tokens", (self.new_tokens,), _LEAST_NEW),
            ("--pairs", (self.pairs,), 1),
            ("--looks", (self.most_looks,), 1),
        ):
            for value in values:
                if value < least:
                    raise BadInput(f"{name} {value} is too small.", f"It must be {least} or more.")
        if not 0 < self.time_limit_s < math.inf:
            raise BadInput(f"--time-limit {self.time_limit_s} is no time.", "Give it in seconds.")
        kinds = {name.partition("@")[0] for name in self.scenarios}
        if self.draft is not None and kinds != {"answers"}:
            raise BadInput("A draft is measured on real prompts.", "Give --scenario answers alone.")
        if self.draft is None and self.draft_tokens is not None:
            raise BadInput("--draft-tokens is for a draft.", "Give --draft, or leave it out.")
        for name, readers in _READERS.items():
            # A key such as `answers@64` gives all but the file of prompts.
            asked = kinds if name == "prompts" else self.scenarios
            if name in self.model_fields_set and readers.isdisjoint(asked):
                known = " or ".join(sorted(readers))
                raise BadInput(
                    f"{option(name)} is for --scenario {known}.", "Give that, or leave it out."
                )
        if "answers" in self.scenarios and len(self.context) > 1:
            raise BadInput("--scenario answers has one room for all.", "Give one --context.")
        found = [each for name in self.scenarios for each in self._scenarios(name)]
        for scenario in found:
            if scenario.prompt_tokens(self.steps, self.repeats) < 1:
                name = "--context" if scenario.kind in _ATTENDING else "--prompt"
                raise BadInput(f"{name} {scenario.tokens} is too small.", "Take 64 or more.")
        return tuple(dict.fromkeys(found))

    def fitted(self, deployments: Iterable[Deployment]) -> tuple[Self, tuple[str, ...]]:
        """The plan for what all of `deployments` take, and sentences for what had to give way.

        Raises `BadInput` for what was asked and is more than the smallest of them takes.
        """
        known = [(one.max_context, one.path) for one in deployments if one.max_context is not None]
        return self.within(*min(known)) if known else (self, ())

    def within(self, limit: int, path: Path) -> tuple[Self, tuple[str, ...]]:
        """As `fitted`, for the model in `path`, which takes `limit` tokens."""
        takes = f"the {limit} tokens that {path} takes"
        new = self._new_tokens(limit, takes)
        fitting: dict[str, int | tuple[int, ...]] = {
            "context": self._contexts(limit, takes),
            "prompt": self._prompts(limit - new, new, takes),
            **({"new_tokens": new} if new else {}),
        }
        changed = {name: value for name, value in fitting.items() if value != getattr(self, name)}
        smaller = self.model_copy(update=changed)
        for one in map(smaller._single, self.scenarios):
            if one and one.context > limit:
                raise BadInput(f"--scenario {one.key} is more than {takes}.", "Give a shorter one.")
        notes = [
            f"{option(name)} is {_numbers(value)} instead of {_numbers(getattr(self, name))}: "
            f"{path} takes {limit} tokens."
            for name, value in changed.items()
            if name not in self.model_fields_set and (name != "context" or self._decodes)
        ]
        return smaller, tuple(notes)

    @property
    def _decodes(self) -> bool:
        """Whether a scenario attends to `context` tokens; else that is only the caches' size."""
        return not _ATTENDING.isdisjoint(self.scenarios)

    def _contexts(self, limit: int, takes: str) -> tuple[int, ...]:
        decides = self._decodes or "answers" in self.scenarios  # whose room it is
        if decides and max(self.context) > limit and "context" in self.model_fields_set:
            raise BadInput(
                f"--context {max(self.context)} is more than {takes}.",
                f"Give --context {limit} or less.",
            )
        return tuple(dict.fromkeys(min(tokens, limit) for tokens in self.context))

    def _new_tokens(self, limit: int, takes: str) -> int:
        """The tokens of an answer; 0 where none is generated."""
        if _ANSWERING.isdisjoint(self.scenarios):
            return 0
        if "new_tokens" not in self.model_fields_set:
            given = "prompt" in self.model_fields_set
            room = limit - max(self.prompt) if given else limit // 2
            return max(2, min(self.new_tokens, room))
        if self.new_tokens >= limit:
            raise BadInput(
                f"--new-tokens {self.new_tokens} leaves no room for a prompt in {takes}.",
                f"Give --new-tokens {limit - 1} or less.",
            )
        return self.new_tokens

    def _prompts(self, room: int, new: int, takes: str) -> tuple[int, ...]:
        reads = not _READERS["prompt"].isdisjoint(self.scenarios)
        if reads and max(self.prompt) > room and "prompt" in self.model_fields_set:
            longest = f"--prompt {max(self.prompt)}"
            raise BadInput(
                f"{longest} and {new} new tokens are more than {takes}."
                if new
                else f"{longest} is more than {takes}.",
                f"Give --prompt {room} or less{', or fewer --new-tokens' if new > 2 else ''}.",
            )
        return (
            tuple(dict.fromkeys(min(tokens, room) for tokens in self.prompt))
            if reads
            else self.prompt
        )

    def _single(self, name: str) -> Scenario | None:
        """The scenario whose key is `name`; None where that is a kind."""
        found = _KEY.fullmatch(name)
        if not found:
            return None
        kind, several = found["kind"], int(found["several"] or 1)
        tokens, new = int(found["tokens"]), int(found["new"] or 0)
        wrong = bool(new) is not (kind in _ANSWERING) or several < 1
        if wrong or (several > 1 and kind not in _SEVERAL):
            raise BadInput(f"--scenario {name} is none.", f"Give one such as {_EXAMPLES}.")
        answer = tokens if kind == "answers" else new
        if kind in _READERS["new_tokens"] and answer < _LEAST_NEW:
            raise BadInput(
                f"--scenario {name} makes too few new tokens.", f"Make {_LEAST_NEW} or more."
            )
        rows = {_SEVERAL[kind]: several} if kind in _SEVERAL else {}
        context = tokens if kind in _ATTENDING else self._room(tokens + new)
        return Scenario(kind=kind, tokens=tokens, context=context, new=new, **rows)

    def _scenarios(self, kind: str) -> list[Scenario]:
        if single := self._single(kind):
            return [single]
        if kind == "decode":
            pairs = itertools.product(self.batch, self.context)
            return [Scenario(kind=kind, tokens=n, context=n, batch=rows) for rows, n in pairs]
        if kind == "prefill":
            return [Scenario(kind=kind, tokens=n, context=self._room(n)) for n in self.prompt]
        if kind in _ANSWERING:
            clients = self.clients if kind == "requests" else (1,)
            new, pairs = self.new_tokens, itertools.product(clients, self.prompt)
            return [
                Scenario(kind=kind, tokens=n, context=self._room(n + new), new=new, streams=m)
                for m, n in pairs
            ]
        if kind == "throughput":
            pairs = itertools.product(self.streams, self.context)
            return [Scenario(kind=kind, tokens=n, context=n, streams=m) for m, n in pairs]
        if kind == "answers":
            room = self.context[0]
            return [Scenario(kind=kind, tokens=self.new_tokens, context=room)]
        raise unknown_name("scenario", kind, KINDS)

    def _room(self, tokens: int) -> int:
        """The context to make caches for: the first asked that holds `tokens`, or just them."""
        return next((context for context in self.context if context >= tokens), tokens)


def _numbers(value: int | tuple[int, ...]) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
