"""Speculative decoding: a draft proposes tokens, and the model verifies all of them in one step.

Nothing is lost by it. A token x that the draft drew from q is accepted with the probability
min(1, p(x) / q(x)), where p is the model's distribution at the same place; the first that is not is
replaced by one drawn from max(0, p - q), scaled to sum to 1, and what was proposed behind it falls.
Where all are accepted, the step's last row gives one token more. So each token has the model's own
distribution (Leviathan et al., arXiv 2211.17192, algorithm 1 and appendix A.1; Chen et al., arXiv
2302.01318, algorithm 2). The likeliest token alone is a distribution too: then the text is the
model's own, token for token.

onnxruntime-genai brings speculative decoding as well, and it is not used: its draft runs once more
than here for each run of proposals that are all accepted, its lookup pays a second step of the
model for a match that follows a miss, and with one token proposed it takes two steps where one
would do. What a model computes still comes from it.

This file is run without the package, too: it imports nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

LONGEST_MATCH = 16  # tokens of a text's end that tell two places of it apart
LEAST_MATCH = 2  # fewer are found anywhere, and foretell little
MOST_TOKENS = 15  # proposed at a time: with the one before them, 16 rows, as the kernels have it
# Of a step's time, what one more row takes: of the 1.5B in docs/benchmarks/showcase.md some 0.11 in
# int8 and 0.15 in int4, with AVX-512.
ROW_SHARE = 0.125
_FIRST = (4.0, 1.0)  # tokens accepted and refused that are taken for seen at first
_KEEP = 0.9  # of what was seen, when more is
_RETRY = 8  # steps without a proposal, until one is tried again


class Model(Protocol):
    """What computes logits, with a cache that can be gone back in."""

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        """Put `tokens` behind those in the cache; the logits [n, vocab], float32, of the last n.

        That are all of up to 16 `tokens`, and of more, or a prompt, which comes first, one or more.
        """

    def rewind(self, count: int) -> None:
        """Keep the first `count` tokens in the cache."""


@dataclass(frozen=True)
class Choice:
    """What may come next: `tokens` [n], each once, with their probabilities [n], summing to 1."""

    tokens: np.ndarray
    probabilities: np.ndarray

    def draw(self, random: np.random.Generator) -> int:
        """One of the tokens, by their probabilities; a single one without a random number."""
        if len(self.tokens) == 1:
            return int(self.tokens[0])
        sums = np.cumsum(self.probabilities)
        place = int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
        return int(self.tokens[min(place, len(sums) - 1)])

    def probability(self, token: int) -> float:
        """Of `token`; 0 for one that cannot come."""
        return float(self.probabilities[self.tokens == token].sum())

    def without(self, other: Choice) -> Choice:
        """max(0, p - q), scaled to sum to 1; p itself where nothing is left of it by rounding."""
        taken = dict(zip(other.tokens.tolist(), other.probabilities.tolist()))  # noqa: B905
        rest = self.probabilities - [taken.get(token, 0.0) for token in self.tokens.tolist()]
        left = rest > 0
        if not left.any():
            return self
        return Choice(self.tokens[left], rest[left] / rest[left].sum())


# Of the logits [vocab] of a text's last token, and the text, which a repetition penalty looks at.
Chooser = Callable[[np.ndarray, Sequence[int]], Choice]
Proposal = tuple[list[int], list[Choice]]  # tokens, and what each was drawn from
_CERTAIN = np.ones(1)


def certainly(token: int) -> Choice:
    """A choice of one token."""
    return Choice(np.array([token]), _CERTAIN)


@dataclass(frozen=True)
class Search:
    """How a token is chosen by logits, as onnxruntime-genai does it, by its names.

    First the penalty on what stands in the text; then the likeliest, or, with `do_sample`, one of
    the `top_k` likeliest, and of these of the fewest whose probabilities reach `top_p`.
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __call__(self, logits: np.ndarray, text: Sequence[int]) -> Choice:
        """The choice after `text` by `logits` [vocab]; of equal ones the first is the likeliest."""
        if self.repetition_penalty != 1:
            logits = self._penalized(logits, text)
        if not self.do_sample or self.top_k == 1:
            return certainly(int(logits.argmax()))
        kept = np.arange(len(logits))
        if self.top_k < len(logits):
            kept = np.argpartition(logits, -self.top_k)[-self.top_k :]
        kept = kept[np.argsort(-logits[kept], kind="stable")]
        with np.errstate(over="ignore"):  # next to no temperature leaves the likeliest
            scaled = (logits[kept].astype(np.float64) - logits[kept[0]]) / self.temperature
        shares = np.exp(scaled)
        shares /= shares.sum()
        if self.top_p < 1:
            count = int(np.searchsorted(np.cumsum(shares), self.top_p)) + 1
            kept, shares = kept[:count], shares[:count] / shares[:count].sum()
        return Choice(kept, shares)

    def _penalized(self, logits: np.ndarray, text: Sequence[int]) -> np.ndarray:
        """Keskar et al., arXiv 1909.05858, section 4.1; a negative logit is multiplied."""
        seen = np.unique(np.asarray(text))
        found: np.ndarray = logits.copy()
        with np.errstate(all="ignore"):  # of what leaves the numbers, the largest there are is left
            before, penalty = found[seen], np.float32(self.repetition_penalty)
            changed = np.where(before < 0, before * penalty, before / penalty)
        found[seen] = np.nan_to_num(changed)
        return found


