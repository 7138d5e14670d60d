"""Frozen Linears that hold their weights in 16 bits and compute in float32.

Most checkpoints come in bfloat16. Where a processor is slow in it, a product widens its weight and
drops it again: half of the memory, for some twentieth of the time.
"""

from typing import Any

import torch
from torch import nn


class _Widened(torch.autograd.Function):
    """x @ weight.T, computed in x's dtype; differentiated by x."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives it no type
        x: torch.Tensor,
        weight: torch.Tensor,
    ) -> torch.Tensor:
        ctx.weight = weight  # not what it was widened to: that would stay until the backward pass
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor | None, None]:
        wanted = ctx.needs_input_grad[0]
        return gradient @ ctx.weight.to(gradient.dtype) if wanted else None, None


class HalfLinear(nn.Linear):
    """A frozen Linear whose weight [out, in] is bfloat16, for inputs in float32."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        rows, columns = weight.shape
        super().__init__(columns, rows, bias=False, device="meta")
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [..., in] to [..., out]."""
        y: torch.Tensor = _Widened.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


def halve(model: nn.Module) -> None:
    """Hold the frozen Linears of `model` in bfloat16 where that loses nothing.

    A weight that is an embedding's as well stays: whoever reads that one gets what it holds.
    """
    embedded = {id(one.weight) for one in model.modules() if isinstance(one, nn.Embedding)}
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or linear.weight.dtype != torch.float32:
            continue
        if id(linear.weight) in embedded or linear.weight.requires_grad:  # an adapter's does
            continue
        narrow = linear.weight.to(torch.bfloat16)
        if torch.equal(narrow.float(), linear.weight):
            model.set_submodule(name, HalfLinear(narrow, linear.bias))
