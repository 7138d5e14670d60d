"""What a teacher says of the next tokens, whole, or cut to its likeliest and kept on disk."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

_IDS, _SHARES = np.dtype(np.int32), np.dtype(np.float16)

# Tokens, int32 [rows, k]; their shares and, last, that of all others, float16 [rows, k + 1].
Likeliest = tuple[torch.Tensor, torch.Tensor]

_ROWS = 32  # of logits at once, so that what is made of them stays in the processor's caches


def distilled_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    weight: float,
) -> torch.Tensor:
    """(1 - weight) times the cross-entropy plus `weight` times Hinton's loss, mean over the rows.

    The latter is T^2 KL(teacher / T || student / T) (arXiv 1503.02531), whose factor keeps the
    gradients' size whatever T is. Both are logits, float32 [rows, vocabulary]; `labels` [rows].
    """
    loss: torch.Tensor = _Distilled.apply(  # type: ignore[no-untyped-call]
        student, teacher, labels, temperature, weight
    )
    return loss


class _Distilled(torch.autograd.Function):
    """The loss and its gradient in one pass over the rows: both are made of the same shares."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives it no type
        student: torch.Tensor,
        teacher: torch.Tensor,
        labels: torch.Tensor,
        temperature: float,
        weight: float,
    ) -> torch.Tensor:
        gradient, total = torch.empty_like(student), student.new_zeros(())
        for start in range(0, len(student), _ROWS):
            rows = slice(start, start + _ROWS)
            own = soft = student[rows].log_softmax(-1)
            wanted = (teacher[rows] / temperature).log_softmax(-1)
            if temperature != 1:
                soft = (student[rows] / temperature).log_softmax(-1)
            true, shares = labels[rows].unsqueeze(1), wanted.exp()
            total -= (1 - weight) * own.gather(1, true).sum()
            total += weight * temperature**2 * (shares * (wanted - soft)).sum()
            torch.mul(own.exp(), 1 - weight, out=gradient[rows])
            gradient[rows].scatter_add_(1, true, own.new_full(true.shape, weight - 1))
            gradient[rows].add_(soft.exp().sub_(shares), alpha=weight * temperature)
        ctx.save_for_backward(gradient.div_(len(student)))
        return total / len(student)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,  # noqa: ANN401
        by_loss: torch.Tensor,
    ) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient.mul_(by_loss), None, None, None, None


def likeliest(logits: torch.Tensor, k: int, temperature: float) -> Likeliest:
    """The `k` likeliest tokens by `logits` [rows, vocabulary] over the `temperature`."""
    shares = (logits / temperature).softmax(-1)
    top, ids = shares.topk(k)
    rest = shares.scatter(-1, ids, 0.0).sum(-1, keepdim=True)
    return ids.int(), torch.cat((top, rest), -1).half()


def cut_distillation_loss(
    student: torch.Tensor, teacher: Likeliest, temperature: float
) -> torch.Tensor:
    """Hinton's loss as in `distilled_loss`, all tokens but the teacher's likeliest taken as one.

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
    """The teacher's likeliest tokens in windows that a process has read, in two files in `folder`.

    It begins empty, in a run that resumes too: it saves time and decides nothing. Raises `OSError`
    where the disk is full.
    """

    FILES = "teacher-*"

    def __init__(self, folder: Path, rank: int, windows: int, positions: int, k: int) -> None:
        ids, shares = (folder / f"teacher-{rank}.{what}" for what in ("ids", "shares"))
        self._ids = _reserved(ids, _IDS, (windows, positions, k))
        self._shares = _reserved(shares, _SHARES, (windows, positions, k + 1))
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