def lookup(text: Sequence[int], count: int) -> list[int]:
    """`count` tokens by the latest of the longest matches of the text's end in the text; or none.

    What follows the match is proposed, and behind the text's end what is proposed already: a text
    that goes round is proposed to go on so. Prompt lookup, by Saxena (2023); Yang et al., arXiv
    2304.04487, do so with a reference beside the prompt.
    """
    tokens = np.asarray(text)
    ends = np.flatnonzero(tokens[:-1] == tokens[-1]) if count > 0 else np.zeros(0, np.int64)
    length = 1
    while length < LONGEST_MATCH:
        longer = ends[ends >= length]
        longer = longer[tokens[longer - length] == tokens[len(tokens) - 1 - length]]
        if not len(longer):
            break
        ends, length = longer, length + 1
    if not len(ends) or length < LEAST_MATCH:
        return []
    found: list[int] = tokens[ends[-1] + 1 :].tolist()
    while len(found) < count:
        found += found
    return found[:count]


class Lookup:
    """Proposes by `lookup`, and is certain of it."""

    share = 0.0  # of a step of the model, what one token takes

    def propose(self, text: Sequence[int], count: int, _random: np.random.Generator) -> Proposal:
        """Up to `count` tokens after `text`."""
        tokens = lookup(text, count)
        return tokens, [certainly(token) for token in tokens]


class Proposer:
    """Proposes what a smaller model draws, one token after the other.

    `share`: of a step of the model that it proposes to, what one of its own takes (`share_of`).
    """

    def __init__(self, model: Model, choose: Chooser, share: float = 0.0) -> None:
        self.model = model
        self.choose = choose
        self.share = share
        self.known = 0  # tokens in the cache that stand in the text for sure
        self.guessed: list[int] = []  # in the cache behind them

    def propose(self, text: Sequence[int], count: int, random: np.random.Generator) -> Proposal:
        """`count` tokens after `text`, which begins as it did before."""
        if count < 1:
            return [], []
        self._go_back(text)
        tokens: list[int] = []
        choices = []
        new = list(text[self.known :])
        self.known = len(text)
        while True:
            row = self.model.run(new)[-1]
            choices.append(self.choose(row, [*text, *tokens]))
            new = [choices[-1].draw(random)]
            tokens += new
            if len(tokens) == count:
                break
        self.guessed = tokens[:-1]  # the last has not been run
        return tokens, choices

    def _go_back(self, text: Sequence[int]) -> None:
        """Drop from the cache what was guessed and not accepted; leave a token to run."""
        kept = self.known
        for token in self.guessed:
            if kept + 1 >= len(text) or text[kept] != token:
                break
            kept += 1
        if kept < self.known + len(self.guessed):
            self.model.rewind(kept)
        self.known, self.guessed = kept, []


def accept(
    tokens: Sequence[int],
    drawn_from: Sequence[Choice],
    choice: Callable[[int], Choice],
    random: np.random.Generator,
) -> list[int]:
    """The tokens that a step makes: those of the proposed `tokens` that are accepted, and one more.

    `drawn_from` has the draft's choice for each of them; `choice(i)` is the model's own behind the
    first `i`, asked for no further than needed.
    """
    made: list[int] = []
    for token, draft in zip(tokens, drawn_from):  # noqa: B905 - of one length
        own = choice(len(made))
        if random.random() * draft.probability(token) >= own.probability(token):
            return [*made, own.without(draft).draw(random)]
        made.append(token)
    return [*made, choice(len(made)).draw(random)]


