"""A training of which each process holds its share: PyTorch's FSDP2, a block at a time.

What trains, the optimizer's state of it and all frozen weights are divided; a block is whole while
it computes. Each process writes its own part of a checkpoint, and reads it again.
"""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from owl_deploy.finetune.trainee import Trainee
from owl_deploy.models.sparse_linear import sparse_linears

_FOLDER = "shards"  # of a checkpoint of the Trainer's


def shard(model: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Together: keep this process's part of `model`, whose `blocks` are gathered one by one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for block in blocks:
        for _, sparse in sparse_linears(block):
            sparse.divide()
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextlib.contextmanager
def whole(block: nn.Module) -> Iterator[None]:
    """Together: have all of a block's parameters here, if it is sharded."""
    if not isinstance(block, FSDPModule):
        yield
        return
    block.unshard()
    try:
        yield
    finally:
        block.reshard()


def gather_trained(model: nn.Module) -> None:
    """Together: make what trained whole again, where little did; `model` then computes no more."""
    for module in model.modules():
        for name, one in module.named_parameters(recurse=False):
            if one.requires_grad and isinstance(one, DTensor):
                module.register_parameter(name, nn.Parameter(one.full_tensor()))


class Shards(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Each process's part of the checkpoints: the Trainer's leader would write its own alone."""

    def __init__(self, trainee: Trainee, optimizer: torch.optim.Optimizer) -> None:
        self._trainee, self._optimizer = trainee, optimizer
        optimizer.register_state_dict_post_hook(lambda _, found: found | {"state": {}})

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """Together: write."""
        save(self._state(), checkpoint_id=_folder(args, state))

    def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """Together: read, where the run goes on from a checkpoint."""
        if state.global_step:
            load(self._state(), checkpoint_id=_folder(args, state))

    def _state(self) -> dict[str, Any]:
        """What trains and Adam's state of it, the tensors themselves: reading writes into them."""
        found = {}
        for name, one in self._trainee.trained().items():
            moments = self._optimizer.state[one]
            if not moments:  # before the first step
                moments["step"] = torch.zeros((), device=one.device)
                moments |= {key: torch.zeros_like(one) for key in ("exp_avg", "exp_avg_sq")}
            found[name] = {"value": one.detach(), **moments}
        return found


def _folder(args: Any, state: Any) -> Path:  # noqa: ANN401 - transformers is untyped
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / _FOLDER
