"""The process an engine runs in: JSON requests on stdin, JSON answers on stdout, one a line.

Started as `python -I worker.py DRIVER.py PARENT_PID` with the Python of the engine's environment,
which may be as old as 3.8: no import of owl_deploy here. (Started as `worker.py PROGRAM PARENT_PID
ARGUMENT...` it becomes that program, an engine's server, which then ends with its parent as well.)
A driver has one class, `Driver`, with

    prepare()                       import the engine
    load(asked: Asked) -> dict      open the model; its version, isa, ...
    streams -> [decoder, ...]       decoders that share the model, each with a cache of its own

and, if its time is not real, `clock() -> seconds`. A decoder has

    reset()                         an empty cache
    prompt(tokens) -> int           run a prompt (in each row of the batch), return the next token
    next() -> int                   one decode step after prompt() or next()
    extend(tokens) -> [vocab]       run tokens, logits of the last one
    logits(tokens) -> [n, vocab]... run tokens, logits of all of them, in parts

and, if its cache can be gone back to, `mark() -> state` and `back(state)`; if it keeps how the last
text began, `read(tokens) -> [vocab]`, the logits after a text in an empty cache; with a draft,
`restart() -> tally`, which counts from then on. Where texts were asked for that go side by side,
each known by a number, it has

    begin(text, prompt) -> int      read a prompt, return the next token
    step() -> {text: int}           one decode step of all texts
    keep(texts)                     end the others

What is timed, and how, is written here, once: every engine is measured by the same loops.
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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np


@dataclass(frozen=True)
class Asked:
    """What to open, and how.

    `threads` to use; `context`, the tokens that a cache must hold; `library` of operators, if the
    graph needs one; `all_logits`, whether `logits` will be asked for; `batch` rows in each of
    `streams` decoders; `places` for texts that go side by side; `draft`, the folder of a deployment
    that proposes `draft_tokens` tokens at a time, 0 for as many as pay (with `draft_library`), or
    "lookup".
    """

    folder: str
    threads: int
    context: int
    library: str = ""
    all_logits: bool = False
    batch: int = 1
    streams: int = 1
    places: int = 0
    draft: str = ""
    draft_tokens: int = 0
    draft_library: str = ""


class Worker:
    """Answers requests with one engine, by way of its driver."""

    def __init__(self, driver: Any) -> None:  # noqa: ANN401 - a class from a file known at run time
        self.driver = driver
        self.clock: Callable[[], float] = getattr(driver, "clock", time.perf_counter)

    def load(self, **options: Any) -> dict[str, Any]:  # noqa: ANN401 - the fields of Asked
        """Open the model; `seconds` includes what the engine compiles, not its import."""
        asked = Asked(**options)
        self.driver.prepare()
        start = self.clock()
        about = self.driver.load(asked)
        return {"seconds": self.clock() - start, "threads": asked.threads, **about}

    @property
    def decoder(self) -> Any:  # noqa: ANN401 - see __init__
        """The first stream's decoder."""
        return self.driver.streams[0]

    def decode(self, prompt: list[int], steps: int, warmup: int) -> dict[str, Any]:
        """Time `steps` single tokens after `prompt` and `warmup` tokens: latencies in ms."""
        self.decoder.reset()
        self.decoder.prompt(prompt)
        for _ in range(warmup):
            self.decoder.next()
        return {"latencies_ms": [self._timed(self.decoder.next) for _ in range(steps)]}

    def prefill(self, prompt: list[int], repeats: int, warmup: int) -> dict[str, Any]:
        """Time `prompt` in an empty cache, up to and with the first new token: latencies in ms."""
        times = []
        for _ in range(warmup + repeats):
            self.decoder.reset()
            times.append(self._timed(lambda: self.decoder.prompt(prompt)))
        return {"latencies_ms": times[warmup:]}

    def generate(self, prompt: list[int], count: int, repeats: int, warmup: int) -> dict[str, Any]:
        """Time a whole answer of `count` tokens to `prompt`, in ms.

        `first_ms` and `total_ms` have one figure a repeat; `token_ms` one for each later token.
        """
        first, token, total = [], [], []
        for repeat in range(warmup + repeats):
            self.decoder.reset()
            times = [self._timed(lambda: self.decoder.prompt(prompt))]
            times += [self._timed(self.decoder.next) for _ in range(count - 1)]
            if repeat >= warmup:
                first.append(times[0])
                token += times[1:]
                total.append(sum(times))
        return {"first_ms": first, "token_ms": token, "total_ms": total}

    def answers(
        self, prompts: list[list[int]], count: int, ends: list[int], warm: bool = True
    ) -> dict[str, Any]:
        """Time answers of up to `count` tokens to `prompts`, each until one of `ends`, in ms.

        `first_ms` has one figure a prompt; `token_ms` a single one, for each later token of all:
        with a draft some come at once. `tokens` are the answers; `draft` what came of a draft's
        proposals, if there is one. `warm`: run the first prompt once more before.
        """
        first: list[float] = []
        answers: list[list[int]] = []
        later = 0.0
        if warm:
            self.decoder.reset()
            self.decoder.prompt(prompts[0])
        tally = self.decoder.restart() if hasattr(self.decoder, "restart") else None
        for prompt in prompts:
            self.decoder.reset()
            made: list[int] = []
            first.append(self._timed(lambda: made.append(self.decoder.prompt(prompt))))  # noqa: B023
            later += self._timed(lambda: self._finish(made, count, ends))  # noqa: B023
            answers.append(made)
        tokens = sum(map(len, answers)) - len(answers)
        return {
            "first_ms": first,
            "token_ms": [later / tokens] if tokens else [],
            "tokens": answers,
            "draft": tally.to_json() if tally is not None else {},
        }

    def _finish(self, made: list[int], count: int, ends: list[int]) -> None:
        """Put tokens behind those that are made, until there are `count` or one ends the text."""
        while len(made) < count and made[-1] not in ends:
            made.append(self.decoder.next())

    def throughput(
        self, prompt: list[int], steps: int, repeats: int, warmup: int
    ) -> dict[str, Any]:
        """Time `steps` tokens in all streams at once, after `prompt` in each.

        One latency a repeat: the wall time in ms over the tokens of all streams together.
        """
        decoders = self.driver.streams
        for decoder in decoders:
            decoder.reset()
            decoder.prompt(prompt)
        latencies = []
        for _ in range(warmup + repeats):
            wall = self._timed(lambda: in_threads(decoders, steps))
            latencies.append(wall / (steps * len(decoders)))
        return {"latencies_ms": latencies[warmup:]}

    def _timed(self, action: Callable[[], Any]) -> float:
        start = self.clock()
        action()
        return (self.clock() - start) * 1e3

    def greedy(
        self,
        tokens: list[int],
        count: int,
        logits_file: str = "",
        prompt_logits_file: str = "",
        fresh: bool = True,
    ) -> dict[str, Any]:
        """Continue `tokens` by the `count` likeliest, one at a time with the cache.

        Writes float32 .npy files if asked: the logits each new token was chosen by [count, vocab],
        and those of every prompt token [len(tokens), vocab] (needs `all_logits` at load). Without
        `fresh` the cache is kept, and `tokens` follow what was run (the last choice never was).
        """
        if prompt_logits_file:
            if fresh:
                self.decoder.reset()
            parts = [np.array(part, np.float32) for part in self.decoder.logits(tokens)]
            np.save(prompt_logits_file, np.concatenate(parts))
            last = parts[-1][-1]
        else:
            last = self._read(tokens) if fresh else self.decoder.extend(tokens)
        chosen: list[int] = []
        rows = []
        while True:
            rows.append(np.array(last, np.float32))
            chosen.append(int(rows[-1].argmax()))
            if len(chosen) == count:
                break
            last = self.decoder.extend(chosen[-1:])
        if logits_file:
            np.save(logits_file, np.stack(rows))
        return {"tokens": chosen}

    def together(
        self,
        count: int,
        keep: Sequence[int] = (),
        begin: Sequence[tuple[int, list[int]]] = (),
    ) -> dict[str, Any]:
        """Continue texts, known by numbers, by the `count` likeliest tokens each, side by side.

        `keep`: those of the last request that go on; the others are done. `begin`: the number and
        the prompt of each new one, which has a token more. `tokens` has both for each: the number,
        and what is new. Needs `places` at load.
        """
        self.decoder.keep(keep)
        made: dict[int, list[int]] = {text: [] for text in keep}
        made.update((text, [self.decoder.begin(text, prompt)]) for text, prompt in begin)
        for _ in range(count):
            for text, token in self.decoder.step().items():
                made[text].append(token)
        return {"tokens": [*made.items()]}

    def score(self, tokens: list[int], predictions: str = "", keep: bool = False) -> dict[str, Any]:
        """The mean negative log-likelihood of a window of two tokens or more, for perplexity.

        It is read alone: an empty cache, no token put before it, so its first token is not
        predicted. Needs `all_logits` at load. `loss`: in nats a predicted token. `predictions`: a
        file, in which what is predicted is kept, or beside which it is put: see `Predictions`.
        """
        self.decoder.reset()
        parts = self.decoder.logits(tokens)
        if not predictions:
            return {"loss": mean_loss(parts, tokens)}
        with Predictions(predictions, len(tokens) - 1, keep) as seen:
            return {"loss": mean_loss(seen.each(parts), tokens), **seen.result()}

    def continuations(self, context: list[int], targets: list[list[int]]) -> dict[str, Any]:
        """How likely each of `targets` is after `context`; none of them is empty.

        `logprobs` has for each target its tokens' log-probabilities in nats, each given all before
        it; `greedy` says for each whether all its tokens are the likeliest. The context is run once
        if the decoder can go back to it. Needs `all_logits` at load.
        """
        first = np.array(self._read(context)[None])
        state = self.decoder.mark() if hasattr(self.decoder, "mark") else None
        logprobs: list[list[float]] = []
        greedy: list[bool] = []
        for target in targets:
            values, likeliest = likelihoods([first], target[:1])
            if len(target) > 1:
                if state is not None:
                    self.decoder.back(state)
                elif logprobs:  # something has run since the context
                    self._read(context)
                more, also = likelihoods(self.decoder.logits(target[:-1]), target[1:])
                values, likeliest = values + more, likeliest and also
            logprobs.append(values)
            greedy.append(likeliest)
        return {"logprobs": logprobs, "greedy": greedy}

    def _read(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens` in an empty cache; the logits [vocab] after them."""
        last: np.ndarray
        if hasattr(self.decoder, "read"):  # which knows what the last text began with
            last = self.decoder.read(tokens)
        else:
            self.decoder.reset()
            last = self.decoder.extend(tokens)
        return last

    def memory(self) -> dict[str, Any]:
        """The peak of resident memory since the model file was prepared, in bytes.

        From the kernel's high-water mark: `ru_maxrss` also counts the parent that forked us.
        """
        return {"peak_bytes": peak_bytes()}


class Predictions:
    """What a model predicts at each of a window's `places`: kept in a file, or beside what is kept.

    The file holds of each place the likeliest token, which float16 may not tell from the next, and
    the log-probabilities [vocab] in float16, of the model that it was written for with `keep`.
    """

    def __init__(self, path: str, places: int, keep: bool) -> None:
        self._file = open(path, "wb" if keep else "rb")  # noqa: PTH123, SIM115 - as old as 3.8
        self._keep, self._places = keep, places
        self._seen = self._vocabulary = self._same = 0
        self._divergence = 0.0

    def __enter__(self) -> Predictions:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def each(self, parts: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """The logits of all places in order, in `parts` [n, vocab], as they come: they are seen."""
        for part in parts:
            self.see(part)
            yield part

    def see(self, logits: np.ndarray) -> None:
        """The next logits [n, vocab]; a row beyond the last place is left out."""
        logits = logits[: self._places - self._seen]
        self._seen += len(logits)
        self._vocabulary = logits.shape[1]
        place = np.dtype([("top", np.int32), ("logs", np.float16, self._vocabulary)])
        for start in range(0, len(logits), 128):
            rows = log_probabilities(logits[start : start + 128])
            top = rows.argmax(axis=1)
            if self._keep:
                kept = np.empty(len(rows), place)
                kept["top"], kept["logs"] = top, rows
                self._file.write(kept.tobytes())
            elif os.fstat(self._file.fileno()).st_size == self._places * place.itemsize:
                kept = np.frombuffer(self._file.read(len(rows) * place.itemsize), place)
                self._divergence += divergence(kept["logs"].astype(np.float32), rows)
                self._same += int((kept["top"] == top).sum())

    def result(self) -> dict[str, Any]:
        """Means over the places, where those of one model were put beside another's.

        `divergence`: KL, from the distribution that is kept, in nats; `same_top`: the share of
        places whose likeliest token is the same. They mean nothing where the `vocabulary`, the
        tokens that each chooses from, is not that of the model whose predictions are kept.
        """
        return {
            "vocabulary": self._vocabulary,
            "divergence": self._divergence / self._places,
            "same_top": self._same / self._places,
        }


def divergence(kept: np.ndarray, rows: np.ndarray) -> float:
    """KL of log-probabilities `rows` from those `kept` [n, vocab], in nats, over all rows."""
    shares = np.exp(kept)
    total = shares.sum(axis=1)  # not quite one, where they were rounded
    return float(((shares * (kept - rows)).sum(axis=1) / total - np.log(total)).sum())


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Those of logits [n, vocab], in nats and float32; none is so small that float16 has it not."""
    rows = logits.astype(np.float32)
    rows -= rows.max(axis=1, keepdims=True)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return np.maximum(rows, np.float32(np.finfo(np.float16).min))


def mean_loss(parts: Iterable[np.ndarray], tokens: list[int]) -> float:
    """In nats a token of `tokens` but the first, by the logits [n, vocab] before each."""
    logprobs, _ = likelihoods(parts, tokens[1:])
    return -sum(logprobs) / len(logprobs)


def likelihoods(parts: Iterable[np.ndarray], following: list[int]) -> tuple[list[float], bool]:
    """The log-probability in nats of each of `following`, and whether all are the likeliest.

    `parts` hold a row of logits [n, vocab] for each of them; a row beyond the last is left out.
    """
    values: list[float] = []
    likeliest = True
    for logits in parts:
        for start in range(0, len(logits), 128):  # float64 of 128 rows at once, not of all
            wanted = np.array(following[len(values) : len(values) + 128], np.int64)
            rows = logits[start : start + len(wanted)].astype(np.float64)
            wanted = wanted[: len(rows)]
            top = rows.max(axis=1)
            norm = top + np.log(np.exp(rows - top[:, None]).sum(axis=1))
            values += (rows[np.arange(len(wanted)), wanted] - norm).tolist()
            likeliest = likeliest and bool((rows.argmax(axis=1) == wanted).all())
    return values, likeliest


def in_threads(decoders: list[Any], steps: int) -> None:
    """Run `steps` decode steps of each decoder, all at once; an error in one is raised here."""

    def run(decoder: Any) -> None:  # noqa: ANN401 - see Worker
        for _ in range(steps):
            decoder.next()

    with ThreadPoolExecutor(len(decoders)) as pool:
        list(pool.map(run, decoders))


def peak_bytes(process: str = "self") -> int:
    """The kernel's high-water mark of the resident memory of `process`, a number."""
    try:
        with open(f"/proc/{process}/status", encoding="ascii") as status:  # noqa: PTH123 - as old as 3.8
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


OPERATIONS = (
    *("load", "decode", "prefill", "generate", "throughput", "answers"),
    *("greedy", "together", "score", "continuations", "memory"),
)


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
    """Answer requests until stdin ends, or become a server."""
    driver, parent, *arguments = sys.argv[1:]
    die_with_parent(int(parent))
    if arguments:
        os.execv(driver, [driver, *arguments])
    answers = private_stdout()
    worker = Worker(load_driver(driver))
    for line in sys.stdin:
        json.dump(answer(worker, line), answers)
        answers.write("\n")
        answers.flush()
    os._exit(0)  # some engines hang or crash in their destructors


if __name__ == "__main__":
    main()
