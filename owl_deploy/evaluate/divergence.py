"""How far what models predict on a text is from what the first of them does.

Of each token it counts the whole distribution, where perplexity counts the text's own word alone:
so it tells models apart by far less text, and finds what a text's own words happen to hide.
"""

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from owl_deploy.data.text import token_digest
from owl_deploy.errors import BadInput
from owl_deploy.inference.worker import Predictions
from owl_deploy.models.blocks import window_loss
from owl_deploy.utils.artefact import check_room


@dataclass(frozen=True)
class Divergence:
    """Kullback-Leibler divergence of the next token's distributions, from the first model's.

    `value`: in nats a token, the mean over `windows`; `stderr`: of that mean, by what the windows
    differ in among themselves, None of one; `same_top`: the share of places whose likeliest token
    is the first model's as well.
    """

    windows: int
    value: float
    stderr: float | None
    same_top: float


class First:
    """What the first model predicts at each place of a text, on the disk.

    In float16, 2 bytes a place and word of the vocabulary.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.text = ""  # the digest of the tokens that were read
        self.vocabulary = 0

    def file(self, number: int) -> Path:
        """Of a window."""
        return self.scratch / f"{number}.predictions"


class Watched:
    """One model's predictions of window after window: the first's are kept, others put beside.

    Each window is begun by `asked` or `loss`. The windows of each model are the same: `reads`.
    """

    def __init__(self, first: First) -> None:
        self._first = first
        self._keeps = not first.text
        self._found: list[tuple[float, float]] = []
        self._windows = 0

    def reads(self, name: Path, windows: torch.Tensor, own: torch.Tensor) -> None:
        """Of `windows` [count, length] the model called `name` reads `own`.

        Raises `BadInput` where they are not those of the first model.
        """
        self._name, self._windows = name, len(own)
        digest = token_digest(windows)
        if not self._keeps and digest != self._first.text:
            raise BadInput(
                f"{name} reads other tokens of the text than the first model.",
                "--divergence compares models of one tokenizer: leave one of them out.",
            )
        self._first.text = digest

    def asked(self) -> dict[str, Any]:
        """What an engine's `score` is to be told for the next window."""
        return {"predictions": str(self._file()), "keep": self._keeps}

    def loss(self, model: Any, ids: torch.Tensor) -> float:  # noqa: ANN401 - transformers is untyped
        """A checkpoint's mean loss on its next window [length], in nats a token."""
        with Predictions(str(self._file()), len(ids) - 1, self._keeps) as seen:
            value = window_loss(model, ids, lambda logits: seen.see(logits.cpu().numpy()))
        self.take(seen.result())
        return value

    def take(self, result: dict[str, Any]) -> None:
        """What `Predictions.result` says of the window.

        Raises `BadInput` for a model of another vocabulary, and where the disk will not hold all
        that the first predicts.
        """
        vocabulary = result["vocabulary"]
        if self._keeps:
            self._first.vocabulary = vocabulary
            if not self._found:
                one = self._file().stat().st_size
                scratch = self._first.scratch
                check_room(
                    scratch,
                    one * (self._windows - 1),
                    f"What the first model predicts, in {scratch},",
                    "take fewer --windows, or set TMPDIR",
                )
        elif vocabulary != self._first.vocabulary:
            raise BadInput(
                f"{self._name} chooses from {vocabulary} tokens, and the first model from "
                f"{self._first.vocabulary}.",
                "--divergence compares models of one vocabulary: leave one of them out.",
            )
        self._found.append((result["divergence"], result["same_top"]))

    def _file(self) -> Path:
        return self._first.file(len(self._found))

    @property
    def found(self) -> Sequence[tuple[float, float]]:
        """The divergence and the share of likeliest tokens of each window; none of the first."""
        return () if self._keeps else self._found


@contextmanager
def first_predictions() -> Iterator[First]:
    """A place on the disk for those of the first model, which goes with the block."""
    with TemporaryDirectory(prefix="owl-predictions-") as scratch:
        yield First(Path(scratch))


def divergence(found: Sequence[tuple[float, float]]) -> Divergence | None:
    """The means over windows; None of none."""
    if not found:
        return None
    values, same = zip(*found, strict=True)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Divergence(len(values), statistics.fmean(values), error, statistics.fmean(same))
