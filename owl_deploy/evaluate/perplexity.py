"""Perplexity by the paper's protocol: windows without overlap, each with an empty context."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from owl_deploy.data.text import (
    evaluation_windows,
    load_evaluation_text,
    load_tokenizer,
    token_digest,
    tokenize,
)
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.divergence import Watched
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.subject import (
    deciding,
    engine_of,
    is_deployment,
    keep,
    load_model,
    no_model_has,
    refuse_adapter,
)
from owl_deploy.inference import get_engine
from owl_deploy.inference.deployment import open_deployment
from owl_deploy.inference.process import EngineProcess
from owl_deploy.models.batch import find_batch
from owl_deploy.models.blocks import Skeleton, free_on, window_loss
from owl_deploy.models.checkpoint import Checkpoint, open_checkpoint, stored_dtype
from owl_deploy.models.digests import state_of
from owl_deploy.utils.hardware import find_device, find_dtype, name_of
from owl_deploy.utils.progress import bar
from owl_deploy.utils.ranks import ALONE, Ranks

_Loss = Callable[[Any, torch.Tensor], float]  # of a model on a window [length], in nats a token


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a predicted token.

    `windows` of `window` tokens were read; `tokens` of them were predicted: all but each window's
    first, which has nothing to be predicted from. `token_ids_sha256`: of those that were read, for
    only values of the same can be compared. `losses`: of each window by itself, in nats a token.
    """

    text: str
    value: float
    windows: int
    window: int
    tokens: int
    token_ids_sha256: str
    losses: tuple[float, ...]


def windows_of(folder: Path, text: str, window: int, limit: int | None) -> torch.Tensor:
    """The evaluation windows of a text in the tokens of the model in `folder`.

    As in the paper's code the special tokens of the tokenizer stand around the text as a whole: of
    a model with a BOS only the first window begins with it.
    """
    tokenizer = load_tokenizer(folder)
    content, most = load_evaluation_text(text, tokenizer)
    has_bos = bool(tokenizer.bos_token) and content.startswith(tokenizer.bos_token)  # a template's
    tokens = tokenize(tokenizer, content, special=not has_bos)
    return evaluation_windows(tokens, window, most if limit is None else min(limit, most or limit))


def from_losses(text: str, losses: Sequence[float], windows: torch.Tensor) -> Perplexity:
    """The perplexity for the mean losses, in nats a token, of each of `windows` [windows, window].

    Raises `BadInput` when it is no finite number: then the weights or the engine are broken.
    """
    count, window = windows.shape
    mean = sum(losses) / count
    try:
        value = math.exp(mean)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise no_model_has(f"The model's loss on {text} is {mean:.4g} nats a token")
    tokens = count * (window - 1)
    return Perplexity(text, value, count, window, tokens, token_digest(windows), tuple(losses))


def perplexity(
    folder: Path,
    asked: EvaluationSettings,
    ranks: Ranks = ALONE,
    watched: Watched | None = None,
) -> Perplexity:
    """The perplexity of a checkpoint, or of a deployment as it runs in its engine.

    It is kept in a folder that owl wrote, beside its manifest, so that a benchmark can show it
    beside the speed. The windows of a checkpoint are divided over the `ranks`. What is predicted is
    `watched`, if something is to.
    """
    if is_deployment(folder):
        return deployment_perplexity(folder, asked, watched)
    return checkpoint_perplexity(folder, asked, ranks, watched)


