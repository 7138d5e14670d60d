"""Requests in a bounded line: what waits when the model is free is answered in one batch."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from owl_deploy.engines.writer import Row, Writer
from owl_deploy.serve.stops import Stops
from owl_deploy.serve.wire import Refused

Part = tuple[str, str | None]  # a piece of an answer, and why it ended: None but in the last
# After a batch of several, those who were answered together ask again within some milliseconds:
# the first of them must not go alone, and leave the others to wait for all of its answer.
_GATHER_S = 0.01


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

    The first that waits is in the next batch, with all behind it that the writer takes beside.
    Only the event loop's thread touches the line; all that the model does is done by one other.
    """

    def __init__(self, writer: Writer, waiting: int) -> None:
        self._writer, self._waiting = writer, waiting
        self._line: list[Answer] = []
        self._is_writing = self._was_several = False
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
    def _is_full(self) -> bool:
        free = 0 if self._is_writing else self._writer.batch
        return len(self._line) >= self._waiting + free

    async def _drop_the_gone(self) -> None:
        """Free the places of clients that left: each notices by itself, but only now and then."""
        for answer in tuple(self._line):
            if await answer.asked.is_gone():
                answer.leave()
        self._line = [one for one in self._line if one.is_wanted]

    async def _answer_all(self) -> None:
        """Answer batch after batch, until nobody waits."""
        while self._line:
            if self._was_several and len(self._line) < self._writer.batch:
                await asyncio.sleep(_GATHER_S)
            if batch := await self._next():
                self._was_several = len(batch) > 1
                self._is_writing = True
                await self._write(batch)
                self._is_writing = False

    async def _next(self) -> list[tuple[Answer, Row]]:
        """Take the next batch out of the line; who cannot be answered is told why."""
        for answer in tuple(self._line):
            await self._look_at(answer)
        batch: list[tuple[Answer, Row]] = []
        for answer in self._line:
            rows = [row for _, row in batch]
            if answer.is_wanted and answer.row and self._writer.takes([*rows, answer.row]):
                batch.append((answer, answer.row))
        taken = [answer for answer, _ in batch]
        self._line = [one for one in self._line if one.is_wanted and one not in taken]
        return batch

    async def _look_at(self, answer: Answer) -> None:
        """Have its row made, unless the client is gone: nobody would hear what a prompt costs."""
        try:
            if await answer.asked.is_gone():
                answer.leave()
            elif answer.row is None:
                answer.row = await self._in_thread(answer.asked.prepare)
        except Exception as error:
            answer.parts.put_nowait(error)
            answer.leave()

    async def _write(self, batch: list[tuple[Answer, Row]]) -> None:
        """Hand out what comes in each row, or to all that have not ended why no more does."""
        steps = self._writer.write_together([row for _, row in batch])
        try:
            while (pieces := await self._in_thread(next, steps, None)) is not None:
                for number, piece in pieces.items():
                    batch[number][0].hear(piece)
                # Whoever has the whole of an answer may ask again at once.
                self._is_writing = not all(row.ended for _, row in batch)
        except Exception as error:
            for answer, row in batch:
                if not row.ended:
                    answer.parts.put_nowait(error)

    async def _in_thread(self, call: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
        return await asyncio.get_running_loop().run_in_executor(self._pool, call, *arguments)
