"""Target `onnxruntime`: onnxruntime-genai's model builder, in a process of its own.

The builder imports its modules by bare names, prints a line a block, and may end the process: in
a child none of that reaches ours. It is kept off the network, and given no options that change
speed but the precision and, for int4, the quantizer, so that the deployment is the one which its
own users get.
"""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from torch import nn

from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed
from owl_deploy.export.source import Progress, Source
from owl_deploy.inference.environment import ending_with_us
from owl_deploy.inference.loading import GENAI_CONFIG
from owl_deploy.inference.registry import MODEL
from owl_deploy.inference.sampling import search_told
from owl_deploy.utils.artefact import read_object, write_json
from owl_deploy.utils.ranks import free_memory

_BUILDER = Path(__file__).with_name("builder.py")
PACKING = "Packing the weights"  # what it says when it begins to
_UNSUPPORTED = "is not currently supported"
# What it says of a model whose family it knows, and what is said of that.
_DETAILS = {
    re.compile(rf"The (\w+) RoPE style {_UNSUPPORTED}"): " with {!r} rotary scaling",
    re.compile(
        rf"A head size of (\w+) {_UNSUPPORTED}"
    ): " with a head size of {}, which is no multiple of 16",
}
# Of its ways to int4 the one that loses least, by far: docs/benchmarks/bits.md. 8 bits for the
# head, and for v and down in some of the blocks.
_INT4 = "k_quant_mixed"
# It packs two zero points to a byte, and fails where a row has one over. The best that does not.
_INT4_ODD = "rtn_last"
_ODD = f"{_INT4_ODD} in the place of {_INT4}, which fails for rows with an odd number of groups"
_INT4_GROUP = 32
_FULL_DISK = ("No space left on device", "Not enough free space")  # by Python, by numpy


class FamilyNotBuilt(Exception):
    """The builder has no architecture for this model, or none with the `detail`, in words."""

    detail: str = ""


