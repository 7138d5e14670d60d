"""Linears whose non-zero weights alone are parameters, so that a mask cannot be lost.

Gradients, and whatever an optimizer keeps, then exist for the survivors only: training a layer
takes memory for its dense weight in the computing dtype and for 16 bytes a survivor (the float32
weight, its gradient, Adam's two moments), and 4 bytes for where it is.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from owl_deploy.models.rounded_grid import limits

# Share of zeros from which a model of unknown making was pruned: normal weights that are rounded to
# 4 bits have up to 0.16.
SPARSE_FROM = 0.2
_WITHIN = 0.49  # of a grid's step: what is moved so far still rounds to where it was


@dataclass(frozen=True)
class LinearGrid:
    """What a weight was rounded to: integers of `bits` bits times `scales` [out, groups].

    `group` columns of a row share a scale. `whole`: whether nothing was removed before, so that
    zero is an integer like all others, and no hole in a mask.
    """

    bits: int
    group: int
    scales: torch.Tensor
    whole: bool = False

    def at(self, positions: torch.Tensor, columns: int) -> torch.Tensor:
        """The scales at `positions` of a flat weight with so many columns, float32."""
        rows, places = positions // columns, positions % columns
        return self.scales.to(positions.device).float()[rows, places // self.group]


class _Product(torch.autograd.Function):
    """x @ weight.T with the weight of `layer`, differentiated by x and by its `values`."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch gives it no type
        x: torch.Tensor,
        _values: torch.Tensor,
        layer: "SparseLinear",
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.layer = layer
        return nn.functional.linear(x, layer.whole())

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        gradient: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        by_x = gradient @ ctx.layer.whole() if ctx.needs_input_grad[0] else None
        dense = gradient.flatten(0, -2).T @ x.flatten(0, -2)  # [out, in], dropped at once
        return by_x, dense.flatten().index_select(0, ctx.layer.positions).float(), None


