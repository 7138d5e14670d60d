"""DeepSparse 1.8, as its own text-generation pipeline drives it.

Two compiled engines, for a chunk of the prompt and for one token, share one internal KV cache. The
graph's contract is written in owl_deploy/export: past inputs have a batch of zero, because the
engine holds the cache; the masks are padded on the left up to the compiled length.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

MODEL = "model.onnx"
CHUNK = 64  # its sparse kernels work on tiles of 64 tokens; from 128 on the internal cache aborts


class Driver:
    """Opens a deployment in DeepSparse; see worker.py for what each method does."""

    def __init__(self) -> None:
        os.environ["NM_DISABLE_ANALYTICS"] = "True"  # it sends usage data unless told not to
        self.streams: list[Decoder] = []

    def prepare(self) -> None:
        """Import the engine, which is no part of the load time."""
        import deepsparse  # noqa: F401

    def load(self, asked: Any) -> dict[str, Any]:  # noqa: ANN401 - worker.py's Asked
        """Compile both engines for as many tokens as asked, or a few more."""
        import deepsparse

        # With other lengths (160 was seen) it corrupts its heap, and crashes one time in eight.
        context = -(-asked.context // CHUNK) * CHUNK
        # It aborts on an empty past, so a chunk must leave room for one.
        steps = (CHUNK, 1) if context > CHUNK else (1,)
        engines = {step: compile_step(asked, context, step) for step in steps}
        self.streams = [Decoder(engines, context, asked.batch) for _ in range(asked.streams)]
        one = engines[1]
        return {
            "version": deepsparse.__version__,
            "runtime": "deepsparse " + deepsparse.__version__,
            "isa": one.cpu_avx_type + ("_vnni" if one.cpu_vnni else ""),
            "through": f"internal KV cache for {context} tokens, prompt in chunks of {CHUNK}",
            "supported_ops": one.fraction_of_supported_ops,
        }


class Decoder:
    """Both engines with a cache for each row of the batch."""

    def __init__(self, engines: dict[int, Any], context: int, batch: int) -> None:
        self.engines = engines
        self.context = context
        self.batch = batch
        self.last: int | None = None
        self.reset()

    def reset(self) -> None:
        """Empty the caches."""
        from deepsparse.engine import LIB

        # (previous tokens, frozen tokens)
        self.caches = [LIB.kv_cache(0, 0) for _ in range(self.batch)]
        self.count = 0

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Run `tokens` in chunks, then one by one, as the pipeline does; yield [n, vocab] each."""
        while tokens:
            step = CHUNK if len(tokens) >= CHUNK and CHUNK in self.engines else 1
            yield self._run(tokens[:step])
            tokens = tokens[step:]

    def _run(self, tokens: list[int]) -> np.ndarray:
        engine = self.engines[len(tokens)]
        inputs = {
            name: np.repeat(value, self.batch, axis=0)
            for name, value in step_inputs(tokens, self.count, self.context).items()
        }
        for name, shape in zip(engine.input_names, engine.input_shapes):  # noqa: B905 - as old as 3.8
            if name not in inputs:
                inputs[name] = np.zeros((0, *shape[1:]), np.float32)
        ordered = [inputs[name] for name in engine.input_names]
        caches = self.caches if self.batch > 1 else self.caches[0]
        outputs = engine._eng_net.execute_list_out(ordered, caches)
        self.count += len(tokens)
        logits: np.ndarray = outputs[0][0]
        return logits

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens`; return the logits [vocab] of the last."""
        for part in self.logits(tokens):
            last: np.ndarray = part[-1]
        return last

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt; return the likeliest next token."""
        self.last = int(self.extend(tokens).argmax())
        return self.last

    def next(self) -> int:
        """Run the last token returned; return the likeliest next one."""
        assert self.last is not None
        return self.prompt([self.last])


def step_inputs(tokens: list[int], count: int, context: int) -> dict[str, np.ndarray]:
    """The inputs of one step of `tokens` after `count` others, for a graph of fixed `context`.

    Each row of the causal mask [1, 1, step, context] attends to the tokens so far, which stand at
    the right end; once the cache is full the oldest fall out.
    """
    step = len(tokens)
    filled = min(count + step, context)
    attention = np.zeros((1, context), np.int64)
    attention[:, context - filled :] = 1
    causal = np.tril(np.ones((step, context), np.int64), context - step) * attention
    return {
        "input_ids": np.array([tokens], np.int64),
        "attention_mask": attention,
        "positions": np.arange(count, count + step, dtype=np.int64)[None],
        "causal_mask": causal[None, None],
    }


def compile_step(asked: Any, context: int, step: int) -> Any:  # noqa: ANN401 - see load; no stubs
    """A compiled engine for steps of `step` tokens, from a private copy of the model file.

    The shapes have to be fixed in the file itself. The copy lies in a folder of its own, beside
    links to the external data, and is gone again before anything is run.
    """
    from deepsparse import Engine, Scheduler

    private = Path(tempfile.mkdtemp(prefix="owl-deepsparse-"))
    try:
        folder = Path(asked.folder)
        for path in folder.iterdir():
            if path.name != MODEL:
                (private / path.name).symlink_to(path)
        cached = write_fixed_copy(folder / MODEL, private / MODEL, context, step, asked.batch)
        forget_peak_memory()
        several = {"num_streams": asked.streams, "scheduler": Scheduler.multi_stream}
        return Engine(
            str(private / MODEL),
            batch_size=asked.batch,
            num_cores=asked.threads,
            cached_outputs=cached,
            **(several if asked.streams > 1 else {}),
        )
    finally:
        shutil.rmtree(private, ignore_errors=True)


def write_fixed_copy(source: Path, path: Path, context: int, step: int, batch: int) -> list[bool]:
    """Write the model with fixed shapes to `path`; return for each output whether it is cached."""
    import onnx

    model = onnx.load(str(source), load_external_data=False)
    for item in model.graph.input:
        shape = item.type.tensor_type.shape.dim
        shape[0].dim_value = batch
        if item.name in ("input_ids", "positions"):
            shape[1].dim_value = step
        elif item.name == "attention_mask":
            shape[1].dim_value = context
        elif item.name == "causal_mask":
            shape[2].dim_value, shape[3].dim_value = step, context
        elif item.name.startswith("past_key_values."):
            shape[2].dim_value = context - step
        else:
            raise ValueError("not DeepSparse's decoder contract: unexpected input " + item.name)
    onnx.save(model, str(path))
    return [item.name.startswith("present.") for item in model.graph.output]


def forget_peak_memory() -> None:
    """Start the kernel's high-water mark anew: the copying above is no part of the engine."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
