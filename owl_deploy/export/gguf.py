"""The target `llama.cpp`: a GGUF by llama.cpp's own converter, then by its own quantizer.

The converter is checked by itself: what it wrote in fp32 has to compute what PyTorch does, so that
what a quantized file differs by is the quantization.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from owl_deploy.data.calibration import Calibration
from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.export import parity, rotary, windows
from owl_deploy.export.genai import last_line, refuse_no_room
from owl_deploy.export.importance import importance
from owl_deploy.export.source import Progress, Reference, Source
from owl_deploy.inference import default_threads
from owl_deploy.inference.environment import ending_with_us, environment_folder, python_of
from owl_deploy.inference.registry import get_engine
from owl_deploy.models.checkpoint import write_compatible

ENGINE = "llama.cpp"
# Of the file in fp32; llama.cpp's cache holds fp16.
TOLERANCE = 1e-2
_GEMMA_PERIOD = 6  # its last block in so many reads all tokens
# RoPE scalings that llama.cpp has in some families only; in others the converter leaves them out.
_SCALED_IN = {"llama3": ("llama", "mistral"), "longrope": ("phi3",)}
_HERE = Path(__file__).parent
_PACKAGES = "import sysconfig; print(sysconfig.get_path('platlib'))"
_UNKNOWN = re.compile(r"Model (\w+) is not supported")
_MISSING = re.compile(r"Error: Missing .*?([\w.]+)$", re.MULTILINE)
_FALLBACK = re.compile(r"WARNING: (\d+) of (\d+) tensor\(s\) required fallback quantization")


def build(
    source: Source,
    folder: Path,
    precision: str,
    progress: Progress,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Write `model.gguf`, config and tokenizer into `folder`; returns what the manifest says.

    `precision` is a type of llama.cpp's quantizer, which rounds those weights most exactly that
    count most on the text of `calibration`, if there is one. Raises `BadInput` for a model that has
    no tokenizer, or that GGUF does not know or not wholly, and for too short a text,
    `EnvironmentFailed` where the engine is not installed, `ParityFailed`, `EngineFailed`.
    """
    python = python_of(ENGINE)
    if source.tokenizer is None:
        raise BadInput(
            f"{source.folder} has no tokenizer, which a GGUF holds.",
            "Copy the tokenizer's files there, or export with --target deepsparse.",
        )
    file = get_engine(ENGINE).model_file
    _refuse_what_is_dropped(source.skeleton.model.config)
    _refuse_more_tokens(source)
    # In the staged folder, so that what a kill leaves is cleared with it.
    with tempfile.TemporaryDirectory(dir=folder, prefix="fp32-") as name:
        scratch = Path(name)
        facts, weighed, drawn = {}, {}, None
        if calibration is not None:  # to hear of too short a text before anything is converted
            drawn = calibration.windows(source.checkpoint)
            facts["calibration"] = calibration.describe(drawn)
        full = scratch / file
        progress("Converting to GGUF")
        called, notes = _convert(python, source.folder, full)
        reference = source.reference
        progress("Comparing with PyTorch in llama.cpp, before quantizing")
        difference = _check_converted(scratch, reference)
        if drawn is not None:
            weighed = importance(source.checkpoint, drawn, scratch, progress)
        progress(f"Quantizing to {precision}")
        if lost := weighed.keys() - called.keys():
            raise EngineFailed(f"llama.cpp's converter has no tensor for {min(lost)}.")
        weighed = {called[name]: values for name, values in weighed.items()}
        notes += _quantize(python, full, folder / file, precision, weighed)
    write_compatible(source.checkpoint, folder)
    return {
        "graph": "llama.cpp's converter and quantizer",
        "max_context": source.config.get("max_position_embeddings"),
        "converter_difference": difference,
        "note": "; ".join(notes),
        **facts,
    }


def _refuse_more_tokens(source: Source) -> None:
    """Raise `BadInput` for a tokenizer with more tokens than the model has, on which the converter
    ends; of SentencePiece's own file it leaves out what is beyond.
    """
    words, rows = len(source.tokenizer), source.skeleton.model.config.vocab_size
    if words > rows and not (source.folder / "tokenizer.model").is_file():
        raise BadInput(
            f"The tokenizer of {source.folder} has {words} tokens, and the model {rows}.",
            "Give the tokenizer that the model was trained with.",
        )


