"""Text to calibrate, train and evaluate on: local files, or a named data set of the Hub.

A SOURCE is a UTF-8 file; a folder, of which all files are read that are UTF-8 text and not hidden;
a pattern with *, ? or ** for such files; a name from the tables here, of which a part is read from
the Hub to prune or train on and another to evaluate on; or hf:NAME:CONFIG:SPLIT:COLUMN. JSON lines
are read as records (see json_lines.py).
"""

import glob
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.data.json_lines import SUFFIX, JsonLines, as_text, has_records
from owl_deploy.errors import BadInput, first_line
from owl_deploy.utils.progress import error_console

if TYPE_CHECKING:
    import torch


SEPARATOR = "\n\n"  # between documents


@dataclass(frozen=True)
class _Part:
    """A part of a data set on the Hub: the first `documents` (None: all), joined by `separator`."""

    name: str
    config: str | None
    split: str
    column: str
    separator: str = SEPARATOR
    documents: int | None = None
    revision: str | None = None


_C4, _C4_CONFIG = "allenai/c4", "en"
_WIKITEXT, _WIKITEXT_CONFIG = "Salesforce/wikitext", "wikitext-2-raw-v1"
# The name that the papers load is a script, which `datasets` no longer runs: the Hub's own copy.
_PTB, _PTB_REVISION = "ptb-text-only/ptb_text_only", "refs/convert/parquet"
_STREAMED_DOCUMENTS = 20_000  # of C4, which has 800 GB, and of what a user names: ample
# To prune and fine-tune on.
_TRAINING = {
    "wikitext": _Part(_WIKITEXT, _WIKITEXT_CONFIG, "train", "text"),
    "c4": _Part(_C4, _C4_CONFIG, "train", "text", documents=_STREAMED_DOCUMENTS),
    "ptb": _Part(_PTB, None, "train", "sentence", revision=_PTB_REVISION),
}
# To evaluate on, as the code of SparseGPT, Wanda and OWL does (get_wikitext2, get_c4, get_ptb).
_EVALUATION = {
    "wikitext": _Part(_WIKITEXT, _WIKITEXT_CONFIG, "test", "text"),
    "c4": _Part(_C4, _C4_CONFIG, "validation", "text", " ", documents=1100),
    "ptb": _Part(_PTB, None, "test", "sentence", " ", revision=_PTB_REVISION),
}
_EVALUATION_WINDOWS = {"c4": 256}  # at most so many; of the other texts all


def load_evaluation_text(source: str, tokenizer: Any) -> tuple[str, int | None]:  # noqa: ANN401
    """The text of a SOURCE to evaluate on, and how many windows of it the papers read at most.

    Its documents are joined by a blank line; those of a named data set as the papers do. Raises
    `BadInput`.
    """
    named = source in _EVALUATION and not Path(source).exists()
    documents = _documents(source, _EVALUATION)
    text = SEPARATOR.join(read_document(one, tokenizer) for one in documents)
    return text, _EVALUATION_WINDOWS.get(source) if named else None


def training_documents(source: str) -> list[Path | str]:
    """The documents of a SOURCE to prune or train on: files, or what is no file, as its text.

    Raises `BadInput` for one that names nothing.
    """
    return _documents(source, _TRAINING)


def read_document(document: Path | str, tokenizer: Any) -> str:  # noqa: ANN401
    """The text of a document; what the `tokenizer` has a chat template for, in that.

    Raises `BadInput` for a file that is not UTF-8, and for records that are none.
    """
    if isinstance(document, JsonLines):
        return as_text("the data set", document, tokenizer, SEPARATOR)
    if isinstance(document, str):
        return document
    try:
        text = document.read_text(encoding="utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise BadInput(f"{document} is not UTF-8 text ({error.reason}).") from error
    if document.suffix == SUFFIX and has_records(text):
        return as_text(document, text, tokenizer, SEPARATOR)
    return text


def depends_on_template(document: Path | str) -> bool:
    """Whether a document's text may be another with another chat template."""
    return isinstance(document, JsonLines) or getattr(document, "suffix", "") == SUFFIX


def source_files(source: str) -> list[Path]:
    """The files that a SOURCE names, sorted and none twice; none where it is no file's name."""
    path = Path(source)
    if not source:  # which is a path of the working folder
        return []
    if path.is_file():
        return [path]
    pattern = f"{glob.escape(source)}/**" if path.is_dir() else source
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))  # noqa: PTH207 - not the hidden
    return list({one.resolve(): one for one in found if one.is_file()}.values())


def _documents(source: str, names: Mapping[str, _Part]) -> list[Path | str]:
    if Path(source).is_file():
        return [Path(source)]
    if not Path(source).exists():  # what is here goes before what is elsewhere
        if source in names:
            return [_load_dataset(names[source])]
        if part := _of_the_hub(source):
            return [_load_dataset(part)]
    found: list[Path | str] = list(_texts(source))
    if not found:
        raise _no_text(source)
    return found


def check_source(source: str) -> None:
    """Raise `BadInput` for a SOURCE that names nothing, without reading any text."""
    if not (source in _TRAINING or _of_the_hub(source) or source_files(source)):
        raise _no_text(source)


