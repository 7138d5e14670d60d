"""Whether a deployment computes what the checkpoint computes, before it is called done.

PyTorch's logits over a prompt and 32 greedy tokens (`Source.reference`) against the deployment's:

- in plain ONNX Runtime: all tokens at once without a cache; the prompt and then token by token
  with it; and, for the graph that DeepSparse takes, in chunks behind a left-padded cache, which
  is how DeepSparse's pipeline runs it. The reference's tokens go in, whatever comes out.
- for what is no ONNX graph, so too in the engine that it is for;
- in the target's own engine, which generates freely: its logits are compared for as long as its
  tokens are the reference's, since after that it answers another question.

So `equal_greedy_tokens` is the share of the reference's 32 tokens that the deployment would have
chosen at their places, and `equal_generated_tokens` the share that its engine did generate, which
falls fast after a first difference.
"""

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from owl_deploy import inference
from owl_deploy.errors import EngineFailed, OwlError
from owl_deploy.export.source import Progress, Reference
from owl_deploy.inference.loading import Folder
from owl_deploy.inference.registry import MODEL

_PADDING = 8  # masked places at the left of the cache, filled with what must not matter
_GARBAGE = 3.0


class ParityFailed(OwlError):
    """The exported graph does not compute what the checkpoint does: exit code 1.

    The fault is the exporter's, and the deployment is not written. (When only an engine differs,
    and ONNX Runtime agrees with PyTorch on the same graph, it is `EngineFailed`, exit code 4.)
    """


