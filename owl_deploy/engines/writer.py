"""A deployment that stays open in onnxruntime-genai and writes texts, alone or in batches."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from owl_deploy.engines.deployment import Deployment
from owl_deploy.engines.draft import Draft
from owl_deploy.engines.loading import GENAI_CONFIG, LAST_LOGITS
from owl_deploy.engines.registry import MOST_ROWS
from owl_deploy.engines.sampling import DEFAULT_NEW_TOKENS, UNLIMITED, Sampling, search_told
from owl_deploy.engines.speculate import Lookup, Proposer, Search, Speculation, Tally, share_of
from owl_deploy.errors import BadInput, EngineFailed, first_line
from owl_deploy.tokenizer import Tokenizer

_MOST_LOGITS = 2**28  # bytes, of several prompts whose tokens' logits are all made


class PromptTooLong(BadInput):
    """A prompt that leaves no room for what is to come after it."""


@dataclass
class Speed:
    """What a generation took: seconds to the first token, and after it; tokens made.

    `context_full`: it ended because the model takes no more. `draft`: what came of a draft's
    proposals, where one was given.
    """

    prompt_tokens: int = 0
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

    `speed` is filled in meanwhile. `ends`: tokens that end it before. `search`: how `sampling` has
    its tokens chosen in this deployment. `ended`: set once the text has its last token, or by
    whoever wants no more of it.
    """

    tokens: list[int]
    length: int
    sampling: Sampling
    speed: Speed = field(default_factory=Speed)
    ends: list[int] = field(default_factory=list)
    search: Search = field(default_factory=Search)
    ended: bool = False

    @property
    def room(self) -> int:
        """How many tokens may come yet."""
        return self.length - len(self.tokens)

    @property
    def shared(self) -> tuple[Search, bool] | None:
        """What texts that are written in one batch have in common; None for what goes alone.

        A seed's text would depend on its company, and a penalty would see the padding.
        """
        is_seeded = self.search.do_sample and self.sampling.seed is not None
        if is_seeded or self.search.repetition_penalty != 1:
            return None
        return self.search, self.sampling.ignore_eos


