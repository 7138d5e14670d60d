"""Perplexity by the paper's protocol: windows without overlap, each with an empty context."""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from owl_deploy.adapter import with_adapter
from owl_deploy.artefact import MANIFEST, read_manifest, write_json
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.engines.deployment import open_deployment
from owl_deploy.engines.process import EngineProcess
from owl_deploy.errors import BadInput
from owl_deploy.families import family_of
from owl_deploy.progress import bar
from owl_deploy.text import evaluation_windows, load_text, load_tokenizer, tokenize

_LOGIT_ROWS = 256  # rows of logits at once: 2048 x 150,000 words in float32 would be 1.2 GB


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a predicted token.

    `windows` of `window` tokens were read; `tokens` of them were predicted: all but each window's
    first, which has nothing to be predicted from.
    """

    text: str
    value: float
    windows: int
    window: int
    tokens: int


def windows_of(folder: Path, text: str, window: int, limit: int | None) -> torch.Tensor:
    """The evaluation windows of a text in the tokens of the model in `folder`."""
    for name, value in (("--window", window - 1), ("--windows", 1 if limit is None else limit)):
        if value < 1:
            raise BadInput(f"{name} is too small.", "A window needs two tokens at least.")
    return evaluation_windows(tokenize(load_tokenizer(folder), load_text(text)), window, limit)


def from_nll(text: str, nll: float, windows: torch.Tensor) -> Perplexity:
    """The perplexity for a summed negative log-likelihood over `windows` [windows, window].

    Raises `BadInput` when it is no finite number: then the weights or the engine are broken.
    """
    count, window = windows.shape
    tokens = count * (window - 1)
    try:
        value = math.exp(nll / tokens)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise BadInput(
            f"The model's loss on {text} is {nll / tokens:.4g} nats a token, which no model has.",
            "Its weights are damaged, or its engine computes wrongly.",
        )
    return Perplexity(text, value, count, window, tokens)


def perplexity(
    folder: Path,
    text: str,
    *,
    window: int = 2048,
    limit: int | None = None,
    adapter: Path | None = None,
) -> Perplexity:
    """The perplexity of a checkpoint, or of a deployment, on `text` (a SOURCE).

    A deployment is evaluated as it runs, in its engine; its folder's manifest then records the
    value, so that a benchmark can show it beside the speed.
    """
    if read_manifest(folder).get("kind") == "deployment":
        if adapter is not None:
            raise BadInput("--adapter goes with a checkpoint; a deployment is as it was exported.")
        return deployment_perplexity(folder, text, window=window, limit=limit)
    return checkpoint_perplexity(folder, text, window=window, limit=limit, adapter=adapter)


def checkpoint_perplexity(
    folder: Path,
    text: str,
    *,
    window: int = 2048,
    limit: int | None = None,
    adapter: Path | None = None,
) -> Perplexity:
    """The perplexity of a checkpoint on `text` (a SOURCE), computed in float32 on CPU or CUDA.

    With the LoRA adapter in the folder `adapter`, if there is one.

    Raises `BadInput` for a model that is not supported, or a text without one full window.
    """
    import transformers

    checkpoint = open_checkpoint(folder)
    family_of(checkpoint.config)
    windows = windows_of(checkpoint.folder, text, window, limit)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in checkpoint.files:
        checkpoint.read(name)  # finite values in every file, or one sentence
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint.folder, dtype=torch.float32, local_files_only=True
    ).to(device)
    if adapter is not None:
        model = with_adapter(model, checkpoint, adapter).get_base_model()
    nll = 0.0
    with bar("Perplexity", len(windows)) as advance, torch.inference_mode():
        for ids in windows:
            nll += _window_nll(model.eval(), ids.to(device))
            advance(1)
    return from_nll(text, nll, windows)


def deployment_perplexity(
    folder: Path, text: str, *, window: int = 2048, limit: int | None = None
) -> Perplexity:
    """The perplexity of a deployment on `text`, as its engine computes it; kept in its manifest.

    A deployment for DeepSparse is evaluated in ONNX Runtime, which runs the same graph.
    """
    deployment = open_deployment(folder)
    engine = "onnxruntime" if deployment.target == "deepsparse" else deployment.target
    windows = windows_of(folder, text, window, limit)
    nll = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "window.npy"
        with (
            EngineProcess(engine, folder, context=window, all_logits=True) as process,
            bar("Perplexity", len(windows)) as advance,
        ):
            for ids in windows:
                np.save(file, ids.numpy())
                nll += sum(process.request("score", tokens_file=str(file), window=window)["nll"])
                advance(1)
    result = from_nll(text, nll, windows)
    record = {**asdict(result), "engine": engine}
    write_json(folder / MANIFEST, read_manifest(folder) | {"perplexity": record})
    return result


def _window_nll(model: Any, ids: torch.Tensor) -> float:  # noqa: ANN401 - transformers is untyped
    """The summed negative log-likelihood of ids[1:] given what stands before each, in nats."""
    hidden = model.base_model(input_ids=ids.unsqueeze(0), use_cache=False)[0][0, :-1]
    head = model.get_output_embeddings()
    total = 0.0
    for rows, targets in zip(
        torch.split(hidden, _LOGIT_ROWS), torch.split(ids[1:], _LOGIT_ROWS), strict=True
    ):
        logits = head(rows).float()
        total += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
    return total
