"""How many samples go through a block of a model together."""

from collections.abc import Mapping
from typing import Any

import torch

from owl_deploy.models.blocks import Skeleton, free_on

_SCORE_BYTES = 13  # of a head and a pair of tokens: scores, their softmax, and which are masked
_TOKENS_A_BATCH = 1024  # on a CPU more is no faster, and leaves the caches


def _holds_scores(config: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention holds scores of all pairs of tokens: grouped, without a fused kernel.

    On CUDA those that PyTorch has for grouped heads take 16 bits only, and float16 from Ampere on.
    """
    heads = config.get("num_attention_heads")
    if device.type != "cuda" or config.get("num_key_value_heads", heads) == heads:
        return False
    older = torch.cuda.get_device_properties(device).major < 8
    return dtype == torch.float32 or (older and dtype == torch.float16)


def find_batch(given: int | None, windows: torch.Tensor | None, skeleton: Skeleton) -> int:
    """Samples that go through a block together: as many as a quarter of the free memory holds."""
    if given is not None:
        return given
    if windows is None:
        return 1
    config, length = skeleton.checkpoint.config, windows.shape[1]
    inner = config.get("intermediate_size") or config.get("ffn_dim") or 0  # OPT's name for it
    width = 8 * config.get("hidden_size", 0) + 4 * inner
    sample = length * width * skeleton.dtype.itemsize
    if _holds_scores(config, skeleton.device, skeleton.dtype):
        sample += _SCORE_BYTES * config["num_attention_heads"] * length**2
    free = free_on(skeleton.device)
    if skeleton.device.type == "cpu":
        free = min(free, 4 * _TOKENS_A_BATCH * width * skeleton.dtype.itemsize)
    return max(1, min(len(windows), int(free // 4 // max(sample, 1))))
