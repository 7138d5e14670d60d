"""A deployment that stays open and writes texts: one by one in onnxruntime-genai, or side by side.

onnxruntime-genai begins and ends a batch as one: who comes later waits for the longest text in it.
So texts that are written side by side, for the clients of a server, each have a place of their own
in a session of ONNX Runtime (slots.py), and their tokens are chosen here.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from owl_deploy.errors import BadInput, EngineFailed, first_line
from owl_deploy.inference.deployment import Deployment
from owl_deploy.inference.draft import Draft, Drafter
from owl_deploy.inference.drivers.onnxruntime import (
    PROMPT_PART,
    Rows,
    open_genai,
    open_session,
    pad_of,
    run_prompt,
    runs_whole,
)
from owl_deploy.inference.loading import GENAI_CONFIG
from owl_deploy.inference.registry import MOST_ROWS
from owl_deploy.inference.rows import Row, Speed, length_of
from owl_deploy.inference.sampling import Sampling, search_told
from owl_deploy.inference.slots import Slot, Slots
from owl_deploy.inference.speculate import Speculation
from owl_deploy.models.tokenizer import Tokenizer

_READ_S = 0.25  # that texts wait, and the rest of a part of a prompt, while others are read


class Writer(ABC):
    """An open deployment, and the rows that it writes: `batch` at once, at most.

    `context`: the tokens of a prompt and its answer together, at most; None for all that the model
    takes. `drafting`: what proposes to a text that goes alone. `usual`: how it draws tokens where a
    sampling does not say. Raises `BadInput` for a folder that onnxruntime-genai cannot open,
    without a tokenizer, or with a sampling that is impossible; opening and each method raise
    `EngineFailed` for what the runtime stumbles over.
    """

    _runtime = "onnxruntime-genai"

    def __init__(
        self,
        opened: Deployment,
        threads: int,
        context: int | None = None,
        drafting: Draft | None = None,
        batch: int = 1,
    ) -> None:
        self.path, self.batch = opened.path, batch
        opened.check_opens()
        told = opened.folder.settings.get("search", {})
        self.usual = search_told(told, self.path / GENAI_CONFIG)
        takes = opened.folder.number("context_length")
        self.context = min(context or takes, takes)
        self.chat_template, self._tokenizer = opened.chat_template, Tokenizer(self.path)
        self._check_tokens = opened.check_tokens
        self._ends = opened.ends
        import onnxruntime_genai

        with self._stumbling():
            self._pieces = onnxruntime_genai.Tokenizer(str(self.path.absolute()))
            self._drafter = Drafter(drafting, self.path, threads) if drafting else None
        self._coming: Iterator[int] | None = None  # the tokens of the one row that goes alone
        self._rows: dict[Row, tuple[Any, float]] = {}  # with its stream, and when it was begun
        takes_turns = drafting is not None and drafting.deployment is not None
        self._open(opened, threads, takes_turns=takes_turns)

    @abstractmethod
    def _open(self, opened: Deployment, threads: int, *, takes_turns: bool) -> None:
        """Open the model; `takes_turns`: with another, the draft's."""

    def row(self, prompt: str, sampling: Sampling, speed: Speed, *, templated: bool = False) -> Row:
        """What is to be written after `prompt`, which is `templated` if `chat_template` made it.

        Raises `PromptTooLong`, and `BadInput` for one that has no tokens, or some that the model
        has not.
        """
        # What the model's own puts before a text: a BOS, mostly. A template has it.
        tokens = self._tokenizer.encode(prompt, special=not templated)
        if not tokens:
            raise BadInput("The prompt has no tokens.", "Give a text to go on from.")
        self._check_tokens(tokens)
        speed.prompt_tokens = len(tokens)
        length = length_of(len(tokens), sampling.max_new_tokens, self.context)
        ends, never = ([], self._ends) if sampling.ignore_eos else (self._ends, [])
        return Row(tokens, length, sampling, speed, ends, never, sampling.search(self.usual))

    def add(self, row: Row) -> None:
        """Write `row` from the next step on; there must be a place for it (`batch`)."""
        self._drop_ended()
        assert len(self._rows) < self.batch
        self._rows[row] = self._pieces.create_stream(), time.perf_counter()

    def step(self) -> dict[Row, str]:
        """Go on with all rows: the piece of each that has a token more.

        A piece is empty where a character is not whole yet. An error ends all rows.
        """
        try:
            with self._stumbling():
                self._drop_ended()
                chosen = self._advance() if self._rows else {}
                live = {row: token for row, token in chosen.items() if not row.ended}
                return {row: self._said(row, token) for row, token in live.items()}
        except BaseException:
            for row in self._rows:
                row.ended = True
            raise
        finally:
            self._drop_ended()

    def write(
        self, prompt: str, sampling: Sampling, speed: Speed, *, templated: bool = False
    ) -> Iterator[str]:
        """Yield what comes after `prompt`, piece by piece, where nothing else is written.

        `templated` and what is raised: as in `row`.
        """
        row = self.row(prompt, sampling, speed, templated=templated)
        self.add(row)
        while not row.ended:
            yield from self.step().values()

    @abstractmethod
    def _advance(self) -> dict[Row, int]:
        """The next token of those rows, none of which has ended, that come to have one."""

    def _leave(self, row: Row) -> None:
        """Nothing more is asked of `row`, which may not have been begun."""
        self._coming = None

    def _drop_ended(self) -> None:
        for row in [row for row in self._rows if row.ended]:
            del self._rows[row]
            self._leave(row)

    def _said(self, row: Row, token: int) -> str:
        stream, started = self._rows[row]
        row.take(token, time.perf_counter() - started)
        row.speed.context_full = len(row.tokens) >= self.context
        piece: str = stream.decode(token)
        return piece

    @contextmanager
    def _stumbling(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # onnxruntime-genai has this one type for all that is wrong
            what = f"{self._runtime} failed with {self.path}: {first_line(error)}"
            raise EngineFailed(what) from error


def open_writer(
    opened: Deployment,
    threads: int,
    context: int | None = None,
    drafting: Draft | None = None,
    batch: int = 1,
) -> Writer:
    """What writes up to `batch` texts at once; `drafting`: what proposes to one that is alone.

    A model whose prompts must be run in one go has its texts written one by one. Raises as `Writer`
    does, and `BadInput` for a `batch` that is impossible.
    """
    if not 1 <= batch <= MOST_ROWS:
        raise BadInput(f"--batch {batch} is not between 1 and {MOST_ROWS}.")
    if batch == 1 or runs_whole(opened.path):
        return OneByOne(opened, threads, context, drafting)
    return SideBySide(opened, threads, context, drafting, batch)


class OneByOne(Writer):
    """Writes in onnxruntime-genai, whose caches have room for the one row."""

    def _open(self, opened: Deployment, threads: int, *, takes_turns: bool) -> None:
        self._vocabulary, self._pad = opened.vocab, pad_of(self.path)
        self._whole, library = runs_whole(self.path), str(opened.library or "")
        with self._stumbling():
            self._model = open_genai(str(self.path), threads, library, takes_turns=takes_turns)

    def _advance(self) -> dict[Row, int]:
        (row,) = self._rows
        self._coming = self._coming or self._tokens(row)
        return {row: next(self._coming)}

    def _tokens(self, row: Row) -> Iterator[int]:
        if self._drafter is not None:
            model = Rows(self._model, row.length, self._pad, whole=self._whole)
            speculation = self._drafter.speculation(model, row)
            yield from speculation.tokens(row.tokens, row.length, row.ends)
            return
        while True:  # it ends before the row where the settings name no end, and is begun anew
            generator = self._generator(row)
            ids = np.array([row.tokens], np.int32)
            run_prompt(generator, ids, self._pad, whole=self._whole)
            done = False
            while not done:
                generator.generate_next_token()
                done = generator.is_done()
                yield int(generator.get_next_tokens()[0])

    def _generator(self, row: Row) -> Any:  # noqa: ANN401 - without stubs
        import onnxruntime_genai

        search, sampling = row.search, row.sampling
        options: dict[str, Any] = {
            "max_length": row.length,
            "min_length": row.length if sampling.ignore_eos else 0,
            "do_sample": search.do_sample,
            "repetition_penalty": search.repetition_penalty,
        }
        if search.do_sample:
            options |= {
                "temperature": search.temperature,
                "top_k": min(search.top_k, self._vocabulary),
                "top_p": search.top_p,
            }
        if sampling.seed is not None:
            options["random_seed"] = sampling.seed
        parameters = onnxruntime_genai.GeneratorParams(self._model)
        parameters.set_search_options(**options)
        return onnxruntime_genai.Generator(self._model, parameters)


class SideBySide(Writer):
    """Writes a token of each row at a step; a row comes, and ends, while the others go on.

    Prompts are read one after the other, in parts between which the others go on. A row that is the
    only one when it begins has the draft, whenever it is the only one; one that is drawn by a seed
    has none, for its text would depend on when that is.
    """

    def _open(self, opened: Deployment, threads: int, *, takes_turns: bool) -> None:
        self._runtime, library = "onnxruntime", str(opened.library or "")
        with self._stumbling():
            session = open_session(
                self.path, threads, library, last_logits=True, takes_turns=takes_turns
            )
        size = opened.folder.number("head_size", "decoder")
        self._slots = Slots(session, self.batch, self.context, size, opened.vocab, PROMPT_PART)
        self._places: dict[Row, tuple[Slot, np.random.Generator]] = {}
        self._drafted: Row | None = None  # the one that has the draft
        self._speculation: Speculation | None = None  # its, once it has begun

    def add(self, row: Row) -> None:
        """Write `row` from the next step on, as `Writer` does."""
        super().add(row)
        self._pause_draft()
        slot = self._slots.enter(() if row.anew else row.tokens)
        row.speed.cached_tokens = slot.count
        self._places[row] = slot, np.random.default_rng(row.sampling.seed)
        is_seeded = row.search.do_sample and row.sampling.seed is not None
        if self._drafter is not None and len(self._rows) == 1 and not is_seeded:
            self._drafted = row

    def _pause_draft(self) -> None:
        """Have the row that has one go on without, from what was said of it."""
        if self._coming is not None:
            assert self._drafted is not None
            slot, _ = self._places[self._drafted]
            slot.rewind(min(slot.count, len(self._drafted.tokens) - 1))
        self._coming = None

    def _advance(self) -> dict[Row, int]:
        if self._drafted is not None and len(self._rows) == 1:
            return self._with_draft(self._drafted)
        found = self._read()
        written = [row for row in self._rows if row not in found and self._is_read(row)]
        if written:
            slots = [self._places[row][0] for row in written]
            rows = self._slots.step(slots, [row.tokens[-1] for row in written])
            found |= {
                row: self._choose(row, logits) for row, logits in zip(written, rows, strict=True)
            }
        return found

    def _with_draft(self, row: Row) -> dict[Row, int]:
        """Read a part of the prompt of `row`, or draft once there is no more than one to read."""
        slot, _ = self._places[row]
        if len(row.tokens) - slot.count > PROMPT_PART:
            slot.run(row.tokens[slot.count :][:PROMPT_PART])
            return {}
        if self._coming is None:
            assert self._drafter is not None
            self._speculation = self._speculation or self._drafter.speculation(slot, row)
            self._coming = self._speculation.tokens(row.tokens, row.length, row.ends, slot.count)
        return {row: next(self._coming)}

    def _is_read(self, row: Row) -> bool:
        return row.speed.new_tokens > 0 and self._places[row][0].count == len(row.tokens) - 1

    def _read(self) -> dict[Row, int]:
        """Read on in prompts, for `_READ_S` at most; the first tokens of those that are read."""
        found: dict[Row, int] = {}
        unread = [row for row in self._rows if not self._is_read(row)]
        started = time.perf_counter()
        while unread:
            row = unread[0]
            slot, _ = self._places[row]
            logits = slot.run(row.tokens[slot.count :][:PROMPT_PART])
            if slot.count == len(row.tokens):
                found[row] = self._choose(row, logits[-1])
                del unread[0]
            if time.perf_counter() - started > _READ_S:
                break
        return found

    def _choose(self, row: Row, logits: np.ndarray) -> int:
        return row.choose(logits, row.tokens).draw(self._places[row][1])

    def _leave(self, row: Row) -> None:
        super()._leave(row)
        if row is self._drafted:
            self._drafted = self._speculation = None
        self._slots.leave(self._places.pop(row)[0])
