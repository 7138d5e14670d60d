"""Calibration and evaluation text: a local file, or a named data set of the Hub."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import BadInput

if TYPE_CHECKING:
    import torch

# name: (data set, config, split, column); the paper calibrates on c4 and evaluates on wikitext.
_DATASETS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", "text"),
    "wikitext-train": ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": ("allenai/c4", "en", "train", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "test", "sentence"),
}
# c4's train split alone has 800 GB: a stream of this many documents is ample for calibration.
_STREAMED_DOCUMENTS = 20_000


def load_text(source: str) -> str:
    """The text of a SOURCE: a UTF-8 file, a name from the table, or hf:NAME:CONFIG:SPLIT:COLUMN.

    Documents are joined by a blank line, as the paper's evaluation does. Raises `BadInput`.
    """
    path = Path(source)
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"{source} is not UTF-8 text ({error.reason}).") from error
    if source in _DATASETS:
        return _load_dataset(*_DATASETS[source])
    if source.startswith("hf:"):
        parts = source.split(":")[1:]
        if len(parts) != 4 or not all(parts):
            raise BadInput(f"{source!r} is not of the form hf:NAME:CONFIG:SPLIT:COLUMN.")
        return _load_dataset(*parts)
    raise BadInput(
        f"There is no text file {source!r}.",
        f"Give a UTF-8 file, one of {', '.join(_DATASETS)}, or hf:NAME:CONFIG:SPLIT:COLUMN.",
    )


def _load_dataset(name: str, config: str, split: str, column: str) -> str:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split, streaming=True)
        texts = [str(row[column]) for row in rows.take(_STREAMED_DOCUMENTS)]
    except Exception as error:  # no network, no such data set, split or column: many types
        raise BadInput(
            f"The data set {name} ({config}, {split}, {column}) could not be read "
            f"({type(error).__name__}).",
            "Check the name and the network, or give a text file.",
        ) from error
    return "\n\n".join(texts)


def load_tokenizer(folder: Path) -> Any:  # noqa: ANN401 - transformers' tokenizers share no type
    """The tokenizer in a checkpoint or deployment folder."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # missing, truncated, or of an unknown class: many types
        raise BadInput(f"{folder} holds no tokenizer that can be read ({error}).") from error


def tokenize(tokenizer: Any, text: str) -> "torch.Tensor":  # noqa: ANN401
    """The whole text as token ids [tokens], without the special tokens a tokenizer may add."""
    import torch

    # verbose=False: the text is meant to be longer than the model's context.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def calibration_windows(
    tokens: "torch.Tensor", samples: int, length: int, seed: int
) -> "torch.Tensor":
    """Draw `samples` windows without overlap from `tokens`, as ids [samples, length].

    Their order is random by `seed`. Raises `BadInput` when the text is too short for them.
    """
    import torch

    available = len(tokens) // length
    if available < samples:
        raise BadInput(
            f"The calibration text holds {available} windows of {length} tokens, not {samples}.",
            "Give a longer text, fewer --samples, or a smaller --sequence-length.",
        )
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return tokens[: available * length].view(available, length)[chosen]


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
