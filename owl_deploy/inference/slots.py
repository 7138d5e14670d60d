"""Several texts in one session of ONNX Runtime, each in a place of its own in the caches.

The graph's caches are buffers [rows, heads, length, size], which past and present share, as in
onnxruntime-genai: a run of some rows is given a view of them. How many tokens a row holds its
attention mask says: so rows of any lengths go through the graph together, without padding.

The driver of ONNX Runtime reads this file where there is no package, too: nothing of it here.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np


class Slot:
    """The place of one text: a `Model` of speculate.py.

    `count`: the tokens that it holds; `read`: those of them that came in whole parts of a prompt.
    """

    def __init__(self, slots: Slots, place: int) -> None:
        self._slots, self.place, self.count = slots, place, 0
        self.read: list[int] = []

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        """Put `tokens` behind the others; the logits [n, vocab] of the last n of them.

        That are all of up to 16, and of more the last, or some.
        """
        whole = self._slots.part
        for start in range(0, len(tokens), whole):
            part = list(tokens[start : start + whole])
            logits: np.ndarray = self._slots.run(self.place, np.array([part]), [self.count])[0]
            if len(part) == whole and self.count == len(self.read):
                self.read += part
            self.count += len(part)
        return logits

    def rewind(self, count: int) -> None:
        """Keep the first `count` tokens."""
        self.count = count
        del self.read[count - count % self._slots.part :]

    def shared(self, tokens: Sequence[int]) -> int:
        """How many of the prompt `tokens`, but for its last, stand in the whole parts read."""
        return shared(self.read, tokens, self._slots.part)


class Slots:
    """A `session`'s graph, with caches for `rows` texts of up to `length` tokens.

    `size`: that of a head; `vocabulary`: the tokens that have logits; prompts are run in parts of
    so many tokens (`part`). What is left of a text stays in its place until another needs that, for
    one that begins in the same way: whole parts of its prompt, since these are computed to the last
    bit as they would be again. Memory is taken as texts grow. Raises `RuntimeError` for what the
    runtime stumbles over.
    """

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - without stubs
        rows: int,
        length: int,
        size: int,
        vocabulary: int,
        part: int,
    ) -> None:
        self._session, self._rows, self._length, self.part = session, rows, length, part
        inputs = {one.name: one for one in session.get_inputs()}
        self._has_positions = "position_ids" in inputs
        self._caches = {
            name: self._room(one.shape[1], size, "f2" if "float16" in one.type else "f4")
            for name, one in inputs.items()
            if name.startswith("past_key_values.")
        }
        self._logits = np.empty((rows, 1, vocabulary), np.float32)
        self._slots = [Slot(self, place) for place in range(rows)]  # by their places
        self._free = [*self._slots]  # those that are free for the longest first
        self._bindings: dict[tuple[int, int], Any] = {}  # of so many places from that one on

    def _room(self, heads: int, size: int, dtype: str) -> np.ndarray:
        """A cache in pages that the system gives when they are written to first."""
        shape = (self._rows, heads, self._length, size)
        memory = mmap.mmap(-1, math.prod(shape) * np.dtype(dtype).itemsize)
        return np.frombuffer(memory, dtype).reshape(shape)

    def enter(self, tokens: Sequence[int] = ()) -> Slot:
        """A place for a text, which holds as much of the prompt `tokens` as one has; there must be
        one that is free.
        """
        slot = max(self._free, key=lambda one: one.shared(tokens))
        self._free.remove(slot)
        slot.rewind(slot.shared(tokens))
        return slot

    def leave(self, slot: Slot) -> None:
        """Give up a place."""
        slot.rewind(len(slot.read))
        self._free.append(slot)

    def step(self, slots: Sequence[Slot], tokens: Sequence[int]) -> list[np.ndarray]:
        """Run one of `tokens` in each of `slots`; the logits [vocab] of each."""
        for slot in slots:  # they go to the first places, for a run is of neighbours
            if slot.place >= len(slots):
                self._swap(slot, next(one for one in self._slots if one not in slots))
        given = dict(zip(slots, tokens))  # noqa: B905 - as old as 3.8
        in_order = self._slots[: len(slots)]
        ids = np.array([[given[slot]] for slot in in_order])
        logits = self.run(0, ids, [slot.count for slot in in_order])
        for slot in slots:
            slot.count += 1
        return [logits[slot.place, 0] for slot in slots]

    def run(self, first: int, ids: np.ndarray, counts: Sequence[int]) -> np.ndarray:
        """Run the tokens `ids` [n, new] in n places from `first` on, which hold `counts`.

        Returns logits [n, new, vocab]; the engine `owl` leaves out those of long prompts, but for
        the last token's.
        """
        rows, new = ids.shape
        before = np.array(counts)[:, None]
        places = np.arange(before.max() + new)
        # The tokens of each row at the end of it, behind a row's lack of them.
        mask = (places >= len(places) - before - new).astype(np.int64)
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": mask}
        if self._has_positions:
            feeds["position_ids"] = before + np.arange(new)
        logits = self._logits[first : first + rows]
        if new > 1:
            logits = np.empty((rows, new, logits.shape[-1]), np.float32)
        binding = self._binding(first, rows)
        for name, values in feeds.items():
            binding.bind_cpu_input(name, values)
        _bind(binding.bind_output, "logits", logits)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # of a type for each status of the runtime
            raise RuntimeError(str(error)) from error
        return logits

    def _binding(self, first: int, rows: int) -> Any:  # noqa: ANN401 - without stubs
        """What gives a run the caches of `rows` places from `first` on."""
        if (first, rows) not in self._bindings:
            binding = self._bindings[first, rows] = self._session.io_binding()
            for name, cache in self._caches.items():
                part = cache[first : first + rows]
                _bind(binding.bind_input, name, part)
                _bind(binding.bind_output, name.replace("past_key_values.", "present.", 1), part)
        return self._bindings[first, rows]

    def _swap(self, one: Slot, other: Slot) -> None:
        """Have two texts change places."""
        for cache in self._caches.values():
            kept = cache[one.place, :, : one.count].copy()
            cache[one.place, :, : other.count] = cache[other.place, :, : other.count]
            cache[other.place, :, : one.count] = kept
        one.place, other.place = other.place, one.place
        self._slots[one.place], self._slots[other.place] = one, other


def shared(read: Sequence[int], tokens: Sequence[int], part: int) -> int:
    """With how many of the tokens `read` a prompt begins: in whole parts, and without its last,
    whose logits nobody has kept.
    """
    count = 0
    for end in range(part, min(len(read), len(tokens) - 1) + 1, part):
        if list(read[count:end]) != list(tokens[count:end]):
            break
        count = end
    return count


def _bind(bind: Any, name: str, values: np.ndarray) -> None:  # noqa: ANN401 - without stubs
    """Let a session read or write `values` where they lie."""
    bind(name, "cpu", 0, values.dtype, values.shape, values.ctypes.data)
