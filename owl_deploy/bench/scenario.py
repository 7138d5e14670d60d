"""What is timed: scenarios, and the metrics that each yields."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

Kind = Literal["decode", "prefill", "generate", "throughput", "answers", "requests"]
KINDS: tuple[Kind, ...] = get_args(Kind)
WARMUP_TOKENS, WARMUP_REPEATS, WARMUP_ANSWERS = 8, 2, 1
STREAM_STEPS = 8  # tokens of each stream in one latency of `throughput`


@dataclass(frozen=True)
class Metric:
    """One figure of a scenario: `answer` names it in the worker's answer; `tokens` a latency."""

    key: str
    title: str
    answer: str
    tokens: int

    def rate(self, row: Mapping[str, float]) -> float | None:
        """Tokens/s by a row of statistics; None of the wait for a first token, which is no rate."""
        return None if self.answer == "first_ms" else row["tokens_per_s"]


class Scenario(BaseModel):
    """What is timed.

    `decode`: one token after another, the last of them attending to `tokens` tokens, in each of
    `batch` rows. `prefill`: a prompt of `tokens` tokens in an empty cache, up to and with the first
    new token. `generate`: an answer of `new` tokens to a prompt of `tokens`. `throughput`: decoding
    as `decode`, in `streams` streams at once that share the model. `answers`: up to `tokens` tokens
    after each of some real prompts, until the model ends. `requests`: as many clients as
    `streams` ask the engine's server at once, each again as soon as it has its answer of `new`
    tokens to a prompt of `tokens`. Caches are made for `context`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Kind
    tokens: int
    context: int
    batch: int = 1
    new: int = 0
    streams: int = 1

    @property
    def key(self) -> str:
        """Its name in a result: "decode@512", "decode@512x4", "requests@128+64x8"."""
        several = self.batch * self.streams
        return (
            f"{self.kind}@{self.tokens}"
            + (f"+{self.new}" if self.new else "")
            + (f"x{several}" if several > 1 else "")
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The figures it yields; the first is the one that counts."""
        if self.kind == "decode":
            rows = f", {self.batch} rows at once" if self.batch > 1 else ""
            title = f"decode: one token at a context of {self.tokens}{rows}"
            return (Metric(self.key, title, "latencies_ms", self.batch),)
        if self.kind == "prefill":
            title = f"prefill: a prompt of {self.tokens} tokens"
            return (Metric(self.key, title, "latencies_ms", self.tokens),)
        if self.kind == "throughput":
            title = f"throughput: {self.streams} streams at a context of {self.tokens}, per token"
            return (Metric(self.key, title, "latencies_ms", 1),)
        if self.kind == "answers":
            what = f"answers of up to {self.tokens} tokens to real prompts"
            return (
                Metric(f"{self.key}:token", f"answers: each later token of {what}", "token_ms", 1),
                Metric(f"{self.key}:first", f"answers: first token of {what}", "first_ms", 1),
            )
        what = f"{self.new} tokens after a prompt of {self.tokens}"
        if self.kind == "requests":
            what = f"{what}, {self.streams} clients"
            return (
                Metric(
                    f"{self.key}:answer", f"requests: an answer of {what}", "answer_ms", self.new
                ),
                Metric(f"{self.key}:first", f"requests: first text of {what}", "first_ms", 1),
                Metric(f"{self.key}:text", f"requests: each later text of {what}", "text_ms", 1),
            )
        return (
            Metric(f"{self.key}:total", f"generate: {what}", "total_ms", self.new),
            Metric(f"{self.key}:first", f"generate: first token of {what}", "first_ms", 1),
            Metric(f"{self.key}:token", f"generate: each later token of {what}", "token_ms", 1),
        )

    @property
    def is_served(self) -> bool:
        """Whether an engine's server is asked, and not the engine itself."""
        return self.kind == "requests"

    @property
    def session(self) -> tuple[int, int, int]:
        """What a process is opened with: scenarios of one session share a process."""
        return self.context, self.batch, self.streams

    def request(self, prompt: list[int], steps: int, repeats: int) -> dict[str, Any]:
        """The worker's arguments; `prompt` has `prompt_tokens(steps, repeats)` tokens.

        Not of `answers` and `requests`, which are asked several.
        """
        if self.kind == "decode":
            return {"prompt": prompt, "steps": steps, "warmup": WARMUP_TOKENS}
        if self.kind == "prefill":
            return {"prompt": prompt, "repeats": repeats, "warmup": WARMUP_REPEATS}
        if self.kind == "generate":
            answers = max(1, repeats // 2)
            return {
                "prompt": prompt,
                "count": self.new,
                "repeats": answers,
                "warmup": WARMUP_ANSWERS,
            }
        return {"prompt": prompt, "steps": STREAM_STEPS, "repeats": repeats, "warmup": 1}

    def prompt_tokens(self, steps: int, repeats: int) -> int:
        """How long a prompt makes the last timed token attend to `tokens` tokens."""
        if self.kind == "decode":
            return self.tokens - steps - WARMUP_TOKENS
        if self.kind == "throughput":
            return self.tokens - STREAM_STEPS * (repeats + 1)
        return self.tokens


def by_session(scenarios: tuple[Scenario, ...]) -> Iterator[tuple[Scenario, ...]]:
    """The scenarios that share a process, in order."""
    sessions: dict[tuple[bool, tuple[int, int, int]], list[Scenario]] = {}
    for scenario in scenarios:
        sessions.setdefault((scenario.is_served, scenario.session), []).append(scenario)
    yield from map(tuple, sessions.values())