class Session:
    """`model.onnx` of a deployment in plain ONNX Runtime, with the cache outside of it.

    Takes both kinds of graph: the inputs' names say which it is. Batch 1.
    """

    def __init__(self, deployment: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = inference.default_threads()
        folder = Folder(deployment)
        library = folder.operators()
        if library is not None:
            options.register_custom_ops_library(str(library))
        path = str(deployment / MODEL)
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self._outputs = [value.name for value in self._session.get_outputs()]
        decoder = folder.settings.get("model", {}).get("decoder", {})
        self._head_size = int(decoder.get("head_size", 0))  # the builder's graph has only a name
        self.start()

    @property
    def takes_mask(self) -> bool:
        """Whether places of the cache can be masked: DeepSparse's contract, not the builder's."""
        return "causal_mask" in self._inputs

    def start(self, padding: int = 0) -> None:
        """Begin a text, with `padding` masked places already in the cache."""
        self._padding = padding
        self._done = 0
        self._past = {}
        for name, value in self._inputs.items():
            if name.startswith("past_key_values"):
                _, heads, _, size = value.shape
                size = size if isinstance(size, int) else self._head_size
                kind = np.float16 if value.type == "tensor(float16)" else np.float32
                self._past[name] = np.full((1, heads, padding, size), _GARBAGE, kind)

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Feed `tokens` after what is in the cache; their logits [tokens, vocabulary]."""
        feeds = {**self._past, **self._plain_inputs(tokens)}
        results = dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))
        for name in self._past:
            self._past[name] = results[name.replace("past_key_values", "present")]
        self._done += len(tokens)
        logits: np.ndarray = results["logits"][0].astype(np.float32)
        return logits

    def _plain_inputs(self, tokens: Sequence[int]) -> dict[str, np.ndarray]:
        count = len(tokens)
        before = self._padding + self._done
        attention = np.ones((1, before + count), np.int64)
        attention[:, : self._padding] = 0
        positions = np.arange(self._done, self._done + count, dtype=np.int64)[None]
        causal = np.tril(np.ones((count, before + count), np.int64), before) * attention
        every = {
            "input_ids": np.array([tokens], dtype=np.int64),
            "attention_mask": attention,
            "positions": positions,
            "position_ids": positions,
            "causal_mask": causal[None, None],
        }
        return {name: array for name, array in every.items() if name in self._inputs}


def check(
    deployment: Path,
    reference: Reference,
    *,
    tolerance: float | None,
    engine: str | None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Compare a deployment with PyTorch's `reference`; returns the figures for the manifest.

    `tolerance`: the largest difference allowed, over the largest logit; None only reports. Not a
    number is never allowed. `engine`, if any, is asked too where it is installed, as it must be
    for what is no ONNX graph. Raises `ParityFailed`, `EnvironmentFailed`, or `EngineFailed` when
    ONNX Runtime agrees and the engine does not.
    """
    figures = {}
    is_graph = (deployment / MODEL).is_file()
    if is_graph:
        progress("Comparing with PyTorch in ONNX Runtime")
        try:
            figures = _in_onnxruntime(deployment, reference)
        except Exception as error:  # ONNX Runtime's errors share no class of their own
            raise EngineFailed(f"ONNX Runtime cannot run the exported graph: {error}") from error
        for name, figure in figures.items():
            _judge(figure, tolerance, ParityFailed, f"in ONNX Runtime ({name})")
    if engine is not None and (inference.is_installed(engine) or not is_graph):
        if not is_graph:
            progress(f"Comparing with PyTorch in {engine}")
            figure = figures[f"{engine} reading"] = reading(deployment, reference, engine)
            _judge(figure, tolerance, ParityFailed, f"in {engine}")
        progress(f"Generating {len(reference.greedy)} tokens in {engine}")
        asked = _in_engine(deployment, reference, engine)
        figures[f"{engine} generating"] = asked
        where = f"in {engine}" + (", though ONNX Runtime agrees" if is_graph else "")
        _judge(asked, tolerance, EngineFailed if is_graph else ParityFailed, where)
    return _summary(figures, reference, tolerance, engine)


def _summary(
    figures: dict[str, dict[str, float]],
    reference: Reference,
    tolerance: float | None,
    engine: str | None,
) -> dict[str, Any]:
    """The figures of each run, and the worst of them."""
    return {
        "prompt_tokens": len(reference.prompt),
        "greedy_tokens": len(reference.greedy),
        "largest_logit": float(np.abs(reference.logits).max()),
        "tolerance": tolerance,
        "largest_difference": max(f["largest_difference"] for f in figures.values()),
        "relative_difference": max(f["relative_difference"] for f in figures.values()),
        "equal_greedy_tokens": min(f.get("equal_greedy_tokens", 1.0) for f in figures.values()),
        "equal_generated_tokens": figures.get(f"{engine} generating", {}).get(
            "equal_generated_tokens"
        ),
        "runs": figures,
    }


def _in_onnxruntime(deployment: Path, reference: Reference) -> dict[str, dict[str, float]]:
    session = Session(deployment)
    fed, prompt = reference.fed, reference.prompt
    figures = {"onnxruntime uncached": compare(session.step(fed), reference)}
    session.start()
    rows = [session.step(prompt)]
    rows += [session.step([token]) for token in fed[len(prompt) :]]
    figures["onnxruntime cached"] = compare(np.concatenate(rows), reference)
    if session.takes_mask:
        session.start(padding=_PADDING)
        cuts = [0, len(prompt) // 2, len(prompt), len(fed)]
        pieces = [fed[a:b] for a, b in itertools.pairwise(cuts) if b > a]
        padded = np.concatenate([session.step(piece) for piece in pieces])
        figures["onnxruntime padded"] = compare(padded, reference)
    return figures


def compare(logits: np.ndarray, reference: Reference) -> dict[str, float]:
    """Figures of `logits`, one row for each fed token, against the reference's."""
    first = len(reference.prompt) - 1
    chosen = logits[first:].argmax(axis=-1)
    return {
        **_difference(logits, reference.logits, float(np.abs(reference.logits).max())),
        "equal_greedy_tokens": float(np.mean(chosen == np.array(reference.greedy))),
    }


def _difference(logits: np.ndarray, wanted: np.ndarray, scale: float) -> dict[str, float]:
    """The largest difference, absolute and over `scale`; infinite where a logit is not finite."""
    if logits.shape != wanted.shape or not np.isfinite(logits).all():
        return {"largest_difference": float("inf"), "relative_difference": float("inf")}
    largest = float(np.abs(logits - wanted).max())
    return {"largest_difference": largest, "relative_difference": largest / max(scale, 1e-30)}


def reading(deployment: Path, reference: Reference, engine: str) -> dict[str, float]:
    """Figures of the engine where the reference's tokens go in, whatever comes out."""
    context = inference.get_engine(engine).context_for(len(reference.fed) + 1)
    with tempfile.TemporaryDirectory(prefix="owl-parity-") as scratch:
        file = Path(scratch) / "logits.npy"
        with inference.EngineProcess(
            engine, deployment, context=context, all_logits=True
        ) as process:
            process.request("greedy", tokens=reference.fed, count=1, prompt_logits_file=str(file))
        return compare(np.load(file), reference)


def _in_engine(deployment: Path, reference: Reference, engine: str) -> dict[str, float]:
    """Figures of the engine's free generation."""
    with tempfile.TemporaryDirectory(prefix="owl-parity-") as scratch:
        logits_file = Path(scratch) / "logits.npy"
        needed = len(reference.prompt) + len(reference.greedy)
        context = inference.get_engine(engine).context_for(needed)
        with inference.EngineProcess(engine, deployment, context=context) as process:
            answer = process.request(
                "greedy",
                tokens=reference.prompt,
                count=len(reference.greedy),
                logits_file=str(logits_file),
            )
        return compare_greedy(answer["tokens"], np.load(logits_file), reference)


def compare_greedy(
    tokens: Sequence[int], logits: np.ndarray, reference: Reference
) -> dict[str, float]:
    """Figures of freely generated `tokens` and of the `logits` [tokens, vocabulary] behind them."""
    count = min(len(tokens), len(reference.greedy))
    equal = [tokens[i] == reference.greedy[i] for i in range(count)]
    same_question = equal.index(False) + 1 if False in equal else count
    first = len(reference.prompt) - 1
    wanted = reference.logits[first : first + same_question]
    return {
        **_difference(logits[:same_question], wanted, float(np.abs(reference.logits).max())),
        "equal_generated_tokens": sum(equal) / max(count, 1),
        "compared_steps": same_question,
    }


def _judge(
    figure: Mapping[str, float],
    tolerance: float | None,
    error: type[OwlError],
    where: str,
) -> None:
    relative = figure["relative_difference"]
    allowed = float("inf") if tolerance is None else tolerance
    if not np.isfinite(relative):
        raise error(
            f"The deployment's logits are not finite, or not as many as PyTorch's, {where}.",
            "It was not written. Please report the model's config.json.",
        )
    if relative > allowed:
        raise error(
            f"The deployment differs from PyTorch by {relative:.1e} of the largest logit {where}; "
            f"{allowed:.0e} is allowed.",
            "It was not written. Please report the model's config.json.",
        )
