"""llama.cpp, by the C interface that llama-cpp-python wraps: a batch in, pointers to logits out."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

MODEL = "model.gguf"
PART = 512  # tokens that are run at once, as in llama.cpp's own programs
# What tells processors apart, best first, as llama.cpp names it.
ISA = ("AMX_INT8", "AVX512_BF16", "AVX512_VNNI", "AVX512", "AVX_VNNI", "AVX2", "DOTPROD", "NEON")


class Driver:
    """Opens a GGUF in llama.cpp; see worker.py for what each method does."""

    def __init__(self) -> None:
        self.streams: list[Decoder] = []

    def prepare(self) -> None:
        """Import the engine, which is no part of the load time; it is to tell errors only."""
        import llama_cpp
        from llama_cpp._logger import set_verbose

        set_verbose(False)
        llama_cpp.llama_backend_init()

    def load(self, asked: Any) -> dict[str, Any]:  # noqa: ANN401 - worker.py's Asked
        """Map the file, and make a cache for each stream: of `context` tokens in each row."""
        import llama_cpp

        path = os.path.join(asked.folder, MODEL)  # noqa: PTH118 - bytes are what it takes
        model = llama_cpp.llama_model_load_from_file(
            path.encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise ValueError("llama.cpp cannot open " + path)
        self.streams = [Decoder(model, asked) for _ in range(asked.streams)]
        features = llama_cpp.llama_print_system_info().decode()
        found = [name for name in ISA if re.search(rf"\b{name} = 1", features)]
        return {
            "version": llama_cpp.__version__,
            "runtime": "llama.cpp, llama-cpp-python " + llama_cpp.__version__,
            "isa": found[0].lower() if found else "",
            "through": f"llama_decode, prompt in parts of {PART}, cache in fp16",
        }


class Decoder:
    """A context of the model: its cache has a sequence for each row of the batch."""

    def __init__(self, model: Any, asked: Any) -> None:  # noqa: ANN401
        import llama_cpp

        self.api = llama_cpp
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = asked.context * asked.batch  # divided among the sequences
        options.n_seq_max = asked.batch
        options.n_batch = options.n_ubatch = PART
        options.n_threads = options.n_threads_batch = asked.threads
        self.context = llama_cpp.llama_init_from_model(model, options)
        if not self.context:
            raise ValueError("llama.cpp has no memory for its cache")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = asked.batch
        self._make_arrays()
        self.reset()

    def _make_arrays(self) -> None:
        """One batch of `PART` places, written through numpy, so that a step makes no objects."""
        names = ("token", "pos", "n_seq_id", "sequence")
        self.places: dict[str, Any] = {name: np.ones(PART, np.int32) for name in names}
        self.places["logits"] = np.zeros(PART, np.int8)
        # Each place points to the list of its sequences, here of one.
        start, size = self.places["sequence"].ctypes.data, np.dtype(np.int32).itemsize
        self.places["seq_id"] = start + size * np.arange(PART, dtype=np.uintp)
        self.request = self.api.llama_batch()
        for name, kind in self.request._fields_:
            if name in self.places:
                setattr(self.request, name, ctypes.cast(self.places[name].ctypes.data, kind))

    def reset(self) -> None:
        """Empty the cache."""
        self.api.llama_memory_clear(self.memory, False)
        self.count = 0
        self.chosen = [0] * self.batch

    def mark(self) -> int:
        """The tokens in the cache, for `back`."""
        return self.count

    def back(self, state: int) -> None:
        """Forget all that came after `mark`."""
        for row in range(self.batch):
            if not self.api.llama_memory_seq_rm(self.memory, row, state, -1):
                raise ValueError("llama.cpp cannot take tokens out of this model's cache")
        self.count = state

    def _run(self, tokens: Any, positions: Any, rows: Any, wanted: Any) -> np.ndarray:  # noqa: ANN401
        """Run up to `PART` places; the logits [places wanted, vocab], until the next run."""
        count = len(tokens)
        self.places["token"][:count] = tokens
        self.places["pos"][:count] = positions
        self.places["sequence"][:count] = rows
        self.places["logits"][:count] = wanted
        self.request.n_tokens = count
        code = self.api.llama_decode(self.context, self.request)
        if code:
            why = "the cache is full" if code == 1 else f"code {code}"
            raise RuntimeError("llama_decode failed: " + why)
        shape = (int(self.places["logits"][:count].sum()), self.vocab)
        pointer = self.api.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, shape) if shape[0] else np.empty(shape, np.float32)

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Run `tokens` in the first row; yield the logits [n, vocab] of all of them, in parts."""
        for start in range(0, len(tokens), PART):
            part = tokens[start : start + PART]
            before, self.count = self.count, self.count + len(part)
            yield self._run(part, np.arange(before, self.count), 0, 1)

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens` in the first row; return the logits [vocab] of the last."""
        last = self._last(tokens, 0)
        self.count += len(tokens)
        return last

    def _last(self, tokens: list[int], row: int) -> np.ndarray:
        for start in range(0, len(tokens), PART):
            part = tokens[start : start + PART]
            place = np.arange(start, start + len(part))
            found = self._run(part, self.count + place, row, place == len(tokens) - 1)
        last: np.ndarray = found[0]
        return last

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt in every row; return the likeliest next token of the first."""
        self.chosen = [int(self._last(tokens, row).argmax()) for row in range(self.batch)]
        self.count += len(tokens)
        return self.chosen[0]

    def next(self) -> int:
        """Run the last tokens chosen, one of each row; return the first row's likeliest next."""
        rows = np.arange(self.batch)
        self.chosen = self._run(self.chosen, self.count, rows, 1).argmax(axis=1).tolist()
        self.count += 1
        return self.chosen[0]
