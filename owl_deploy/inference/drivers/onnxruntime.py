"""ONNX Runtime: by onnxruntime-genai where the folder has its config, else by a plain session."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

GENAI_CONFIG = "genai_config.json"
LOOKUP = "lookup"  # a draft that is no deployment: the text itself
PART = (
    512  # tokens a part when all logits are wanted: bounds [part, vocab] and the attention's memory
)

PROMPT_PART = 128  # tokens of a prompt run at once: a tenth of a second of a small model
MOST_VERIFIED = 16  # rows of a step, each with its logits: what speculate.py proposes, and one
# Set where whoever runs a prompt reads the logits of its last tokens alone (csrc/ops.h).
LAST_LOGITS = "ai.owl.last_logits"
_IN_TURNS = "session.force_spinning_stop"  # or the threads of one model spin while the other runs


class Driver:
    """Opens a deployment in ONNX Runtime; see worker.py for what each method does."""

    def __init__(self) -> None:
        self.streams: list[Genai] | list[Session] | list[Drafted] | list[SideBySide] = []

    def prepare(self) -> None:
        """Import the engine, which is no part of the load time."""
        import onnxruntime_genai

        onnxruntime_genai.disable_telemetry_events()

    def load(self, asked: Any) -> dict[str, Any]:  # noqa: ANN401 - worker.py's Asked
        """Open with onnxruntime-genai, or with a plain session where it cannot do what is asked."""
        import onnxruntime
        import onnxruntime_genai

        folder = Path(asked.folder)
        plain = asked.all_logits or asked.places
        genai = (folder / GENAI_CONFIG).is_file() and not plain
        if asked.draft:
            self.streams = [Drafted(asked)]
        elif asked.places:
            self.streams = [SideBySide(asked)]
        elif genai:
            # The token chosen last is counted, though never run: one more than the model takes.
            length = max(asked.context + 1, model_config(folder)["context_length"])
            over = {"eos_token_id": [], "context_length": length}
            # Of several rows onnxruntime-genai runs no prompt in parts, as the config may ask for.
            whole = asked.batch * asked.context if asked.batch > 1 else None
            model = open_genai(asked.folder, asked.threads, asked.library, part=whole, **over)
            pad = pad_of(folder)
            self.streams = [
                Genai(model, asked.context, asked.batch, pad) for _ in range(asked.streams)
            ]
        else:
            session = open_session(folder, asked.threads, asked.library)
            size = decoder_config(folder).get("head_size")
            self.streams = [
                Session(session, asked.batch, size, whole=runs_whole(folder))
                for _ in range(asked.streams)
            ]
        return {
            "version": onnxruntime_genai.__version__ if genai else onnxruntime.__version__,
            "runtime": "onnxruntime " + onnxruntime.__version__,
            "isa": "",
            "through": "onnxruntime-genai" if genai else "onnxruntime",
        }


def open_genai(
    folder: str,
    threads: int,
    library: str = "",
    part: int | None = None,
    takes_turns: bool = False,
    **over: Any,  # noqa: ANN401 - without stubs
) -> Any:  # noqa: ANN401 - as above
    """A model of onnxruntime-genai; `over` goes over what its config says of the model.

    `part`: the tokens of a prompt that are run at once, if not as many as the config says.
    `library`: the operators to load, whatever library the folder names; whoever calls has checked
    that it names none where this is empty. `takes_turns`: with another model. `owl generate` opens
    its model here too.
    """
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(Path(folder).absolute()))
    options: dict[str, Any] = {"intra_op_num_threads": threads}
    if library:
        library = str(Path(library).absolute())  # for it works elsewhere below
        options["custom_ops_library"] = library
    if takes_turns:
        options[_IN_TURNS] = "1"
    overlay = {**over, "decoder": {"session_options": options}}
    search = {"search": {"chunk_size": part}} if part else {}
    config.overlay(json.dumps({"model": overlay, **search}))
    # It takes a library from the model's folder or the working directory, from nowhere else.
    with working_in(Path(library).parent if library else Path.cwd()):
        return onnxruntime_genai.Model(config)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in another directory for a while."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def open_session(
    folder: Path,
    threads: int,
    library: str = "",
    *,
    last_logits: bool = False,
    takes_turns: bool = False,
) -> Any:  # noqa: ANN401 - as above
    """A plain session of the graph, with that library of operators if there is one.

    `last_logits`: of a prompt no others are read; `takes_turns`: with another model. Raises
    `RuntimeError`, as onnxruntime-genai does, where it cannot be opened.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    for name, wanted in ((LAST_LOGITS, last_logits), (_IN_TURNS, takes_turns)):
        if wanted:  # before the library, which reads them
            options.add_session_config_entry(name, "1")
    try:
        if library:
            options.register_custom_ops_library(library)
        return onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # of a type for each status
        raise RuntimeError(str(error)) from error


