"""What a teacher says, cut to its likeliest tokens, and kept on disk while windows come again."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

_IDS, _SHARES = np.dtype(np.int32), np.dtype(np.float16)

# Tokens, int32 [rows, k]; their shares and, last, that of all others, float16 [rows, k + 1].
Likeliest = tuple[torch.Tensor, torch.Tensor]


def likeliest(logits: torch.Tensor, k: int, temperature: float) -> Likeliest:
    """The `k` likeliest tokens by `logits` [rows, vocabulary] over the `temperature`."""
    shares = (logits / temperature).softmax(-1)
    top, ids = shares.topk(k)
    rest = shares.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return ids.int(), torch.cat((top, rest), -1).half()


def cut_distillation_loss(
    student: torch.Tensor, teacher: Likeliest, temperature: float
) -> torch.Tensor:
    """As `trainee.distillation_loss`, all tokens but the teacher's likeliest taken as one.

    `student`: logits [rows, vocabulary]; `teacher`: what `likeliest` made at that temperature.
    """
    ids, shares = teacher[0].long(), teacher[1].float()
    logs = (student / temperature).log_softmax(-1)
    rest = logs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    own = torch.cat((logs.gather(-1, ids), rest), -1)
    divergence = (torch.xlogy(shares, shares) - shares * own).sum()
    return divergence * temperature**2 / len(student)


def cache_bytes(windows: int, positions: int, k: int) -> int:
    """The room that a `TeacherCache` takes on disk."""
    return windows * positions * (k * _IDS.itemsize + (k + 1) * _SHARES.itemsize)


class TeacherCache:
    """The teacher's likeliest tokens in windows that it has read, in two files in `folder`.

    It begins empty, in a run that resumes too: it saves time and decides nothing. Raises `OSError`
    where the disk is full.
    """

    def __init__(self, folder: Path, name: str, windows: int, positions: int, k: int) -> None:
        self._ids = _reserved(folder / f"{name}.ids", _IDS, (windows, positions, k))
        self._shares = _reserved(folder / f"{name}.shares", _SHARES, (windows, positions, k + 1))
        self._known = np.zeros(windows, dtype=bool)

    def of(self, windows: torch.Tensor, make: Callable[[torch.Tensor], Likeliest]) -> Likeliest:
        """What the teacher says of the windows with these numbers [batch].

        `make` asks it, of those at some places in the batch, whose rows follow one another.
        """
        numbers = windows.cpu().numpy()
        missing = np.flatnonzero(~self._known[numbers])
        if len(missing):
            ids, shares = make(torch.from_numpy(missing).to(windows.device))
            for kept, made in ((self._ids, ids), (self._shares, shares)):
                kept[numbers[missing]] = made.cpu().numpy().reshape(len(missing), *kept.shape[1:])
            self._known[numbers[missing]] = True
        ids, shares = (
            torch.from_numpy(kept[numbers].reshape(-1, kept.shape[-1])).to(windows.device)
            for kept in (self._ids, self._shares)
        )
        return ids, shares


def _reserved(path: Path, dtype: "np.dtype[np.generic]", shape: tuple[int, ...]) -> np.memmap:
    """A file of so many numbers, mapped; its room is taken now, not when a page is written."""
    with path.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, int(np.prod(shape)) * dtype.itemsize))
    return np.memmap(path, dtype, "r+", shape=shape)