class Writer:
    """A deployment that stays open in onnxruntime-genai, and writes one batch after another.

    `context`: the tokens of a prompt and its answer together, at most; None for all that the model
    takes; `drafting`: what proposes tokens to a text that is written alone; `batch`: the texts that
    are written together, at most. `usual`: how it draws tokens where a sampling does not say. What
    is begun must be done with before the next. Raises `BadInput` for a folder that
    onnxruntime-genai cannot open, without a tokenizer, or with a sampling that is impossible; each
    method raises `EngineFailed` for what that stumbles over.
    """

    def __init__(
        self,
        opened: Deployment,
        threads: int,
        context: int | None = None,
        drafting: Draft | None = None,
        batch: int = 1,
    ) -> None:
        self.path, self._ends = opened.path, opened.ends
        self._drafting = drafting
        if not (self.path / GENAI_CONFIG).is_file():
            raise BadInput(
                f"{self.path} has no {GENAI_CONFIG}, so onnxruntime-genai cannot open it.",
                "Export the checkpoint with --target owl or onnxruntime.",
            )
        told = opened.folder.settings.get("search", {})
        self.usual = search_told(told, self.path / GENAI_CONFIG)
        takes = opened.folder.number("context_length")
        self.context = min(context or takes, takes)
        pad = opened.folder.settings["model"].get("pad_token_id")
        pad = None if pad is None else opened.folder.number("pad_token_id")
        if pad is not None and not 0 <= pad < opened.vocab:
            pad = None
        # Prompts that are run in parts, as the settings may ask for, go alone.
        in_parts = "chunk_size" in told
        if not 1 <= batch <= MOST_ROWS:
            raise BadInput(f"--batch {batch} is not between 1 and {MOST_ROWS}.")
        self.batch = 1 if in_parts or pad is None else batch
        self._vocabulary, self._pad = opened.vocab, pad or 0
        self.chat_template, self._tokenizer = opened.chat_template, Tokenizer(self.path)
        options = opened.folder.settings["model"].get("decoder", {}).get("session_options", {})
        self._last_logits = LAST_LOGITS in options
        import onnxruntime_genai

        from owl_deploy.engines.drivers.onnxruntime import open_genai, runs_whole

        self._whole = runs_whole(self.path)
        beside = drafting.deployment if drafting is not None else None
        self._draft_whole = beside is not None and runs_whole(beside.path)
        with self._stumbling():
            in_turns = drafting is not None and drafting.deployment is not None
            library = str(opened.library or "")
            self._model = open_genai(str(self.path), threads, library, takes_turns=in_turns)
            self._draft = _open_draft(drafting, threads)
            self._pieces = onnxruntime_genai.Tokenizer(self._model)

    def row(self, prompt: str, sampling: Sampling, speed: Speed, *, templated: bool = False) -> Row:
        """What is to be written after `prompt`, which is `templated` if `chat_template` made it.

        Raises `PromptTooLong`, and `BadInput` for one that has no tokens.
        """
        # What the model's own puts before a text: a BOS, mostly. A template has it.
        tokens = self._tokenizer.encode(prompt, special=not templated)
        if not tokens:
            raise BadInput("The prompt has no tokens.", "Give a text to go on from.")
        speed.prompt_tokens = len(tokens)
        length = length_of(len(tokens), sampling.max_new_tokens, self.context)
        ends = [] if sampling.ignore_eos else self._ends
        return Row(tokens, length, sampling, speed, ends, sampling.search(self.usual))

    def takes(self, rows: Sequence[Row]) -> bool:
        """Whether `rows` can be written together.

        They must be few enough, their tokens chosen alike, and their prompts' logits bearable.
        """
        shared = {row.shared for row in rows}
        alike = len(rows) == 1 or (len(shared) == 1 and None not in shared)
        # A row that ends like the padding is written before all others: it has none beside it.
        fits = len(rows) == 1 or all(row.tokens[-1] != self._pad for row in rows)
        return len(rows) <= self.batch and alike and fits and self._bears(rows)

    def _bears(self, rows: Sequence[Row]) -> bool:
        """Whether the logits of all their tokens so far fit; of a row by itself no more are made
        than of a part of it, and of several the last tokens' alone where the engine knows how.
        """
        tokens = len(rows) * max(len(row.tokens) for row in rows)
        fits = tokens * self._vocabulary * np.dtype(np.float32).itemsize <= _MOST_LOGITS
        return len(rows) == 1 or self._last_logits or fits

    def write(
        self, prompt: str, sampling: Sampling, speed: Speed, *, templated: bool = False
    ) -> Iterator[str]:
        """Yield what comes after `prompt`; a piece is empty where a character is not whole yet.

        `templated` and what is raised: as in `row`.
        """
        row = self.row(prompt, sampling, speed, templated=templated)
        for pieces in self.write_together([row]):
            yield pieces[0]

    def write_together(self, rows: Sequence[Row]) -> Iterator[dict[int, str]]:
        """Yield step by step what comes in each of `rows`, by its number, until all have ended.

        `takes` must be true of them. The pieces are as `write` has them. A row that has ended is
        run on with the others, unheard. Rows lose room to the padding beside the longest: those
        that need it are begun anew, with all their tokens, once that one has filled the context.
        """
        with self._stumbling():
            started = time.perf_counter()
            streams = [self._pieces.create_stream() for _ in rows]
            while going := [number for number, row in enumerate(rows) if not row.ended]:
                # Beside others a last token that is the padding's would be taken for that.
                going = [n for n in going if rows[n].tokens[-1] == self._pad][:1] or going
                if not self._bears([rows[number] for number in going]):
                    going = going[:1]
                for tokens in self._steps([rows[number] for number in going]):
                    elapsed_s = time.perf_counter() - started
                    chosen = dict(zip(going, tokens, strict=True))
                    live = [number for number in going if not rows[number].ended]
                    for number in live:
                        self._add(chosen[number], rows[number], elapsed_s)
                    yield {number: streams[number].decode(chosen[number]) for number in live}

    def _steps(self, rows: Sequence[Row]) -> Iterator[list[int]]:
        """The next token of each row, until all have ended or the longest fills the context."""
        if self._drafting is not None and len(rows) == 1:
            yield from self._drafted_steps(rows[0], self._drafting)
            return
        from owl_deploy.engines.drivers.onnxruntime import in_rows, run_prompts

        ids = in_rows([row.tokens for row in rows], self._pad)
        length = min(ids.shape[1] + max(row.room for row in rows), self.context)
        generator = _generator(self._model, length, rows, self._vocabulary)
        run_prompts(generator, ids, self._pad, whole=self._whole)
        while not generator.is_done() and not all(row.ended for row in rows):
            generator.generate_next_token()
            yield generator.get_next_tokens().tolist()

    def _drafted_steps(self, row: Row, drafting: Draft) -> Iterator[list[int]]:
        """The next token of a row that goes alone, with the draft."""
        from owl_deploy.engines.drivers.onnxruntime import Rows, pad_of

        proposing: Lookup | Proposer = Lookup()
        if drafting.deployment is not None:
            share = share_of(drafting.deployment.path, self.path)
            pad = pad_of(drafting.deployment.path)
            rows = Rows(self._draft, row.length, pad, whole=self._draft_whole)
            proposing = Proposer(rows, row.search, share)
        random = np.random.default_rng(row.sampling.seed)
        rows = Rows(self._model, row.length, self._pad, whole=self._whole)
        speculation = Speculation(rows, proposing, row.search, drafting.tokens, random)
        row.speed.draft = speculation.tally
        for token in speculation.tokens(list(row.tokens), row.length, row.ends):
            yield [token]
            if row.ended:
                return

    def _add(self, token: int, row: Row, elapsed_s: float) -> None:
        row.tokens.append(token)
        row.speed.count(elapsed_s)
        row.speed.context_full = len(row.tokens) >= self.context
        if token in row.ends or not row.room:  # no `|=`: another thread may end it meanwhile
            row.ended = True

    @contextmanager
    def _stumbling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # onnxruntime-genai has this one type for all that is wrong
            raise EngineFailed(
                f"onnxruntime-genai failed with {self.path}: {first_line(error)}"
            ) from error


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


def _generator(model: Any, length: int, rows: Sequence[Row], vocabulary: int) -> Any:  # noqa: ANN401
    """What writes `rows`, which are all chosen as the first is."""
    import onnxruntime_genai

    search, sampling = rows[0].search, rows[0].sampling
    options: dict[str, Any] = {
        "batch_size": len(rows),
        "max_length": length,
        "min_length": length if sampling.ignore_eos else 0,
        "do_sample": search.do_sample,
        "repetition_penalty": search.repetition_penalty,
    }
    if search.do_sample:
        options |= {
            "temperature": search.temperature,
            "top_k": min(search.top_k, vocabulary),
            "top_p": search.top_p,
        }
    if sampling.seed is not None:
        options["random_seed"] = sampling.seed
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(**options)
    return onnxruntime_genai.Generator(model, parameters)


def _open_draft(drafting: Draft | None, threads: int) -> Any:  # noqa: ANN401 - without stubs
    """The model that proposes, open; None where none does."""
    from owl_deploy.engines.drivers.onnxruntime import open_genai

    if drafting is None or drafting.deployment is None:
        return None
    library = str(drafting.deployment.library or "")
    return open_genai(str(drafting.deployment.path), threads, library, takes_turns=True)
