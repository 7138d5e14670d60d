"""Perplexity by the paper's protocol: windows without overlap, each with an empty context."""

import math
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from owl_deploy.adapter import with_adapter
from owl_deploy.artefact import is_artefact
from owl_deploy.blocks import Skeleton, window_nll
from owl_deploy.checkpoint import Checkpoint, open_checkpoint
from owl_deploy.engines import engine_for, get_engine
from owl_deploy.engines.deployment import Deployment, open_deployment
from owl_deploy.engines.loading import Folder
from owl_deploy.engines.process import EngineProcess
from owl_deploy.errors import BadInput
from owl_deploy.hardware import ANY_HARDWARE, Hardware, find_batch, find_device, find_dtype
from owl_deploy.manifest import (
    DeploymentManifest,
    Manifest,
    keep_measurement,
    read_manifest,
)
from owl_deploy.progress import bar, error_console
from owl_deploy.ranks import ALONE, Ranks, free_memory
from owl_deploy.text import (
    evaluation_windows,
    load_evaluation_text,
    load_tokenizer,
    token_digest,
    tokenize,
)


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a predicted token.

    `windows` of `window` tokens were read; `tokens` of them were predicted: all but each window's
    first, which has nothing to be predicted from. `token_ids_sha256`: of those that were read, for
    only values of the same can be compared.
    """

    text: str
    value: float
    windows: int
    window: int
    tokens: int
    token_ids_sha256: str


def check_window(window: int) -> None:
    """Raise `BadInput` for fewer tokens than predict one."""
    if window < 2:
        raise BadInput(f"--window {window} is too small.", "It must be 2 or more.")


def windows_of(folder: Path, text: str, window: int, limit: int | None) -> torch.Tensor:
    """The evaluation windows of a text in the tokens of the model in `folder`.

    As in the paper's code the special tokens of the tokenizer stand around the text as a whole: of
    a model with a BOS only the first window begins with it.
    """
    check_window(window)
    if limit is not None and limit < 1:
        raise BadInput(f"--windows {limit} is too small.", "It must be 1 or more.")
    content, most = load_evaluation_text(text)
    tokens = tokenize(load_tokenizer(folder), content, special=True)
    return evaluation_windows(tokens, window, most if limit is None else min(limit, most or limit))


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
    return Perplexity(text, value, count, window, tokens, token_digest(windows))


def perplexity(
    folder: Path,
    text: str,
    *,
    window: int = 2048,
    limit: int | None = None,
    hardware: Hardware = ANY_HARDWARE,
    blockwise: bool | None = None,
    engine: str | None = None,
    threads: int | None = None,
    trust_library: bool = False,
    adapter: Path | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """The perplexity of a checkpoint, or of a deployment, on `text` (a SOURCE).

    A deployment is evaluated as it runs, in its engine; `hardware` and `blockwise` are for
    checkpoints, `engine` and `threads` for deployments. The value is then kept in a folder that owl
    wrote, beside its manifest, so that a benchmark can show it beside the speed. The windows of a
    checkpoint are divided over the `ranks`.
    """
    if is_deployment(folder):
        refuse_adapter(adapter)
        return deployment_perplexity(
            folder,
            text,
            window=window,
            limit=limit,
            engine=engine,
            threads=threads,
            trust_library=trust_library,
        )
    return checkpoint_perplexity(
        folder,
        text,
        window=window,
        limit=limit,
        hardware=hardware,
        blockwise=blockwise,
        adapter=adapter,
        ranks=ranks,
    )


def checkpoint_perplexity(
    folder: Path,
    text: str,
    *,
    window: int = 2048,
    limit: int | None = None,
    hardware: Hardware = ANY_HARDWARE,
    blockwise: bool | None = None,
    adapter: Path | None = None,
    ranks: Ranks = ALONE,
) -> Perplexity:
    """The perplexity of a checkpoint on `text` (a SOURCE), on CPU or CUDA.

    With `blockwise` one block is on the device at a time; None: where the model does not fit into
    what is free. With the LoRA adapter in the folder `adapter`, if there is one, it is whole. The
    losses are added up in float32, whatever the dtype. Each of the `ranks` takes its part of the
    windows. Raises `BadInput` for a model that is not supported, or a text without one full window
    for each rank.
    """
    checkpoint = open_checkpoint(folder)
    checkpoint.check_length(window, "--window")
    windows = windows_of(checkpoint.folder, text, window, limit)
    if len(windows) < ranks.size:
        raise BadInput(
            f"There are {ranks.size} processes, and {len(windows)} windows of text.",
            "Give a longer text or a shorter --window, or start fewer processes.",
        )
    own = ranks.part(windows)
    device = find_device(hardware.device)
    dtype = find_dtype(hardware.dtype, checkpoint, device, exact=True)
    if blockwise is None:
        blockwise = adapter is None and not fits(checkpoint, dtype, device)
    if blockwise:
        if adapter is not None:
            raise BadInput("--adapter and --blockwise exclude each other.", "Leave one out.")
        skeleton = Skeleton(checkpoint, dtype, device)
        nll = _blockwise_nll(skeleton, own, find_batch(hardware.batch_size, own, skeleton))
    else:
        nll = _whole_nll(load_model(checkpoint, dtype, device, adapter), own.to(device))
    result = from_nll(text, sum(ranks.gathered(nll)), windows)
    if adapter is None and ranks.leads:
        computed = {**asdict(result), "dtype": str(dtype).removeprefix("torch.")}
        record(folder, "perplexity", computed)
    return result


def deployment_perplexity(
    folder: Path,
    text: str,
    *,
    window: int = 2048,
    limit: int | None = None,
    engine: str | None = None,
    threads: int | None = None,
    trust_library: bool = False,
) -> Perplexity:
    """The perplexity of a deployment on `text`, as its engine computes it; kept beside it.

    A deployment for DeepSparse is evaluated in ONNX Runtime, which runs the same graph, unless
    `engine` asks for DeepSparse. Raises `BadInput` for an engine that does not open it.
    """
    opened = open_deployment(folder, trust_library=trust_library)
    engine = engine_of(opened, engine)
    if opened.max_context and window > opened.max_context:
        raise BadInput(
            f"{folder} takes {opened.max_context} tokens, not {window}.", "Give a smaller --window."
        )
    windows = windows_of(folder, text, window, limit)
    nll = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "window.npy"
        with (
            EngineProcess(
                engine,
                folder,
                threads=threads,
                trust_library=trust_library,
                context=get_engine(engine).context_for(window),
                all_logits=True,
            ) as process,
            bar("Perplexity", len(windows)) as advance,
        ):
            for ids in windows:
                np.save(file, ids.numpy())
                nll += sum(process.request("score", tokens_file=str(file), window=window)["nll"])
                advance(1)
    result = from_nll(text, nll, windows)
    record(folder, "perplexity", {**asdict(result), "engine": engine})
    return result


def is_deployment(folder: Path) -> bool:
    """Whether it is one: owl says so, or there is what an engine opens and no checkpoint's weights.

    A stranger's deployment has no manifest.
    """
    if read_manifest(folder, Manifest) is not None:
        return read_manifest(folder, DeploymentManifest) is not None
    return Folder(folder).has_model and not any(folder.glob("*.safetensors"))


def engine_of(deployment: Deployment, asked: str | None) -> str:
    """The engine to evaluate a deployment in: the one `asked` for, or the fastest that opens it."""
    if asked is None:
        own = engine_for(deployment.target)
        return own.evaluated_in or own.name
    if deployment.target not in get_engine(asked).targets:
        raise BadInput(
            f"The engine {asked!r} does not open {deployment.path}, which was exported for "
            f"{deployment.target}.",
            f"Leave --engine away, or export again with --target {asked}.",
        )
    return asked


def record(folder: Path, key: str, value: dict[str, Any], *, add: bool = False) -> None:
    """Keep a result beside what was measured (`add`: to it), if `folder` is an artefact of ours.

    A folder that cannot be written costs a remark, not the result.
    """
    if not is_artefact(folder):
        return
    try:
        keep_measurement(folder, key, value, add=add)
    except OSError as error:
        error_console().print(f"{folder} does not keep the result ({error}).", highlight=False)


def refuse_adapter(adapter: Path | None) -> None:
    """Raise `BadInput` if there is one, for a deployment."""
    if adapter is not None:
        raise BadInput("--adapter goes with a checkpoint; a deployment is as it was exported.")


def fits(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether four fifths of the free memory of `device` hold the weights in `dtype`."""
    on_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if on_gpu else free_memory()
    return checkpoint.weights() * dtype.itemsize < 0.8 * free


def load_model(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, adapter: Path | None
) -> Any:  # noqa: ANN401 - transformers is untyped
    """The whole model, with a LoRA adapter if there is one, for inference.

    Raises `BadInput` for weights that are incomplete or not finite, and for an adapter that is
    not for them.
    """
    model = checkpoint.load(dtype)
    if adapter is not None:
        model = with_adapter(model, checkpoint, adapter).get_base_model()
    return model.to(device).eval()


def _whole_nll(model: Any, windows: torch.Tensor) -> float:  # noqa: ANN401 - transformers is untyped
    nll = 0.0
    with bar("Perplexity", len(windows)) as advance, torch.inference_mode():
        for ids in windows:
            nll += window_nll(model, ids)
            advance(1)
    return nll


def _blockwise_nll(skeleton: Skeleton, windows: torch.Tensor, batch: int) -> float:
    with (
        tempfile.TemporaryDirectory() as scratch,
        bar("Perplexity, a block at a time", len(windows) * len(skeleton.blocks)) as advance,
    ):
        states = skeleton.run(windows, batch, Path(scratch), advance)
        (loss,) = skeleton.losses(windows, [states])
    return loss * len(windows) * (windows.shape[1] - 1)