def most_worth(chance: float, cost: float) -> int:
    """How many tokens to propose, each accepted with the probability `chance`, to be fastest.

    `cost`: what proposing and verifying one takes, as a share of a step with none. The number n is
    that which makes the most tokens a time, (1 + p + ... + p^n) / (1 + n cost), as in theorem 3.8
    of arXiv 2211.17192, where verifying is for free. 0: a draft does not pay.
    """
    made = most = 1.0
    best = 0
    for count in range(1, MOST_TOKENS + 1):
        made += chance**count
        if made / (1 + cost * count) > most:
            most, best = made / (1 + cost * count), count
    return best


def share_of(draft: Path, model: Path) -> float:
    """What a step of a deployment takes of another's: as its weights do, which each step reads."""
    sizes = [
        sum(file.stat().st_size for file in folder.glob("*.onnx*")) for folder in (draft, model)
    ]
    return sizes[0] / sizes[1]


class Pace:
    """How many tokens to propose at a time, by what came of those before, the latest most of all.

    Not by the clock: a seed gives the same text again. `share`: of a step of the model, what one of
    the draft takes.
    """

    def __init__(self, share: float) -> None:
        self._cost = share + ROW_SHARE
        self._accepted, self._refused = _FIRST
        self._idle = 0

    def next(self) -> int:
        """For the next step."""
        chance = self._accepted / (self._accepted + self._refused)
        count = most_worth(chance, self._cost)
        self._idle = 0 if count else self._idle + 1
        return count or int(self._idle % _RETRY == 0)

    def tell(self, proposed: int, accepted: int) -> None:
        """What came of a step's tokens; behind one that is refused none is looked at."""
        if proposed:
            self._accepted = _KEEP * self._accepted + accepted
            self._refused = _KEEP * self._refused + (accepted < proposed)


@dataclass
class Tally:
    """What came of a draft: steps of the model behind the prompt, and what they made.

    `proposed` and `accepted` count the draft's tokens, `made` all that the steps made.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    made: int = 0

    @property
    def share_accepted(self) -> float:
        """Of the tokens proposed; 0 where none was."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def tokens_per_step(self) -> float:
        """What a step made; 1 without a draft."""
        return self.made / self.steps if self.steps else 0.0

    def to_json(self) -> dict[str, float]:
        """All of it, as JSON values."""
        shares = {"share_accepted": self.share_accepted, "tokens_per_step": self.tokens_per_step}
        return {**vars(self), **shares}


@dataclass
class Speculation:
    """Generates with a model and a draft; `count` tokens are proposed at a time.

    A `count` of 0: as many as pay (`Pace`).
    """

    model: Model
    draft: Lookup | Proposer
    choose: Chooser
    count: int
    random: np.random.Generator = field(default_factory=np.random.default_rng)
    tally: Tally = field(default_factory=Tally)

    def __post_init__(self) -> None:
        self._pace = Pace(self.draft.share)

    def tokens(
        self, prompt: Sequence[int], length: int, ends: Collection[int] = (), cached: int = 0
    ) -> Iterator[int]:
        """What comes after `prompt`, until one of `ends`, which comes too, or `length` in all.

        Both caches must hold `length` tokens, and be empty, but for `cached` tokens of the prompt
        in the model's. The tokens of a step come one right after the other.
        """
        text = list(prompt)
        new = [self.choose(self.model.run(text[cached:])[-1], text).draw(self.random)]
        while True:
            for token in new:
                yield token
                text.append(token)
                if token in ends or len(text) == length:
                    return
            new = self._step(text, length)

    def _step(self, text: list[int], length: int) -> list[int]:
        """The tokens after `text`, of which the last alone is not in the model's cache."""
        room = length - len(text) - 1  # the step itself makes one
        count = min(self.count or self._pace.next(), room)
        tokens, drawn_from = self.draft.propose(text, count, self.random)
        rows = self.model.run([text[-1], *tokens])
        made = accept(
            tokens,
            drawn_from,
            lambda i: self.choose(rows[i], [*text, *tokens[:i]]),
            self.random,
        )
        if len(made) <= len(tokens):
            self.model.rewind(len(text) + len(made) - 1)
        self._pace.tell(len(tokens), len(made) - 1)
        self.tally.steps += 1
        self.tally.proposed += len(tokens)
        self.tally.accepted += len(made) - 1
        self.tally.made += len(made)
        return made
