"""Requests in a bounded line, and those under way, which are answered side by side."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from owl_deploy.inference.rows import Row
from owl_deploy.inference.writer import Writer
from owl_deploy.serve.protocol import Refused
from owl_deploy.serve.stops import Stops

Part = tuple[str, str | None]  # a piece of an answer, and why it ended: None but in the last


@dataclass(frozen=True)
class Asked:
    """What is asked for: a row that `prepare` makes in the model's thread, up to one of `stops`.

    `is_gone` tells whether nobody hears the answer any more.
    """

    prepare: Callable[[], Row]
    stops: Sequence[str]
    is_gone: Callable[[], Awaitable[bool]]


class Answer:
    """What comes of one request: `parts`, or the exception that it failed with."""

    def __init__(self, asked: Asked) -> None:
        self.parts: asyncio.Queue[Part | Exception] = asyncio.Queue()
        self.asked = asked
        self.row: Row | None = None
        self.is_wanted = True
        self._stops = Stops(asked.stops)

    def leave(self) -> None:
        """Nobody wants it any more."""
        self.is_wanted = False
        if self.row is not None:
            self.row.ended = True

    def hear(self, piece: str) -> None:
        """Take what came in the row; there is a part for each token, if only an empty one."""
        assert self.row is not None
        self.parts.put_nowait((self._stops.feed(piece), None))
        if self._stops.found:
            self.row.ended = True
        if self.row.ended:
            ended = self._stops.found or self.row.tokens[-1] in self.row.ends
            cut = not self.row.room and not ended
            self.parts.put_nowait((self._stops.rest(), "length" if cut else "stop"))


class Line:
    """Answers in the order in which they were asked for; at most `waiting` wait.

    The first that waits is begun as soon as the writer has a place, beside those under way. Only
    the event loop's thread touches the line; all that the model does is done by one other.
    """

    def __init__(self, writer: Writer, waiting: int) -> None:
        self._writer, self._waiting = writer, waiting
        self._line: list[Answer] = []
        self._written: dict[Row, Answer] = {}
        self._task: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1)

    @asynccontextmanager
    async def place(self, asked: Asked) -> AsyncIterator[Answer]:
        """Hold a place, in line and then in a batch; raises `Refused` (429) where it is full."""
        if self._is_full:
            await self._drop_the_gone()
        if self._is_full:
            raise Refused(429, "Too many requests wait already.", "rate_limit_exceeded")
        answer = Answer(asked)
        self._line.append(answer)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._answer_all())
        try:
            yield answer
        finally:
            answer.leave()
            if answer in self._line:
                self._line.remove(answer)

    @property
    def _places(self) -> int:
        """How many more the writer has a place for, now or after the step that is under way."""
        return self._writer.batch - sum(not row.ended for row in self._written)

    @property
    def _is_full(self) -> bool:
        return len(self._line) >= self._waiting + self._places

    async def _drop_the_gone(self) -> None:
        """Free the places of clients that left: each notices by itself, but only now and then."""
        for answer in tuple(self._line):
            if await answer.asked.is_gone():
                answer.leave()
        self._line = [one for one in self._line if one.is_wanted]

    async def _answer_all(self) -> None:
        """Go on until nobody waits, and nothing is written."""
        while self._line or self._written:
            while self._line and self._places:
                await self._begin(self._line[0])
            await self._step()

    async def _begin(self, answer: Answer) -> None:
        """Have the first in line written; who cannot be answered is told why.

        For a client that is gone nothing is done: nobody would hear what a prompt costs.
        """
        try:
            if not await answer.asked.is_gone():
                row = await self._in_thread(answer.asked.prepare)
                if answer.is_wanted:
                    answer.row = row
                    self._writer.add(row)
                    self._written[row] = answer
        except Exception as error:
            answer.parts.put_nowait(error)
        if answer in self._line:
            self._line.remove(answer)

    async def _step(self) -> None:
        """Hand out what comes next in each row, or to all of them why no more does."""
        try:
            pieces = await self._in_thread(self._writer.step)
        except Exception as error:
            for answer in self._written.values():
                answer.parts.put_nowait(error)
            self._written.clear()
        else:
            for row, piece in pieces.items():
                self._written[row].hear(piece)
            self._written = {row: one for row, one in self._written.items() if not row.ended}

    async def _in_thread(self, call: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, _failing_as_others, call, *arguments)


def _failing_as_others(call: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Call; what is raised is an `Exception`, which a panic in Rust, as in tokenizers, is not."""
    try:
        return call(*arguments)
    except Exception:
        raise
    except BaseException as error:
        raise RuntimeError(f"{type(error).__name__}: {error}") from error