def append(generator: Any, ids: np.ndarray, pad: int) -> None:  # noqa: ANN401 - without stubs
    """Run the tokens `ids` [rows, length].

    onnxruntime-genai takes the last token that is no `pad` for a prompt's last one, in a sequence
    by itself too, where none fills anything: such a last token goes alone.
    """
    if len(ids) == 1 and ids.shape[1] > 1 and ids[0, -1] == pad:
        generator.append_tokens(ids[:, :-1])
        ids = ids[:, -1:]
    generator.append_tokens(ids)


def runs_whole(folder: Path) -> bool:
    """Whether a prompt must be run in one go: LongRoPE's graph takes its rotary tables by how many
    tokens there are by the end of a run, and keys that one has rotated do not fit the other.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    for name in ("rope_parameters", "rope_scaling"):
        # By its factors: it has had several names.
        ropes = config.get(name) if isinstance(config, dict) else None
        if isinstance(ropes, dict) and "short_factor" in ropes:
            return True
    return False


def run_prompt(
    generator: Any,  # noqa: ANN401 - as above
    ids: np.ndarray,
    pad: int,
    *,
    whole: bool = False,
) -> None:
    """Run the prompt `ids` [1, length] in parts, unless `whole`.

    After each part other threads may run: the library holds Python's lock.
    """
    part = ids.shape[1] if whole else PROMPT_PART
    for start in range(0, ids.shape[1], part):
        append(generator, ids[:, start : start + part], pad)


class Genai:
    """A decoder in onnxruntime-genai, with greedy search; `pad`: see `append`."""

    def __init__(self, model: Any, context: int, batch: int, pad: int) -> None:  # noqa: ANN401
        self.model = model
        self.context = context
        self.batch = batch
        self.pad = pad
        self.reset()

    def reset(self) -> None:
        """Empty the cache."""
        import onnxruntime_genai

        length = self.context + 1  # see `load`
        parameters = onnxruntime_genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=length, do_sample=False, batch_size=self.batch)
        self.generator: Any = None  # the old cache goes before the new one comes
        self.generator = onnxruntime_genai.Generator(self.model, parameters)

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt; return the likeliest next token."""
        append(self.generator, np.array([tokens] * self.batch, np.int32), self.pad)
        return self.next()

    def next(self) -> int:
        """Run the last token returned; return the likeliest next one."""
        self.generator.generate_next_token()
        return int(self.generator.get_next_tokens()[0])

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens`; return the logits [vocab] of the last."""
        append(self.generator, np.array([tokens], np.int32), self.pad)
        logits: np.ndarray = self.generator.get_logits()[0, -1]
        return logits

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Not to be had: raises `ValueError`."""
        raise ValueError("onnxruntime-genai gives the last logits only: load with all_logits")


class Rows:
    """A decoder in onnxruntime-genai, all of whose logits are read: a `Model` of speculate.py."""

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - without stubs
        length: int,
        pad: int,
        *,
        whole: bool,
    ) -> None:
        import onnxruntime_genai

        self.pad, self.whole = pad, whole
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, do_sample=False)
        self.generator = onnxruntime_genai.Generator(model, parameters)

    def run(self, tokens: Sequence[int]) -> np.ndarray:
        """Run `tokens`; return the logits [n, vocab] of all; of a prompt or more than 16, the last.

        So many come after a prompt where a draft has paused while the text went on.
        """
        ids = np.array([tokens], np.int32)
        if self.generator.token_count() == 0 or len(tokens) > MOST_VERIFIED:
            run_prompt(self.generator, ids, self.pad, whole=self.whole)
            last: np.ndarray = self.generator.get_logits()[0]
            return last
        self.generator.append_tokens(ids)
        rows: np.ndarray = self.generator.get_output("logits")[0]
        return rows

    def rewind(self, count: int) -> None:
        """Keep the first `count` tokens."""
        self.generator.rewind_to(count)


class Drafted:
    """A decoder with a draft beside it, with greedy search: worker.py's `Asked` says of what."""

    def __init__(self, asked: Any) -> None:  # noqa: ANN401 - worker.py's Asked
        self.length = asked.context + 1  # the token chosen last is counted, though never run
        takes = max(self.length, model_config(Path(asked.folder))["context_length"])
        self.count = asked.draft_tokens
        self.model, self.draft = (
            open_genai(folder, asked.threads, library, takes_turns=True, context_length=takes)
            if folder != LOOKUP
            else None
            for folder, library in (
                (asked.folder, asked.library),
                (asked.draft, asked.draft_library),
            )
        )
        self.speculate = _beside("speculate")
        self.pad, self.whole = pad_of(Path(asked.folder)), runs_whole(Path(asked.folder))
        if self.draft is not None:
            self.pad_of_draft = pad_of(Path(asked.draft))
            self.draft_whole = runs_whole(Path(asked.draft))
            self.share = self.speculate.share_of(Path(asked.draft), Path(asked.folder))
        self.restart()
        self.reset()

    def restart(self) -> Any:  # noqa: ANN401 - speculate.py's Tally
        """Count anew what comes of the proposals."""
        self.tally = self.speculate.Tally()
        return self.tally

    def reset(self) -> None:
        """Empty both caches; the tally goes on."""
        speculate, choose = self.speculate, self.speculate.Search()
        draft = speculate.Lookup()
        if self.draft is not None:
            rows = Rows(self.draft, self.length, self.pad_of_draft, whole=self.draft_whole)
            draft = speculate.Proposer(rows, choose, self.share)
        rows = Rows(self.model, self.length, self.pad, whole=self.whole)
        self.speculation = speculate.Speculation(rows, draft, choose, self.count, tally=self.tally)

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt; return the likeliest next token."""
        self.coming = self.speculation.tokens(tokens, self.length)
        return self.next()

    def next(self) -> int:
        """Return the next token; the model runs only where the last step's are all returned."""
        return int(next(self.coming))


class SideBySide:
    """Continues texts by the likeliest tokens, each in a place of its own (slots.py)."""

    def __init__(self, asked: Any) -> None:  # noqa: ANN401 - worker.py's Asked
        folder = Path(asked.folder)
        session = open_session(folder, asked.threads, asked.library, last_logits=True)
        model = model_config(folder)
        size, vocabulary = model["decoder"]["head_size"], model["vocab_size"]
        slots = _beside("slots").Slots
        self.slots = slots(session, asked.places, asked.context, size, vocabulary, PROMPT_PART)
        self.texts: dict[int, tuple[Any, int]] = {}  # each one's place, and last token

    def begin(self, text: int, prompt: Sequence[int]) -> int:
        """Begin a text; return its first token."""
        slot = self.slots.enter(prompt)
        token = int(slot.run(prompt[slot.count :])[-1].argmax())
        self.texts[text] = slot, token
        return token

    def step(self) -> dict[int, int]:
        """Run the last token of each text; return the likeliest next ones."""
        slots, tokens = zip(*self.texts.values())  # noqa: B905 - as old as 3.8
        rows = self.slots.step(slots, tokens)
        for text, slot, row in zip(self.texts, slots, rows):  # noqa: B905 - as above
            self.texts[text] = slot, int(row.argmax())
        return {text: token for text, (_, token) in self.texts.items()}

    def keep(self, texts: Collection[int]) -> None:
        """End all texts but these."""
        for text in [text for text in self.texts if text not in texts]:
            self.slots.leave(self.texts.pop(text)[0])


def _beside(name: str) -> Any:  # noqa: ANN401 - a module
    """A module of the folder above; this file is run without the package, too."""
    path = Path(__file__).parent.parent / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # where its dataclasses look for their annotations
    specification.loader.exec_module(module)
    return module


class Session:
    """A decoder in a plain session: any graph with `past_key_values.*` and `present.*`."""

    def __init__(
        self,
        session: Any,  # noqa: ANN401 - without stubs
        batch: int,
        head_size: int | None,
        *,
        whole: bool = False,
    ) -> None:
        self.session = session
        self.whole = whole
        self.batch = batch
        self.head_size = head_size  # the builder's graph has only a name for it
        self.inputs = {item.name: item for item in session.get_inputs()}
        self.outputs = [item.name for item in session.get_outputs()]
        self._shared = _beside("slots").shared
        self.reset()
        self.known: list[int] = []  # the whole parts that the last text read began with
        self.behind = self.mark()  # the cache behind them

    def reset(self) -> None:
        """Empty the cache."""
        self.count = 0
        self.last: int | None = None
        self.past = {
            name: np.zeros(
                (self.batch, item.shape[1], 0, self.head_size or item.shape[3]),
                "f2" if item.type == "tensor(float16)" else "f4",
            )
            for name, item in self.inputs.items()
            if name.startswith("past_key_values.")
        }

    def mark(self) -> tuple[int, dict[str, np.ndarray]]:
        """The cache as it is, for `back`: a step makes new arrays and leaves these alone."""
        return self.count, dict(self.past)

    def back(self, state: tuple[int, dict[str, np.ndarray]]) -> None:
        """Return to what `mark` gave."""
        self.count, self.past = state[0], dict(state[1])

    def _run(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens` in every row; return the logits [n, vocab] of the first."""
        step, total = len(tokens), self.count + len(tokens)
        attend = np.tril(np.ones((step, total), np.int64), self.count)
        positions = np.arange(self.count, total, dtype=np.int64)
        rows = {
            "input_ids": np.array(tokens, np.int64),
            "attention_mask": np.ones(total, np.int64),
            "positions": positions,
            "position_ids": positions,
            "causal_mask": attend[None],
        }
        feeds = {
            name: np.repeat(value[None], self.batch, axis=0)
            for name, value in rows.items()
            if name in self.inputs
        }
        results = self.session.run(self.outputs, {**feeds, **self.past})
        values = dict(zip(self.outputs, results))  # noqa: B905 - as old as 3.8
        for name in self.past:
            self.past[name] = values[name.replace("past_key_values.", "present.", 1)]
        self.count = total
        logits: np.ndarray = values["logits"][0]
        return logits

    def logits(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Run `tokens`; yield the logits [n, vocab] of all of them, in parts unless `whole`."""
        part = len(tokens) if self.whole else PART
        for start in range(0, len(tokens), part):
            yield self._run(tokens[start : start + part])

    def read(self, tokens: list[int]) -> np.ndarray:
        """Run a text in an empty cache; return the logits [vocab] of its last token.

        Whole parts with which the last text that was read began too are not run again: what is
        behind them is to the last bit what it was.
        """
        part = len(tokens) if self.whole else PART
        end = (len(tokens) - 1) // part * part  # of the whole parts that have something behind them
        same = self._shared(self.known, tokens, part)
        self.back(self.behind)
        self._cut(same)
        for start in range(same, end, part):
            self._run(tokens[start : start + part])
        self.known, self.behind = tokens[:end], self.mark()
        return self.extend(tokens[end:])

    def _cut(self, count: int) -> None:
        """Keep the first `count` tokens in the cache."""
        if count < self.count:
            for name, value in self.past.items():
                self.past[name] = np.ascontiguousarray(value[:, :, :count])
            self.count = count

    def extend(self, tokens: list[int]) -> np.ndarray:
        """Run `tokens`; return the logits [vocab] of the last."""
        last: np.ndarray = self._run(tokens)[-1]
        return last

    def prompt(self, tokens: list[int]) -> int:
        """Run a prompt; return the likeliest next token."""
        self.last = int(self.extend(tokens).argmax())
        return self.last

    def next(self) -> int:
        """Run the last token returned; return the likeliest next one."""
        assert self.last is not None
        return self.prompt([self.last])


def decoder_config(folder: Path) -> dict[str, Any]:
    """The decoder's part of the folder's genai config; empty when there is none."""
    decoder: dict[str, Any] = model_config(folder).get("decoder", {})
    return decoder


def pad_of(folder: Path) -> int:
    """The token that onnxruntime-genai takes for padding: see `append`."""
    return model_config(folder).get("pad_token_id") or 0


def model_config(folder: Path) -> dict[str, Any]:
    """What the folder's genai config says of the model; empty when there is none."""
    path = folder / GENAI_CONFIG
    if not path.is_file():
        return {}
    model: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["model"]
    return model
