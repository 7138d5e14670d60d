"""The halves of a block, each run by itself through the model's own forward pass.

A block adds to the stream of hidden states twice: what its attention makes, then what its MLP does.
The first half ends where the stream enters the norm between them; in the second the attention adds
nothing, so that what enters the block is what would enter that norm.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from owl_deploy.models.blocks import Seen
from owl_deploy.models.families import Family

Run = Callable[..., torch.Tensor]  # of hidden states [batch, length, width], and a block's others


@dataclass(frozen=True)
class Half:
    """One half of the blocks of a family, or the whole block, where it cannot be divided.

    `attention`: the attention's name in the block; `middle`: that of the norm between the halves.
    """

    name: Literal["attention", "mlp", "block"]
    attention: str = ""
    middle: str = ""

    def holds(self, linear: str) -> bool:
        """Whether the Linear of this name in the block belongs to the half."""
        inside = linear.startswith(f"{self.attention}.")
        return self.name == "block" or inside == (self.name == "attention")

    def of(self, block: nn.Module) -> Run:
        """What runs this half of `block`, called as the block is: the stream in, the stream out."""
        if self.name == "block":
            return block

        def attention(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401
            with ending_at(block.get_submodule(self.middle)) as seen:
                block(hidden, **arguments)
            return seen[0].view_as(hidden)  # OPT's norm is given all tokens in a row

        def mlp(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401
            real = block.get_submodule(self.attention)
            block.set_submodule(self.attention, _Nothing())
            try:
                output: torch.Tensor = block(hidden, **arguments)
            finally:
                block.set_submodule(self.attention, real)
            return output

        return attention if self.name == "attention" else mlp


def halves(family: Family) -> tuple[Half, ...]:
    """The halves of the family's blocks, in the order in which they run."""
    if family.halves is None:
        return (Half("block"),)
    return Half("attention", *family.halves), Half("mlp", *family.halves)


class _Nothing(nn.Module):
    """Stands in for an attention: adds nothing to the stream."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        **_: Any,  # noqa: ANN401
    ) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


@contextlib.contextmanager
def ending_at(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """End the forward pass where `module` would begin; yield the list that its input comes into."""
    seen: list[torch.Tensor] = []

    def stop(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.append(inputs[0])
        raise Seen

    handle = module.register_forward_pre_hook(stop)
    try:
        with contextlib.suppress(Seen):
            yield seen
    finally:
        handle.remove()