def build(
    source: Source,
    folder: Path,
    precision: str,
    progress: Progress,
    sparsify: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Let the builder write `model.onnx`, `genai_config.json` and the tokenizer into `folder`.

    With `sparsify`, arguments of `sparse.sparsify`, that is called before anything is saved.
    PyTorch computes its reference meanwhile, if memory allows. Returns what the manifest says.
    Raises `FamilyNotBuilt`, `BadInput` (disk full), `EngineFailed`, `EnvironmentFailed`.
    """
    if source.tokenizer is None:
        raise BadInput(
            f"{source.folder} has no tokenizer, which onnxruntime-genai needs.",
            "Copy the tokenizer's files there, or export with --target deepsparse.",
        )
    _check_sampling(source.folder / "generation_config.json")
    progress("Building the graph with onnxruntime-genai")
    with tempfile.TemporaryDirectory(dir=folder, prefix="builder-") as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as stream:
            command = _command(source, folder, precision, Path(scratch), sparsify)
            process = _start(command, Path(scratch), stream)
        try:
            if 4 * source.checkpoint.weights() < free_memory():
                _ = source.reference  # else the builder has the memory to itself
            _wait(process, log, source, progress)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.wait()
        words = log.read_text(encoding="utf-8", errors="replace")
    _check_result(process.returncode, words, folder)
    shutil.copyfile(source.folder / "config.json", folder / "config.json")
    config = _with_padding(folder / GENAI_CONFIG)
    return {
        "graph": "onnxruntime-genai model builder",
        "max_context": config["model"]["context_length"],
        "opens_in_genai": True,
        **({"note": _ODD} if precision == "int4" and _is_odd(source) else {}),
        **({"packing": json.loads(last_line(words))} if sparsify else {}),
    }


def _check_sampling(file: Path) -> None:
    """Hear now of a sampling that the deployment, which takes it over, could not be opened with."""
    if file.is_file():
        search_told(read_object(file, "Correct it, and export again."), file)


def _with_padding(file: Path) -> dict[str, Any]:
    """The settings, whose padding is a token of the model: batches run over it as over others."""
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    model = settings["model"]
    if not 0 <= model["pad_token_id"] < model["vocab_size"]:
        ends = model["eos_token_id"]
        ends = ends if isinstance(ends, list) else [ends]
        model["pad_token_id"] = next((one for one in ends if 0 <= one < model["vocab_size"]), 0)
        write_json(file, settings)
    return settings


def _command(
    source: Source, folder: Path, precision: str, scratch: Path, sparsify: dict[str, Any] | None
) -> list[str]:
    return [
        *(sys.executable, "-P", str(_BUILDER), json.dumps(sparsify)),
        *("-i", str(source.folder), "-o", str(folder), "-p", precision),
        *("-e", "cpu", "-c", str(scratch / "cache")),
        # Short caches for sliding windows are a layout that only onnxruntime-genai fills.
        *("--extra_options", "windowed_kv_cache=false", *_quantizer(source, precision)),
    ]


def _quantizer(source: Source, precision: str) -> tuple[str, ...]:
    if precision != "int4":
        return ()
    return (f"algo_config={_INT4_ODD if _is_odd(source) else _INT4}",)


def _is_odd(source: Source) -> bool:
    """Whether rows of weights have an odd number of groups."""
    linears = [one for one in source.skeleton.model.modules() if isinstance(one, nn.Linear)]
    return any(math.ceil(one.in_features / _INT4_GROUP) % 2 for one in linears)


def _start(
    command: list[str],
    scratch: Path,
    stream: Any,  # noqa: ANN401 - a file
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return subprocess.Popen(
        ending_with_us(command),
        cwd=scratch,
        env={**environment, "PYTHONUNBUFFERED": "1", "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=stream,
        stderr=subprocess.STDOUT,
    )


def _wait(process: subprocess.Popen[bytes], log: Path, source: Source, progress: Progress) -> None:
    blocks = source.config.get("num_hidden_layers", "?")
    while process.poll() is None:
        time.sleep(0.1)
        words = log.read_text(encoding="utf-8", errors="replace")
        if PACKING in words:
            progress(PACKING)
        else:
            done = words.count("Reading layer")
            progress(f"Building the graph with onnxruntime-genai (block {done} of {blocks})")


def _check_result(returncode: int, words: str, folder: Path) -> None:
    if returncode == 0 and (folder / MODEL).is_file():
        return
    if _UNSUPPORTED in words:
        error = FamilyNotBuilt(last_line(words))
        for pattern, told in _DETAILS.items():
            if found := pattern.search(words):
                error.detail = told.format(found[1])
        raise error
    refuse_no_room("onnxruntime-genai's model builder", returncode, words)
    if returncode == BadInput.exit_code and PACKING in words:
        raise BadInput(*json.loads(last_line(words)))
    if "No module named" in words:
        missing = words.rsplit("No module named", 1)[1].splitlines()[0].strip()
        raise EnvironmentFailed(
            f"onnxruntime-genai's model builder lacks the module {missing}.",
            "Install owl-deploy again.",
        )
    raise EngineFailed(
        f"onnxruntime-genai's model builder ended with code {returncode}: {last_line(words)}",
        "Another target may work: --target deepsparse.",
    )


def refuse_no_room(what: str, returncode: int, words: str) -> None:
    """Say what a process that failed had no room for, where that is known.

    Raises `EnvironmentFailed` where its output says that the disk is full, and where it was killed,
    which is how Linux takes memory back.
    """
    if returncode == -signal.SIGKILL:
        raise EnvironmentFailed(
            f"{what} was killed, as it happens where memory runs out.",
            "Free some, or export on a machine with more.",
        )
    if any(sign in words for sign in _FULL_DISK):
        raise EnvironmentFailed(
            "The disk is full.", "Free some space, or choose another output folder."
        )


def last_line(words: str) -> str:
    """The last line of a process's output that says anything."""
    return ([line.strip() for line in words.splitlines() if line.strip()] or ["no output"])[-1]
