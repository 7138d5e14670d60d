"""The process an engine runs in: JSON requests on stdin, JSON answers on stdout, one a line.

Started as `python -I worker.py DRIVER.py` with the Python of the engine's own environment, which
may be as old as 3.8: no import of owl_deploy here. A driver has one class, `Driver`, with

    load(folder, threads, context, all_logits) -> dict   open the model; its version, isa, ...
    reset()                                              an empty cache
    prompt(tokens) -> int                                run a prompt, return the next token
    next() -> int                                        one decode step after prompt() or next()
    extend(tokens) -> [vocab]                            run tokens, logits of the last one
    logits(tokens) -> yields [n, vocab]                  run tokens, logits of all of them, in parts

and, if its time is not real, `clock() -> seconds`. What is timed, and how, is written here, once:
every engine is measured by the same loops.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, Any

import numpy as np


class Worker:
    """Answers requests with one engine, by way of its driver."""

    def __init__(self, driver: Any) -> None:  # noqa: ANN401 - a class from a file known at run time
        self.driver = driver
        self.clock: Callable[[], float] = getattr(driver, "clock", time.perf_counter)

    def load(
        self, folder: str, threads: int, context: int, all_logits: bool = False
    ) -> dict[str, Any]:
        """Open the model; `seconds` includes what the engine compiles, not its import."""
        self.driver.prepare()
        start = self.clock()
        about = self.driver.load(folder, threads, context, all_logits)
        return {"seconds": self.clock() - start, "threads": threads, **about}

    def decode(self, prompt: list[int], steps: int, warmup: int) -> dict[str, Any]:
        """Time `steps` single tokens after `prompt` and `warmup` tokens: latencies in ms."""
        self.driver.reset()
        self.driver.prompt(prompt)
        for _ in range(warmup):
            self.driver.next()
        return {"latencies_ms": [self._timed(self.driver.next) for _ in range(steps)]}

    def prefill(self, prompt: list[int], repeats: int, warmup: int) -> dict[str, Any]:
        """Time `prompt` in an empty cache, up to and with the first new token: latencies in ms."""
        times = []
        for _ in range(warmup + repeats):
            self.driver.reset()
            times.append(self._timed(lambda: self.driver.prompt(prompt)))
        return {"latencies_ms": times[warmup:]}

    def _timed(self, action: Callable[[], Any]) -> float:
        start = self.clock()
        action()
        return (self.clock() - start) * 1e3

    def greedy(
        self, tokens: list[int], count: int, logits_file: str = "", prompt_logits_file: str = ""
    ) -> dict[str, Any]:
        """Continue `tokens` by the `count` likeliest, one at a time with the cache.

        Writes float32 .npy files if asked: the logits each new token was chosen by [count, vocab],
        and those of every prompt token [len(tokens), vocab] (needs `all_logits` at load).
        """
        self.driver.reset()
        if prompt_logits_file:
            parts = [np.array(part, np.float32) for part in self.driver.logits(tokens)]
            np.save(prompt_logits_file, np.concatenate(parts))
            last = parts[-1][-1]
        else:
            last = self.driver.extend(tokens)
        chosen: list[int] = []
        rows = []
        while True:
            rows.append(np.array(last, np.float32))
            chosen.append(int(rows[-1].argmax()))
            if len(chosen) == count:
                break
            last = self.driver.extend(chosen[-1:])
        if logits_file:
            np.save(logits_file, np.stack(rows))
        return {"tokens": chosen}

    def score(self, tokens_file: str, window: int, windows: int = 0) -> dict[str, Any]:
        """Negative log-likelihood of a token file (int .npy [n]), for perplexity.

        Windows of `window` tokens do not overlap, and each is read alone: an empty cache, no token
        put before it, so its first token is not predicted. A last part shorter than `window` is
        left out. `windows` limits how many (0: all). Needs `all_logits` at load. Returns the sum
        for each window, over `window - 1` predictions, in nats.
        """
        tokens = np.load(tokens_file)
        total = len(tokens) // window
        sums = []
        for index in range(min(total, windows) if windows else total):
            part = tokens[index * window : (index + 1) * window]
            sums.append(self._window_nll(part.astype(np.int64)))
        return {"nll": sums, "predictions": window - 1}

    def _window_nll(self, tokens: np.ndarray) -> float:
        self.driver.reset()
        position, total = 0, 0.0
        for logits in self.driver.logits(tokens.tolist()):  # [n, vocab] each
            following = tokens[position + 1 : position + 1 + len(logits)]
            position += len(logits)
            for start in range(0, len(following), 128):  # float64 of 128 rows at once, not of all
                wanted = following[start : start + 128]
                rows = logits[start : start + len(wanted)].astype(np.float64)
                top = rows.max(axis=1)
                norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
                total += float((norm - rows[np.arange(len(wanted)), wanted]).sum())
        return total

    def memory(self) -> dict[str, Any]:
        """The peak of resident memory since the model file was prepared, in bytes.

        From the kernel's high-water mark: `ru_maxrss` also counts the parent that forked us.
        """
        return {"peak_bytes": _peak_bytes()}


def _peak_bytes() -> int:
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - as old as 3.8
            for line in status:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when the one that started it dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def private_stdout() -> IO[str]:
    """The stream for answers; whatever else prints to stdout, native code too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def load_driver(path: str) -> Any:  # noqa: ANN401 - see Worker
    """An instance of the `Driver` in a file."""
    specification = importlib.util.spec_from_file_location("driver", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.Driver()


OPERATIONS = ("load", "decode", "prefill", "greedy", "score", "memory")


def answer(worker: Worker, line: str) -> dict[str, Any]:
    """Carry out one request; an exception becomes an answer."""
    try:
        request = json.loads(line)
        operation = request.pop("op")
        if operation not in OPERATIONS:
            raise ValueError("unknown operation " + operation)
        return {"ok": True, **getattr(worker, operation)(**request)}
    except Exception as error:
        traceback.print_exc()
        return {"ok": False, "error": str(error) or type(error).__name__}


def main() -> None:
    """dict[str, Any] until stdin ends."""
    driver, parent = sys.argv[1:]
    die_with_parent(int(parent))
    answers = private_stdout()
    worker = Worker(load_driver(driver))
    for line in sys.stdin:
        json.dump(answer(worker, line), answers)
        answers.write("\n")
        answers.flush()
    os._exit(0)  # some engines hang or crash in their destructors


if __name__ == "__main__":
    main()
