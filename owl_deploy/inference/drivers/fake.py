"""An engine that runs nothing: `fake.json` in the deployment says how it behaves, for tests.

    {"decode_ms": 20, "prefill_ms": 100, "noise": 0.02, "load_s": 1, "peak_bytes": 1000,
     "vocab": 16, "logits_off": 0, "leaves": "what it writes into a temporary file",
     "fail": {"op": "load" | "prompt" | "next", "how": "abort"|"hang"|"raise"|"exit",
              "beyond": 0}}

Its clock is its own: a latency of an hour costs a test no time. `noise` is the relative spread
between processes (a log-normal factor drawn once a process). `peak_bytes` is memory that it takes,
on top of what the process has. It fails where it is opened for a context `beyond` so many tokens.
"""

from __future__ import annotations

import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class Driver:
    """Behaves as the deployment says; see worker.py for what each method does."""

    def __init__(self) -> None:
        self.now = 0.0
        self.tokens: list[int] = []
        self.texts: dict[int, int] = {}
        self.streams = [self]

    def clock(self) -> float:
        """The fake's own time, in seconds."""
        return self.now

    def prepare(self) -> None:
        """Nothing to import."""

    def load(self, asked: Any) -> dict[str, Any]:  # noqa: ANN401 - worker.py's Asked
        """Read the behaviour."""
        text = (Path(asked.folder) / "fake.json").read_text(encoding="utf-8")
        self.behaviour: dict[str, Any] = json.loads(text)
        self.context = asked.context
        print("fake engine: loading")  # noqa: T201 - engines print to stdout; it must do no harm
        self._maybe_fail("load")
        if "leaves" in self.behaviour:
            (Path(tempfile.mkdtemp()) / "left").write_text(self.behaviour["leaves"])
        self.taken = np.ones(self.behaviour.get("peak_bytes", 0), np.uint8)
        self.factor = math.exp(random.gauss(0.0, self.behaviour.get("noise", 0.0)))
        self.now += self.behaviour.get("load_s", 0.0)
        self.streams = [self] * asked.streams
        return {"version": "1", "runtime": "fake 1", "isa": "", "through": "nothing"}

    def reset(self) -> None:
        """Empty the cache."""
        self.tokens = []

    def prompt(self, tokens: list[int]) -> int:
        """Take `prefill_ms`, whatever the prompt's length."""
        self._maybe_fail("prompt")
        self.now += self.behaviour.get("prefill_ms", 0.0) * self.factor / 1e3
        return int(self.extend(tokens).argmax())

    def next(self) -> int:
        """Take `decode_ms`."""
        self._maybe_fail("next")
        self.now += self.behaviour.get("decode_ms", 0.0) * self.factor / 1e3
        return int(self.extend([0]).argmax())

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Logits that put the last token's successor first."""
        last: np.ndarray = next(self.logits(tokens))[-1]
        return last

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """One part [n, vocab]: 1 at the successor of each token, else 0."""
        self.tokens += tokens
        vocab = self.behaviour.get("vocab", 16)
        off = np.float32(self.behaviour.get("logits_off", 0.0))
        yield np.eye(vocab, dtype=np.float32)[(np.array(tokens) + 1) % vocab] + off

    def begin(self, text: int, prompt: list[int]) -> int:
        """The successor of the prompt's last token."""
        self.texts[text] = (prompt[-1] + 1) % self.behaviour.get("vocab", 16)
        return self.texts[text]

    def step(self) -> dict[int, int]:
        """The successor of each text's last token."""
        vocab = self.behaviour.get("vocab", 16)
        self.texts = {text: (last + 1) % vocab for text, last in self.texts.items()}
        return self.texts

    def keep(self, texts: list[int]) -> None:
        """End all texts but these."""
        self.texts = {text: last for text, last in self.texts.items() if text in texts}

    def _maybe_fail(self, operation: str) -> None:
        fail = self.behaviour.get("fail", {})
        if fail.get("op") != operation or self.context <= fail.get("beyond", 0):
            return
        print("fake engine: assertion failed in " + operation, file=sys.stderr, flush=True)  # noqa: T201
        if fail["how"] == "abort":
            os.abort()
        if fail["how"] == "hang":
            time.sleep(3600)
        if fail["how"] == "exit":
            os._exit(7)
        raise RuntimeError("the fake engine was told to fail")