def checkpoint_perplexity(
    folder: Path,
    asked: EvaluationSettings,
    ranks: Ranks = ALONE,
    watched: Watched | None = None,
) -> Perplexity:
    """The perplexity of a checkpoint on the text that is `asked` for, on CPU or CUDA.

    With `blockwise` one block is on the device at a time; None: where the model does not fit into
    what is free. With a LoRA adapter it is whole. The losses are added up in float32, whatever the
    dtype. Each of the `ranks` takes its part of the windows. Raises `BadInput` for a model that is
    not supported, a text without one full window for each rank, and ranks that read different
    things.
    """
    assert asked.text is not None
    text = str(asked.text)
    adapter, hardware, blockwise = asked.adapter, asked.hardware, asked.blockwise
    checkpoint = open_checkpoint(folder)
    measured = state_of(checkpoint.folder)
    checkpoint.check_length(asked.window, "--window")
    windows = windows_of(checkpoint.folder, text, asked.window, asked.windows)
    checkpoint.check_ids(windows)
    if len(windows) < ranks.size:
        raise BadInput(
            f"There are {ranks.size} processes, and {len(windows)} windows of text.",
            "Give a longer text or a shorter --window, or start fewer processes.",
        )
    own = ranks.part(windows)
    if watched is not None:
        watched.reads(folder, windows, own)
    loss = window_loss if watched is None else watched.loss
    device = find_device(hardware.device)
    dtype = find_dtype(hardware.dtype, stored_dtype(checkpoint.config), device, exact=True)
    if ranks.size > 1:
        alike = {"--window": asked.window, **deciding(checkpoint, adapter, dtype, device)}
        ranks.check_alike(alike | {"text": token_digest(windows)})
    if blockwise is None:
        blockwise = adapter is None and not fits(checkpoint, dtype, device)
    if blockwise:
        if adapter is not None:
            raise BadInput("--adapter and --blockwise exclude each other.", "Leave one out.")
        skeleton = Skeleton(checkpoint, dtype, device)
        losses = _by_blocks(skeleton, own, find_batch(hardware.batch_size, own, skeleton), loss)
    else:
        losses = _whole(load_model(checkpoint, dtype, device, adapter), own.to(device), loss)
    everyones = [loss for part in ranks.gathered(losses) for loss in part]
    result = from_losses(text, everyones, windows)
    if adapter is None and ranks.leads:
        computed = {**asdict(result), "dtype": name_of(dtype)}
        keep(folder, "perplexity", computed, measured=measured)
    return result


def deployment_perplexity(
    folder: Path, asked: EvaluationSettings, watched: Watched | None = None
) -> Perplexity:
    """The perplexity of a deployment on the text that is `asked` for, as its engine computes it.

    A deployment for DeepSparse is evaluated in ONNX Runtime, which runs the same graph, unless
    DeepSparse is asked for. Raises `BadInput` for an engine that does not open it.
    """
    assert asked.text is not None
    text = str(asked.text)
    refuse_adapter(asked.adapter)
    measured = state_of(folder)
    opened = open_deployment(folder, trust_library=asked.trust_library)
    engine, window = engine_of(opened, asked.engine), asked.window
    opened.check_length(window, "--window")
    windows = windows_of(folder, text, window, asked.windows)
    opened.check_tokens([int(windows.max())])
    if watched is not None:
        watched.reads(folder, windows, windows)
    losses: list[float] = []
    with (
        EngineProcess(
            engine,
            folder,
            threads=asked.threads,
            trust_library=asked.trust_library,
            context=get_engine(engine).context_for(window),
            all_logits=True,
        ) as process,
        bar("Perplexity", len(windows)) as advance,
    ):
        for ids in windows.tolist():
            also = {} if watched is None else watched.asked()
            answer = process.request("score", tokens=ids, **also)
            if watched is not None:
                watched.take(answer)
            losses.append(answer["loss"])
            advance(1)
    result = from_losses(text, losses, windows)
    keep(folder, "perplexity", {**asdict(result), "engine": engine}, measured=measured)
    return result


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether four fifths of the free memory of `device` hold the weights in `dtype`."""
    return checkpoint.weights() * dtype.itemsize < 0.8 * free_on(device)


def _whole(model: Any, windows: torch.Tensor, loss: _Loss) -> list[float]:  # noqa: ANN401 - transformers is untyped
    losses = []
    with bar("Perplexity", len(windows)) as advance, torch.inference_mode():
        for ids in windows:
            losses.append(loss(model, ids))
            advance(1)
    return losses


def _by_blocks(skeleton: Skeleton, windows: torch.Tensor, batch: int, loss: _Loss) -> list[float]:
    with (
        tempfile.TemporaryDirectory() as scratch,
        bar("Perplexity, a block at a time", len(windows) * len(skeleton.blocks)) as advance,
    ):
        states = skeleton.run(windows, batch, Path(scratch), advance)
        return skeleton.losses(windows, states, loss)
