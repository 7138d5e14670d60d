"""The tokens of a text, made once: the cache folder keeps those of a long one.

They lie there under a digest of the text and the tokenizer, and are read through a memory map.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.data.text import (
    SEPARATOR,
    depends_on_template,
    load_tokenizer,
    read_document,
    tokenize,
    training_documents,
)
from owl_deploy.errors import BadInput, OwlError
from owl_deploy.models.digests import digest
from owl_deploy.utils.artefact import replaced
from owl_deploy.utils.cache import cache_dir, cache_path
from owl_deploy.utils.progress import Advance, bar

if TYPE_CHECKING:
    import torch

_CACHE = "tokens"  # the folder in the cache
_READING = 2  # counts the ways in which documents were read, of which older tokens tell nothing
_LEAST_BYTES = 1 << 20  # a shorter text is tokenized in a second


def load_tokens(folder: Path, sources: Sequence[str]) -> "torch.Tensor":
    """What the tokenizer in `folder` makes of the SOURCEs to prune or train on: int32 [tokens].

    Their documents (see text.py) stand one after another as they are named, a file that is
    named twice where it is named last, and a blank line after each but the last. Raises `BadInput`.
    """
    if not sources:
        raise BadInput("Nothing says on what text.", "Name a file, a folder or a data set.")
    named = [one for source in sources for one in training_documents(source)]
    documents = list({_identity(one): one for one in reversed(named)}.values())[::-1]
    tokenizer = load_tokenizer(folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # A template may write the date: a run that resumes tomorrow finds today's tokens.
    dated = any(map(depends_on_template, documents))
    if backend is None or (sum(map(_size, documents)) < _LEAST_BYTES and not dated):
        return _tokenized(tokenizer, documents)
    # Whether special tokens in a text are read as such, the backend is told at each call.
    split = bool(getattr(tokenizer, "split_special_tokens", False))
    maker = hashlib.sha256(f"{backend.to_str()}{' split' * split}".encode()).hexdigest()
    template = (tokenizer.chat_template, tokenizer.special_tokens_map)  # which it may write
    digests = _digests(documents, template)
    name = f"{_key(maker, digests)}.npy"
    with contextlib.suppress(Exception):  # it is not there, or damaged, in any of numpy's words
        return _mapped(cache_path() / _CACHE / name)
    tokens = _tokenized(tokenizer, documents)
    if _digests(documents, template) != digests:  # changed meanwhile
        return tokens
    import numpy

    with contextlib.suppress(OwlError, OSError):  # a cache that cannot be written costs time
        path = cache_dir(_CACHE) / name
        with replaced(path) as temporary, temporary.open("wb") as file:
            numpy.save(file, tokens.numpy())
        return _mapped(path)
    return tokens


def _identity(document: Path | str) -> Path | str:
    return document.resolve() if isinstance(document, Path) else document


def _size(document: Path | str) -> int:
    return document.stat().st_size if isinstance(document, Path) else len(document)


def _digests(documents: Sequence[Path | str], template: object) -> list[str]:
    """Of each document's content, with the chat `template` where that makes its text."""
    return [
        f"{_digest(one)} in {template!r}" if depends_on_template(one) else _digest(one)
        for one in documents
    ]


def _digest(document: Path | str) -> str:
    if isinstance(document, Path):
        return digest(document)
    return hashlib.sha256(document.encode()).hexdigest()


def _key(maker: str, digests: Sequence[str]) -> str:
    """A digest of all that the tokens depend on."""
    parts = (_READING, version("tokenizers"), maker, SEPARATOR, *digests)
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()


def _mapped(path: Path) -> "torch.Tensor":
    """The tokens in a file; what is written into them stays in memory."""
    import numpy
    import torch

    return torch.from_numpy(numpy.load(path, mmap_mode="c"))


def _tokenized(tokenizer: Any, documents: Sequence[Path | str]) -> "torch.Tensor":  # noqa: ANN401
    """The tokens of the documents, [tokens]."""
    import torch

    parts = []
    with _progress(sum(map(_size, documents))) as advance:
        for number, document in enumerate(documents):
            end = SEPARATOR if number + 1 < len(documents) else ""
            parts.append(tokenize(tokenizer, read_document(document, tokenizer) + end).int())
            advance(_size(document) / 1e6)
    return torch.cat(parts)


def _progress(size: int) -> contextlib.AbstractContextManager[Advance]:
    """A bar over the megabytes of a text; of a short one, none."""
    if size < _LEAST_BYTES:
        return contextlib.nullcontext(lambda _: None)
    return bar("Tokenizing", size / 1e6)