def _of_the_hub(source: str) -> "_Part | None":
    """What hf:NAME:CONFIG:SPLIT:COLUMN names; None where `source` is none of that kind."""
    if not source.startswith("hf:"):
        return None
    parts = source.split(":")[1:]
    if len(parts) != 4 or not all(parts):
        raise BadInput(f"{source!r} is not of the form hf:NAME:CONFIG:SPLIT:COLUMN.")
    name, config, split, column = parts
    return _Part(name, config, split, column, documents=_STREAMED_DOCUMENTS)


def _no_text(source: str) -> BadInput:
    return BadInput(
        f"There is no text file {source!r}.",
        "Give a UTF-8 file, a folder or a pattern of such files, one of "
        f"{', '.join(_TRAINING)}, or hf:NAME:CONFIG:SPLIT:COLUMN.",
    )


def _texts(source: str) -> list[Path]:
    """Of the files that a folder or a pattern names those that are text; says what is left out."""
    files = source_files(source)
    texts = list(filter(_is_text, files))
    if len(texts) < len(files):
        error_console().print(
            f"{source}: {len(texts)} of {len(files)} files are UTF-8 text; the others are left out."
        )
    return texts


def _is_text(path: Path) -> bool:
    try:
        return "\0" not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def _load_dataset(part: _Part) -> str:
    import datasets

    try:
        rows = datasets.load_dataset(
            part.name, part.config, split=part.split, revision=part.revision, streaming=True
        )
        rows = rows if part.documents is None else rows.take(part.documents + 1)
        texts = [row[part.column] for row in rows]
    except Exception as error:  # no network, no such data set, split or column: many types
        raise BadInput(
            f"The {part.split} split of the data set {part.name} could not be read "
            f"({type(error).__name__}).",
            "Check its name, config and column, and the network, or give a text file.",
        ) from error
    if part.documents is not None and len(texts) > part.documents:
        texts.pop()
        if part.documents == _STREAMED_DOCUMENTS:  # and not as others take the evaluation's
            error_console().print(f"{part.name}: of its rows the first {len(texts)} are read.")
    texts = [one for one in texts if one is not None]  # a document that is not there
    if texts and isinstance(texts[0], list):
        return JsonLines("\n".join(json.dumps({"messages": one}, default=str) for one in texts))
    for one in texts:
        if not isinstance(one, str):
            raise BadInput(
                f"The column {part.column!r} of the data set {part.name} holds no text, but "
                f"{type(one).__name__}.",
                "Give a column of texts, or of messages.",
            )
    return part.separator.join(texts)


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - transformers' tokenizers share no type
    """The tokenizer in a checkpoint or deployment folder."""
    import transformers

    try:
        # False, since None asks whoever sits there whether the folder's own code may run.
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer("A")  # which settings that are wrong do not survive
    except Exception as error:  # missing, truncated, or of an unknown class: many types
        raise BadInput(
            f"{folder} holds no tokenizer that can be read ({first_line(error)}).",
            "Copy the model's tokenizer files, and its config.json, there.",
        ) from error
    return tokenizer


def token_before(tokenizer: Any) -> list[int]:  # noqa: ANN401
    """A token for others to come after where they go on from a text.

    Decoded by themselves these lose their first space where the tokenizer is SentencePiece's.
    """
    before: list[int] = tokenizer.encode("1", add_special_tokens=False)[-1:]
    return before


def tokenize(
    tokenizer: Any,  # noqa: ANN401
    text: str,
    *,
    special: bool = False,
) -> "torch.Tensor":
    """The whole text as token ids [tokens].

    With `special` those that the tokenizer adds to a text are there, once: a leading BOS, often.
    """
    import torch

    # verbose=False: the text is meant to be longer than the model's context.
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def calibration_windows(
    tokens: "torch.Tensor", samples: int, length: int, seed: int, held_out: int = 0
) -> "torch.Tensor":
    """Draw `samples` windows without overlap from `tokens`, as int64 ids [windows, length].

    After them come `held_out` others. Their order is random by `seed`. Raises `BadInput` when the
    text is too short for them.
    """
    import torch

    available, count = len(tokens) // length, samples + held_out
    if available < count:
        others = f" and {held_out} others to judge by" if held_out else ""
        raise BadInput(
            f"The calibration text holds {available} windows of {length} tokens, not {samples}"
            f"{others}.",
            "Give a longer text, fewer --samples, or a smaller --sequence-length.",
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count]
    return tokens[: available * length].view(available, length)[chosen].long()


def token_digest(windows: "torch.Tensor") -> str:
    """What tells the `windows` [windows, tokens] from others, in hexadecimal."""
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()


def evaluation_windows(tokens: "torch.Tensor", length: int, limit: int | None) -> "torch.Tensor":
    """The first `limit` windows of the text (all when None), without overlap: [windows, length].

    Raises `BadInput` when not one full window is there.
    """
    available = len(tokens) // length
    if available == 0:
        raise BadInput(
            f"The text has {len(tokens)} tokens, less than one window of {length}.",
            "Give a longer text or a smaller --window.",
        )
    used = available if limit is None else min(available, limit)
    return tokens[: used * length].view(used, length)
