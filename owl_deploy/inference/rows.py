"""A text that is to be written, and what is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from owl_deploy.errors import BadInput
from owl_deploy.inference.sampling import DEFAULT_NEW_TOKENS, UNLIMITED, Sampling
from owl_deploy.inference.speculate import Choice, Search, Tally


class PromptTooLong(BadInput):
    """A prompt that leaves no room for what is to come after it."""


@dataclass
class Speed:
    """What a generation took: seconds to the first token, and after it; tokens made.

    `cached_tokens`: those of the prompt that were known and not read again. `context_full`: it
    ended because the model takes no more. `draft`: what came of a draft's proposals, where one was
    given.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    context_full: bool = False
    draft: Tally | None = None

    def count(self, elapsed_s: float) -> None:
        """One more token, `elapsed_s` after the prompt was begun."""
        if self.new_tokens == 0:
            self.first_token_s = elapsed_s
        self.new_tokens += 1
        self.decode_s = elapsed_s - self.first_token_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second after the first; None where that is the only one."""
        return (self.new_tokens - 1) / self.decode_s if self.decode_s > 0 else None

    def sentence(self) -> str:
        """What a user is told of it."""
        said = f"{self.prompt_tokens} tokens read in {self.first_token_s:.2f} s"
        if self.tokens_per_s is not None:
            said += f", then {self.tokens_per_s:.1f} tokens/s"
        if self.draft is not None and self.draft.steps:
            said += (
                f"; of {self.draft.proposed} tokens proposed {self.draft.share_accepted:.0%} "
                f"accepted, {self.draft.tokens_per_step:.2f} tokens a step"
            )
        return said + ("; the context is full" if self.context_full else "")

    def to_json(self) -> dict[str, Any]:
        """All of it, as JSON values."""
        draft = self.draft and self.draft.to_json()
        return {**vars(self), "draft": draft, "tokens_per_s": self.tokens_per_s}


@dataclass(eq=False)
class Row:
    """A text to be written: its `tokens`, at first the prompt's, and the `length` they may come to.

    `speed` is filled in meanwhile. `ends`: tokens that end it before; `never`: those that are never
    chosen. `search`: how `sampling` has its tokens chosen in this deployment. `anew`: whether all
    of the prompt is read, whatever is known of it. `ended`: set once the text has its last token,
    or by whoever wants no more of it.
    """

    tokens: list[int]
    length: int
    sampling: Sampling
    speed: Speed = field(default_factory=Speed)
    ends: list[int] = field(default_factory=list)
    never: list[int] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    anew: bool = False
    ended: bool = False

    @property
    def room(self) -> int:
        """How many tokens may come yet."""
        return self.length - len(self.tokens)

    def choose(self, logits: np.ndarray, text: Sequence[int]) -> Choice:
        """What may come after `text`, which is this one or goes on from it, by `logits` [vocab]."""
        if self.never:
            logits = logits.copy()
            logits[self.never] = -np.inf
        return self.search(logits, text)

    def take(self, token: int, elapsed_s: float) -> None:
        """The next token, `elapsed_s` after the text was begun; its last one ends it."""
        self.tokens.append(token)
        self.speed.count(elapsed_s)
        if token in self.ends or not self.room:  # no `|=`: another thread may end it meanwhile
            self.ended = True


def length_of(prompt_tokens: int, new_tokens: int | None, context: int) -> int:
    """The tokens of the prompt and the new ones together; raises `PromptTooLong`."""
    room = context - prompt_tokens
    if room < 1:
        raise PromptTooLong(
            f"The prompt's {prompt_tokens} tokens leave no room for a new one: there is room for "
            f"{context} in all.",
            "Shorten the prompt.",
        )
    if new_tokens is None:
        return prompt_tokens + min(DEFAULT_NEW_TOKENS, room)
    if new_tokens == UNLIMITED:
        return context
    if new_tokens > room:
        raise PromptTooLong(
            f"The prompt's {prompt_tokens} tokens and {new_tokens} new ones are more than the "
            f"{context} that there is room for.",
            f"Shorten the prompt, or give --max-new-tokens (-n) {room} or less; {UNLIMITED} takes "
            "all that there is room for.",
        )
    return prompt_tokens + new_tokens
