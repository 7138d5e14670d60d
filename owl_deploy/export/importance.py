"""How much each input of a Linear counts when its weights are rounded: llama.cpp's importance
matrix, whose own program (llama-imatrix) needs the model in its format.
"""

from pathlib import Path

import numpy as np
import torch

from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.export.source import Progress
from owl_deploy.models.batch import find_batch
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import Checkpoint, stored_dtype
from owl_deploy.utils.hardware import find_device, find_dtype


def importance(
    checkpoint: Checkpoint, windows: torch.Tensor, scratch: Path, progress: Progress
) -> dict[str, np.ndarray]:
    """The mean square of each input of the blocks' Linears, [in], by the names of their weights.

    `windows`: ids [samples, length], which go through the model a block at a time, in the dtype
    that is fast here; `scratch`: a folder for states that memory does not hold. Raises `BadInput`
    for inputs that are no numbers.
    """
    device = find_device("auto")
    skeleton = Skeleton(
        checkpoint, find_dtype("auto", stored_dtype(checkpoint.config), device), device
    )
    found: dict[str, np.ndarray] = {}
    hidden = skeleton.embed(windows, find_batch(None, windows, skeleton), scratch)
    for index, name in enumerate(skeleton.names):
        progress(f"Seeing what enters the Linears (block {index + 1} of {len(skeleton.names)})")
        statistics = InputStatistics(skeleton.linears(index), windows.numel(), hessian=False)
        with skeleton.loaded(name) as block, statistics.gathering():
            hidden.through(block, index, lambda _: None, keep=True)
        for linear in skeleton.linears(index):
            found[f"{name}.{linear}.weight"] = statistics.norm(linear).square().cpu().numpy()
    return found
