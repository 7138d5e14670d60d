"""ONNX Runtime: by onnxruntime-genai where the folder has its config, else by a plain session."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

GENAI_CONFIG = "genai_config.json"
PART = (
    512  # tokens a part when all logits are wanted: bounds [part, vocab] and the attention's memory
)


class Driver:
    """Drives a deployment in ONNX Runtime; see worker.py for what each method does."""

    def __init__(self) -> None:
        self.model: _Model

    def prepare(self) -> None:
        """Import the engine, which is no part of the load time."""
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()

    def load(self, folder: str, threads: int, context: int, all_logits: bool) -> dict[str, Any]:
        """Open with onnxruntime-genai, or with a plain session when it cannot or `all_logits`."""
        import onnxruntime
        import onnxruntime_genai

        genai = (Path(folder) / GENAI_CONFIG).is_file() and not all_logits
        self.model = (_Genai if genai else _Session)(folder, threads, context)
        return {
            "version": onnxruntime_genai.__version__ if genai else onnxruntime.__version__,
            "runtime": "onnxruntime " + onnxruntime.__version__,
            "isa": "",
            "through": "onnxruntime-genai" if genai else "onnxruntime",
        }

    def reset(self) -> None:
        """Empty the cache."""
        self.model.reset()

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt; return the likeliest next token."""
        return self.model.prompt(tokens)

    def next(self) -> int:
        """Run the last token returned; return the likeliest next one."""
        return self.model.next()

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens`; return the logits [vocab] of the last."""
        return self.model.extend(tokens)

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Run `tokens`; yield the logits [n, vocab] of all of them, in parts."""
        for start in range(0, len(tokens), PART):
            yield self.model.all_logits(tokens[start : start + PART])


class _Model(Protocol):
    """A loaded model; the methods are those of `Driver`."""

    def reset(self) -> None: ...
    def prompt(self, tokens: list[int]) -> int: ...
    def next(self) -> int: ...
    def extend(self, tokens: list[int]) -> np.ndarray: ...
    def all_logits(self, tokens: list[int]) -> np.ndarray: ...


class _Genai:
    """A model in onnxruntime-genai, with greedy search and no end-of-text token."""

    def __init__(self, folder: str, threads: int, context: int) -> None:
        import onnxruntime_genai

        config = onnxruntime_genai.Config(folder)
        options = {"intra_op_num_threads": threads}
        overlay = {"eos_token_id": [], "decoder": {"session_options": options}}
        config.overlay(json.dumps({"model": overlay}))
        self.library = onnxruntime_genai
        self.model = onnxruntime_genai.Model(config)
        self.context = context
        self.reset()

    def reset(self) -> None:
        parameters = self.library.GeneratorParams(self.model)
        # One more than `context`: the token chosen in the last step is counted, though never run.
        parameters.set_search_options(max_length=self.context + 1, do_sample=False)
        self.generator = self.library.Generator(self.model, parameters)

    def prompt(self, tokens: list[int]) -> int:
        self.generator.append_tokens(np.array(tokens, np.int32))
        return self.next()

    def next(self) -> int:
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def extend(self, tokens: list[int]) -> np.ndarray:
        self.generator.append_tokens(np.array(tokens, np.int32))
        logits: np.ndarray = self.generator.get_logits()[0, -1]
        return logits

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        raise ValueError("onnxruntime-genai gives the last logits only: load with all_logits")


class _Session:
    """A decoder graph in a plain session: any ONNX with `past_key_values.*` and `present.*`."""

    def __init__(self, folder: str, threads: int, context: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        decoder = decoder_config(Path(folder))
        library = decoder.get("session_options", {}).get("custom_ops_library", "")
        if library:
            options.register_custom_ops_library(str(Path(folder) / library))
        self.session = onnxruntime.InferenceSession(
            str(Path(folder) / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]
        self.head_size = decoder.get("head_size")  # the builder's graph has only a name for it
        self.reset()

    def reset(self) -> None:
        self.count = 0
        self.last: int | None = None
        self.past = {
            name: np.zeros((1, item.shape[1], 0, self.head_size or item.shape[3]), np.float32)
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def all_logits(self, tokens: list[int]) -> np.ndarray:
        step, total = len(tokens), self.count + len(tokens)
        attend = np.tril(np.ones((step, total), np.int64), self.count)
        feeds = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "positions": np.arange(self.count, total, dtype=np.int64)[None],
            "position_ids": np.arange(self.count, total, dtype=np.int64)[None],
            "causal_mask": attend[None, None],
        }
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        results = self.session.run(self.outputs, {**feeds, **self.past})
        values = dict(zip(self.outputs, results))  # noqa: B905 - as old as 3.8
        for name in self.past:
            self.past[name] = values[name.replace("past_key_values.", "present.", 1)]
        self.count = total
        logits: np.ndarray = values["logits"][0]
        return logits

    def extend(self, tokens: list[int]) -> np.ndarray:
        last: np.ndarray = self.all_logits(tokens)[-1]
        return last

    def prompt(self, tokens: list[int]) -> int:
        self.last = int(self.extend(tokens).argmax())
        return self.last

    def next(self) -> int:
        assert self.last is not None
        return self.prompt([self.last])


def decoder_config(folder: Path) -> dict[str, Any]:
    """The decoder's part of the folder's genai config; empty when there is none."""
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return {}
    decoder: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]["decoder"]
    return decoder
