"""`--reconstruct`: train what is left of a block to give what the dense one gives.

EBFT (arXiv 2402.12419) trains a pruned block to give the dense one's output, then prunes the next
one; "A Free Lunch in LLM Compression" (arXiv 2510.14444) finds that attention and MLP, each by
itself, serve as well. What enters a half here is what the pruned model makes of the text, and its
target is the dense model's own stream at that place, so that a half makes up for what those before
it lost, too. What is rounded trains on its grid, by the straight-through estimator, as blocks do in
EfficientQAT (arXiv 2407.11062), whose scales and zero points train, too.
"""

import copy
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch
from torch import nn

from owl_deploy.compression.sublayers import Half, Run, halves
from owl_deploy.models.blocks import Activations, Skeleton, check_finite
from owl_deploy.models.manifest import TrainedHalf
from owl_deploy.models.sparse_linear import LinearGrid, finished, groups, sparse_linears, sparsify
from owl_deploy.utils.progress import Advance

LEARNING_RATE = 0.01  # of Adam at the start, as a share of the size of what a tensor has left
TOKENS_A_STEP = 512
_TRAINED_FOR_ONE = 8  # windows, for one that is held out
_PATIENCE = 3  # epochs in which the held-out error may grow

Stream = Literal["pruned", "dense"]
Tensors = dict[str, torch.Tensor]  # of a block, in the checkpoint's dtypes, by their names in it


