"""The text that a model is run on to see what enters its Linears, and the windows drawn from it."""

import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.data.text import calibration_windows, token_digest
from owl_deploy.data.tokens import load_tokens
from owl_deploy.errors import BadInput, option

if TYPE_CHECKING:
    import torch

    from owl_deploy.models.checkpoint import Checkpoint


@dataclass(frozen=True)
class Calibration:
    """The text that the model is run on: `samples` windows of `sequence_length` tokens.

    `source`: a SOURCE (see text.py). `seed`: of the draw of windows. Raises `BadInput` for
    fewer than one window, or than two tokens, and for a source that is neither a str nor a Path.
    """

    source: str | Path  # as a str, once it is made: what a manifest can hold
    samples: int = 128
    sequence_length: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.source, str | Path):
            raise BadInput(
                f"The text to calibrate by is {reprlib.repr(self.source)}, which names none.",
                "Give a file or another SOURCE, as a str or a Path.",
            )
        object.__setattr__(self, "source", str(self.source))
        for name, least in (("samples", 1), ("sequence_length", 2)):
            if getattr(self, name) < least:
                raise BadInput(f"{option(name)} must be at least {least}.")

    def windows(self, checkpoint: "Checkpoint", held_out: int = 0) -> "torch.Tensor":
        """The windows in the checkpoint's tokens, ids [samples + held_out, length].

        Raises `BadInput` for a text that is too short, and a length that the model does not take.
        """
        checkpoint.check_length(self.sequence_length, "--sequence-length")
        tokens = load_tokens(checkpoint.folder, [str(self.source)])
        checkpoint.check_ids(tokens)
        return calibration_windows(tokens, self.samples, self.sequence_length, self.seed, held_out)

    def describe(self, windows: "torch.Tensor") -> dict[str, Any]:
        """What a manifest says of it, with a digest of the token ids of the `windows` used."""
        return {**asdict(self), "token_ids_sha256": token_digest(windows)}


def as_calibration(given: Calibration | str | Path | None) -> Calibration | None:
    """The calibration that is `given`, perhaps by its source alone; `BadInput` for another."""
    return given if given is None or isinstance(given, Calibration) else Calibration(given)
