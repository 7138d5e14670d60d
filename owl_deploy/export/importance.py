"""How much each input of a Linear counts when its weights are rounded: llama.cpp's importance
matrix, whose own program (llama-imatrix) needs the model in its format.
"""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import nn

from owl_deploy.blocks import Skeleton, check_finite
from owl_deploy.checkpoint import Checkpoint
from owl_deploy.export.source import Progress
from owl_deploy.hardware import find_batch, find_device, find_dtype


class _Squares:
    """Adds up the squares of what enters a Linear; a hook."""

    def __init__(self) -> None:
        self.sums: torch.Tensor | float = 0.0
        self.tokens = 0

    def __call__(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows = inputs[0].flatten(0, -2).float()
        self.sums = self.sums + rows.square().sum(dim=0).double()
        self.tokens += len(rows)

    def mean(self) -> torch.Tensor:
        """Of all tokens, [in], float32."""
        assert isinstance(self.sums, torch.Tensor)
        return (self.sums / self.tokens).float()


def importance(
    checkpoint: Checkpoint, windows: torch.Tensor, scratch: Path, progress: Progress
) -> dict[str, np.ndarray]:
    """The mean square of each input of the blocks' Linears, [in], by the names of their weights.

    `windows`: ids [samples, length], which go through the model a block at a time, in the dtype
    that is fast here; `scratch`: a folder for states that memory does not hold. Raises `BadInput`
    for inputs that are no numbers.
    """
    device = find_device("auto")
    skeleton = Skeleton(checkpoint, find_dtype("auto", checkpoint, device), device)
    found: dict[str, np.ndarray] = {}
    hidden = skeleton.embed(windows, find_batch(None, windows, skeleton), scratch)
    for index, name in enumerate(skeleton.names):
        progress(f"Seeing what enters the Linears (block {index + 1} of {len(skeleton.names)})")
        squares = {linear: _Squares() for linear in skeleton.linears(index)}
        with ExitStack() as stack:
            block = stack.enter_context(skeleton.loaded(name))
            for linear, hook in squares.items():
                handle = block.get_submodule(linear).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            hidden.through(block, index, lambda _: None, keep=True)
        for linear, hook in squares.items():
            check_finite(hook.mean(), f"what enters {name}.{linear}")
            found[f"{name}.{linear}.weight"] = hook.mean().cpu().numpy()
    return found