@dataclass(frozen=True)
class Streams:
    """The hidden states of the same windows in the pruned model and in the dense one."""

    pruned: Activations
    dense: Activations

    def batches(
        self, size: int, order: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """What enters and what should come out, float32 on the device, `size` windows at once."""
        for part in torch.split(order, size):
            inputs, target = (one.hidden[part].float() for one in (self.pruned, self.dense))
            yield inputs.to(self.pruned.device), target.to(self.pruned.device)


def held_out_windows(samples: int) -> int:
    """How many windows are held out, at least, beside `samples` that are trained on."""
    return -(-samples // _TRAINED_FOR_ONE)


def error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The squared error of every token over its target's squared norm, the mean over tokens.

    Both are [batch, length, width]. The norm that reads the stream next divides each token by its
    size; else the few tokens of huge size, such as a text's first, would be all that counts. Those
    of no size, such as one whose embedding is zero, do not count.
    """
    sizes = target.square().sum(-1)
    there = sizes > 0
    errors = (output - target).square().sum(-1) / sizes.where(there, 1)
    return errors.where(there, 0).sum() / there.sum().clamp(min=1)


class Reconstruction:
    """Takes two streams of hidden states, the pruned model's and the dense one's, past each block.

    `windows`: those to train on for `epochs`, and those held out that say when it is enough, each
    [n, length]. `dtype` is that of the products in training. `passes`: what the training of a block
    takes at most, in forward passes of all windows through it.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        windows: tuple[torch.Tensor, torch.Tensor],
        *,
        batch: int,
        epochs: int,
        dtype: torch.dtype,
        scratch: Path,
    ) -> None:
        self.skeleton, self.epochs, self.dtype = skeleton, epochs, dtype
        self.passes = 3 * epochs  # a backward pass takes two
        self.step = max(1, TOKENS_A_STEP // windows[0].shape[1])  # windows
        self.halves = halves(skeleton.family)
        self.training, self.held_out = (
            Streams(embedded, embedded.copy(scratch))
            for embedded in (skeleton.embed(part, batch, scratch) for part in windows)
        )

    def block(
        self,
        index: int,
        weights: Tensors,
        changed: Collection[str],
        advance: Advance,
        grids: Mapping[str, LinearGrid] = MappingProxyType({}),
        parts: Sequence[Half] | None = None,
    ) -> tuple[Tensors, dict[str, TrainedHalf]]:
        """The block's `weights` after its halves are trained, and what came of each, by name.

        `changed`: the Linears that were pruned or rounded; a half without one is left as it is.
        `grids`: of those that were rounded, which stay on them. `parts`: the halves to train, if
        not all, which begin where the streams are.
        """
        name = self.skeleton.names[index]
        dense = self.skeleton.checkpoint.read_module(name)
        outcomes: dict[str, TrainedHalf] = {}
        for half in parts or self.halves:
            self._pass(half, index, dense, "dense")
            if any(map(half.holds, changed)):
                trained = self._trained(half, index, weights, dense, grids, advance)
                weights, outcomes[half.name] = trained
            else:
                advance(self.passes / len(self.halves) * len(self.training.pruned.hidden))
            self._pass(half, index, weights, "pruned")
        return weights, outcomes

    def replay(self, index: int, weights: Tensors) -> None:
        """Bring both streams past a block that an earlier run has finished."""
        self.block(index, weights, (), lambda _: None)

    def _pass(self, half: Half, index: int, weights: Tensors, stream: Stream) -> None:
        block = self.skeleton.fill(self.skeleton.names[index], weights)
        for streams in (self.training, self.held_out):
            states: Activations = getattr(streams, stream)
            states.through(half.of(block), index, lambda _: None, keep=True)

    def _trained(
        self,
        half: Half,
        index: int,
        weights: Tensors,
        dense: Tensors,
        grids: Mapping[str, LinearGrid],
        advance: Advance,
    ) -> tuple[Tensors, TrainedHalf]:
        """The weights of the epoch with the least held-out error, or as they were; and that."""
        name = self.skeleton.names[index]
        block = self.skeleton.fill(name, weights)
        student = _student(block, weights, dense, self.dtype, grids)
        dtypes = {key: tensor.dtype for key, tensor in weights.items()}
        windows = len(self.training.pruned.hidden)
        units = self.passes / self.epochs * windows / len(self.halves)  # of an epoch
        errors, kept = [self._held_out_error(half, index, weights)], 0
        for epoch, _ in enumerate(self._epochs(half, index, student), start=1):
            advance(units)
            tensors, _ = finished(student, dtypes)
            errors.append(self._held_out_error(half, index, tensors))
            if errors[-1] < errors[kept]:
                # A copy: the norms among them are the student's own, and go on training.
                weights = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
                kept = epoch
            if epoch - kept >= _PATIENCE:
                advance((self.epochs - epoch) * units)
                break
        return weights, TrainedHalf(before=errors[0], after=errors[kept], epochs=kept)

    def _epochs(self, half: Half, index: int, student: nn.Module) -> Iterator[None]:
        """Train the `student` in place; stop after every epoch."""
        order = torch.Generator().manual_seed(0)
        windows = len(self.training.pruned.hidden)
        steps = self.epochs * -(-windows // self.step)
        optimizer = torch.optim.Adam(groups(student.parameters(), LEARNING_RATE), fused=True)
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        run = half.of(student)
        trained = [linear for name, linear in sparse_linears(student) if half.holds(name)]
        for _ in range(self.epochs):
            shuffled = torch.randperm(windows, generator=order)
            with torch.enable_grad():
                for inputs, target in self.training.batches(self.step, shuffled):
                    loss = error(self._output(run, index, inputs), target)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    optimizer.zero_grad()
                    falling.step()
                    for linear in trained:
                        linear.refresh()
            yield

    def _output(self, run: Run, index: int, inputs: torch.Tensor) -> torch.Tensor:
        lower = self.dtype != torch.float32
        with torch.autocast(inputs.device.type, self.dtype if lower else None, enabled=lower):
            return run(inputs, **self.training.pruned.arguments[index]).float()

    @torch.no_grad()
    def _held_out_error(self, half: Half, index: int, weights: Tensors) -> float:
        """That of the half with `weights` as a checkpoint has them, in the computing dtype."""
        run = half.of(self.skeleton.fill(self.skeleton.names[index], weights))
        arguments = self.held_out.pruned.arguments[index]
        windows = len(self.held_out.pruned.hidden)
        total = 0.0
        for inputs, target in self.held_out.batches(self.step, torch.arange(windows)):
            output = run(inputs.to(self.skeleton.dtype), **arguments)
            total += float(error(output.float(), target)) * len(inputs)
        check_finite(torch.tensor(total), f"what {half.name} in {self.skeleton.names[index]} gives")
        return total / windows


def _student(
    block: nn.Module,
    weights: Tensors,
    dense: Tensors,
    dtype: torch.dtype,
    grids: Mapping[str, LinearGrid],
) -> nn.Module:
    """A copy of `block` with `weights`, which train in float32 if they were not removed.

    Where they are on `grids`, they begin as near to the `dense` ones as these let them.
    """
    student = copy.deepcopy(block)
    device = next(block.parameters()).device
    own = {key: tensor.to(device, copy=True) for key, tensor in weights.items()}
    student.load_state_dict(own, assign=True)
    sparsify(student, dtype, grids)
    for name, sparse in sparse_linears(student):
        sparse.lean(dense[f"{name}.weight"].to(sparse.values))
    return student