def _refuse_what_is_dropped(config: Any) -> None:  # noqa: ANN401 - a transformers config
    """Raise `BadInput` for what a GGUF would be without, seen by long texts alone.

    The comparison with PyTorch reads some hundred tokens.
    """
    way_out = "Use --target owl or onnxruntime."
    slides = windows.sliding(config)
    reach = config.max_position_embeddings
    if any(slides) and config.sliding_window < reach and not _has_windows(config, slides):
        raise BadInput(
            f"llama.cpp does not have this model's sliding window of {config.sliding_window} "
            "tokens, and would answer long texts otherwise.",
            way_out,
        )
    for row in rotary.parameters(config):
        families = _SCALED_IN.get(row["rope_type"])
        if families is not None and config.model_type not in families:
            raise BadInput(
                f"llama.cpp does not have the RoPE scaling {row['rope_type']!r} of this model.",
                way_out,
            )


def _has_windows(config: Any, slides: list[bool]) -> bool:  # noqa: ANN401
    """Whether llama.cpp gives the window to the blocks that have it: in Gemma 3's own order."""
    theirs = [number % _GEMMA_PERIOD != 0 for number in range(1, len(slides) + 1)]
    return bool(config.model_type == "gemma3_text" and slides == theirs)


def _convert(python: Path, checkpoint: Path, file: Path) -> tuple[dict[str, str], list[str]]:
    """Write the checkpoint to `file` in fp32; returns what its tensors are called there, by their
    names in the checkpoint, and what there is to note.
    """
    home = environment_folder(get_engine(ENGINE)) / "source"
    packages = _output([str(python), "-I", "-c", _PACKAGES]).strip()
    script = str(_HERE / "to_gguf.py")
    names = file.with_name("names.json")
    files = [str(path) for path in (checkpoint, file, names)]
    command = [sys.executable, "-P", script, str(home), packages, *files]
    words = _output(command, "converter", "Use --target onnxruntime or deepsparse.")
    called: dict[str, str] = json.loads(names.read_text(encoding="utf-8"))
    if "owl: unknown tokenizer" not in words:
        return called, []
    return called, ["llama.cpp does not know its tokenizer, and may split text in another way"]


def _check_converted(folder: Path, reference: Reference) -> float:
    """The largest difference from PyTorch over the largest logit, of what was converted."""
    difference = parity.reading(folder, reference, ENGINE)["relative_difference"]
    if not difference <= TOLERANCE:
        raise parity.ParityFailed(
            f"llama.cpp makes another model of this one: in fp32 it differs from PyTorch by "
            f"{difference:.1e} of the largest logit, where {TOLERANCE:.0e} is allowed.",
            "Nothing was written. Use --target owl or onnxruntime.",
        )
    return difference


def _quantize(
    python: Path, full: Path, file: Path, precision: str, weighed: dict[str, Any]
) -> list[str]:
    """Write `full` to `file` with weights in `precision`; returns what there is to note.

    `weighed`: how much each input of a tensor counts, [in], by its name; none: all count alike.
    """
    script, threads = str(_HERE / "quantize_gguf.py"), str(default_threads())
    command = [str(python), "-I", script, str(full), str(file), precision, threads]
    if weighed:
        importance_file = full.with_name("importance.npz")
        np.savez(importance_file, **weighed)
        command.append(str(importance_file))
    words = _output(command, "quantizer")
    if not (found := _FALLBACK.search(words)):
        return []
    return [
        f"{found[1]} of {found[2]} tensors are held in a wider type than {precision}, which takes "
        "no rows of their length"
    ]


def _output(command: list[str], what: str = "Python", way_out: str = "") -> str:
    """What a part of llama.cpp says; raises `BadInput` and `EngineFailed` for what it refuses."""
    done = subprocess.run(
        ending_with_us(command),
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    words = done.stdout
    if done.returncode == 0:
        return words
    if unknown := _UNKNOWN.search(words):
        raise BadInput(f"llama.cpp's converter does not know {unknown[1]!r}: no GGUF.", way_out)
    if missing := _MISSING.search(words):
        raise BadInput(
            f"llama.cpp's converter needs {missing[1]}, which the checkpoint lacks.",
            f"Copy it there from the original model. {way_out}".strip(),
        )
    refuse_no_room(f"llama.cpp's {what}", done.returncode, words)
    raise EngineFailed(
        f"llama.cpp's {what} ended with code {done.returncode}: {last_line(words)}", way_out
    )