class SparseLinear(nn.Module):
    """A Linear of which only the weights that are not zero are parameters.

    `values`: those weights, float32 [survivors], row by row. `positions`: int32 [survivors], where
    they stand in the flat weight. `weight`: [out, in], what inputs are multiplied by, in the
    computing dtype; `refresh` brings it up to date after a step. With a `grid` the weight is what
    `values` are rounded to, and their gradients are those of what they are rounded to (the
    straight-through estimator, arXiv 1308.3432); if that is `whole`, all weights are parameters,
    and any may become zero. `weight` is None after `divide`.
    """

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype, grid: LinearGrid | None = None
    ) -> None:
        super().__init__()
        dense = linear.weight.detach()
        self.masked = grid is None or not grid.whole
        positions = torch.arange(dense.numel(), device=dense.device)
        if self.masked:
            positions = dense.flatten().nonzero().flatten()
        self.values = nn.Parameter(dense.flatten()[positions].float())
        self.register_buffer("positions", positions.int())
        self.register_buffer("weight", dense.to(dtype, copy=True))
        scales = None if grid is None else grid.at(positions, dense.shape[1])
        self.register_buffer("scales", scales)
        self.limits = (0, 0) if grid is None else limits(grid.bits)
        self.shape, self.dtype = dense.shape, dtype
        self.positions: torch.Tensor
        self.scales: torch.Tensor | None
        self.weight: torch.Tensor | None
        self.bias = linear.bias
        if grid is not None:  # a checkpoint in 16 bits has 8-bit integers only nearly
            self.values.data.copy_(self._rounded())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., in] to [..., out], in the computing dtype."""
        y: torch.Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.to(self.dtype), self.values, self
        )
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @torch.no_grad()
    def lean(self, dense: torch.Tensor) -> None:
        """Move `values` towards `dense` [out, in] as far as they still round to what they are.

        In the middle between two steps of their grid they would hardly ever leave it; so those
        that were rounded furthest change first.
        """
        if self.scales is not None:
            wanted = dense.flatten().index_select(0, self.positions) - self.values
            reach = _WITHIN * self.scales.abs()
            self.values.add_(wanted.clamp(-reach, reach))

    def divide(self) -> None:
        """Hold parameters only, which FSDP can divide over processes, as it does no buffer.

        The weight is then made for each product, from what FSDP has gathered.
        """
        self.weight = None
        for name in ("positions", "scales"):
            tensor = self._buffers.pop(name)
            kept = None if tensor is None else nn.Parameter(tensor, requires_grad=False)
            self.register_parameter(name, kept)

    def whole(self) -> torch.Tensor:
        """The weight [out, in] that inputs are multiplied by."""
        return self._filled(self._rounded(), self.dtype) if self.weight is None else self.weight

    @torch.no_grad()
    def refresh(self) -> None:
        """Put `values` into the weight that inputs are multiplied by."""
        if self.weight is not None:
            flat = self.weight.view(-1)
            flat.index_copy_(0, self.positions.long(), self._rounded().to(flat.dtype))

    def _filled(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """A weight [out, in] with `values` for its survivors."""
        weight = torch.zeros(self.shape, dtype=dtype, device=values.device)
        weight.view(-1).index_copy_(0, self.positions.long(), values.to(dtype))
        return weight

    def _rounded(self) -> torch.Tensor:
        """The survivors as they count: on their grid, if they have one, and no zero of a mask."""
        values = self.values.detach()
        if self.scales is None:
            return values
        steps = values / self.scales
        integers = steps.round().clamp(*self.limits)
        if self.masked:
            one = torch.ones_like(values).copysign(steps)
            integers = torch.where(integers == 0, one, integers)
        return integers * self.scales

    def dense(self, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """The whole weight [out, in] in `dtype`, and how many survivors were kept off zero."""
        values = self._rounded()
        if not self.masked:
            return self._filled(values, dtype), 0
        kept, count = nonzero(values.to(dtype), values)
        return self._filled(kept, dtype), count


def nonzero(values: torch.Tensor, signs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """`values` with each 0 replaced by its dtype's smallest normal number, and how many there were.

    A survivor that rounds to 0 would be one more hole in the mask. `signs`: what had been rounded.
    """
    lost = values == 0
    tiny = torch.full_like(values, torch.finfo(values.dtype).tiny)
    return torch.where(lost, tiny.copysign(signs.to(values.dtype)), values), int(lost.sum())


def sparsify(
    block: nn.Module, dtype: torch.dtype, grids: Mapping[str, LinearGrid] = MappingProxyType({})
) -> None:
    """Replace every Linear of `block`; its other parameters (norms, biases) train whole.

    `grids`: of the Linears that are rounded, by their names. What trains is float32 then, whatever
    it was.
    """
    for name, linear in list(block.named_modules()):
        if isinstance(linear, nn.Linear):
            block.set_submodule(name, SparseLinear(linear, dtype, grids.get(name)))
    for parameter in block.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)


def sparse_linears(module: nn.Module) -> Iterator[tuple[str, SparseLinear]]:
    """The replaced Linears in `module`, with their names."""
    for name, part in module.named_modules():
        if isinstance(part, SparseLinear):
            yield name, part


def groups(parameters: Iterable[nn.Parameter], rate: float) -> list[dict[str, Any]]:
    """An optimizer's groups, one a tensor, each with `rate` times its root mean square as its own.

    Adam's steps are absolute, and weights of SmolLM2-135M are twelve times as large as those of
    Qwen2.5-1.5B. What is all zeros, as a bias may be, has the least of the others' rates.
    """
    sizes = [(one, _root_mean_square(one)) for one in parameters]
    least = min((size for _, size in sizes if size), default=0.0)
    return [{"params": [one], "lr": rate * (size or least)} for one, size in sizes]


def _root_mean_square(parameter: nn.Parameter) -> float:
    total = parameter.detach().square().sum()
    if isinstance(total, DTensor):  # of this process's part
        total = total.full_tensor()
    return float((total / max(parameter.numel(), 1)).sqrt())


def finished(
    block: nn.Module, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, torch.Tensor], int]:
    """The tensors of a trained block, in `dtypes` (by name), and how many were kept off zero."""
    dense = {f"{name}.weight": sparse for name, sparse in sparse_linears(block)}
    tensors, kept = {}, 0
    for name, dtype in dtypes.items():
        if name in dense:
            tensors[name], count = dense[name].dense(dtype)
            kept += count
        else:
            tensors[name] = block.get_parameter(name).detach().to(dtype)
    return tensors, kept


def freeze(block: nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Give `block` plain Linears again, and `tensors`, in `dtype`; nothing in it trains."""
    for name, part in list(block.named_modules()):
        if isinstance(part, SparseLinear):
            rows, columns = part.shape
        elif isinstance(part, nn.Linear):  # of a kind of its own, perhaps, such as one in 16 bits
            rows, columns = part.weight.shape
        else:
            continue
        linear = nn.Linear(columns, rows, bias=part.bias is not None, device="meta")
        block.set_submodule(name, linear)
    block.load_state_dict({name: one.to(dtype) for name, one in tensors.items()}, assign=True)
    block.requires_grad_(False)
