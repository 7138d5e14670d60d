"""The pass in which every Linear is made in several ways, by what enters it.

What the ways cost (`sensitivity`) begins with it, by the dense model's inputs.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.layer import Maker, zeros
from owl_deploy.compression.measure import gather
from owl_deploy.compression.partition import divide
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.request import Request
from owl_deploy.compression.store import Store
from owl_deploy.models.blocks import Activations
from owl_deploy.utils.progress import Advance, bar


class Trial:
    """Makes each pruned Linear in each of the `ways`; what it finds is the `store`'s pass `name`.

    Found of each Linear is the `difference` [ways, out, in] from its weight, int8, in steps of
    `step` [ways, out], and its `zeros` [ways, 2]: after and before. Finished blocks are durable,
    for a run that resumes. Of several processes each runs its part of the windows and makes its
    part of the Linears; the first writes the files, and all read them.
    """

    def __init__(
        self, request: Request, store: Store, name: str, maker: Maker, ways: Sequence[Format]
    ) -> None:
        self.request, self.store, self.name = request, store, name
        self.maker, self.ways = maker, ways

    @torch.no_grad()
    def run(self, title: str, beside: Activations) -> None:
        """Make what the store lacks; `beside`, states of other windows, go through the dense model
        too, and what `entered` each block of them is kept as well.
        """
        request, names = self.request, self.request.shape.names
        known = already(request, self.store, self.name)
        whole = known.issuperset(names)  # then nothing asks for the calibration windows
        hidden = None
        if not whole:
            hidden = request.skeleton.embed(request.own_windows, request.batch, self.store.folder)
        steps = 0 if hidden is None else request.steps
        with bar(title, len(names) * (steps + len(beside.hidden))) as advance:
            for index, name in enumerate(names):
                entered = {"entered": beside.hidden.clone()}
                with request.skeleton.loaded(name) as block:
                    if hidden is not None and name not in known:
                        found = self._block(block, index, hidden, advance)
                        if request.ranks.leads:
                            self.store.keep(name, self.name, found | entered)
                    elif hidden is not None:
                        hidden.through(block, index, advance, keep=True)
                    beside.through(block, index, advance, keep=True)

    def _block(
        self, block: nn.Module, index: int, hidden: Activations, advance: Advance
    ) -> dict[str, torch.Tensor]:
        """What is found of block `index` by what `hidden` it is given, which then leaves it."""
        request, hessian = self.request, self.maker.settings.needs == "hessian"
        linears = request.skeleton.linears(index)
        statistics = gather(request, block, index, hidden, advance, keep=True, hessian=hessian)
        owner = divide(statistics, linears, request.ranks, hessian=hessian)
        found: dict[str, torch.Tensor] = {}
        for key in request.shape.linears[index]:
            if owner[key] == request.ranks.rank:
                dense = linears[key].weight.float()
                found |= self._linear(key, dense, Inputs(statistics, key))
        return request.ranks.merged(found, request.skeleton.device)

    def _linear(self, key: str, dense: torch.Tensor, inputs: Inputs) -> dict[str, torch.Tensor]:
        kept, shares, gone = [], [], zeros(dense)
        for way in self.ways:
            left = self.maker.tried(dense, inputs, way)
            shares.append([zeros(left), gone])
            kept.append(in_steps((left - dense).cpu()))
        difference, step = (torch.stack(own) for own in zip(*kept, strict=True))
        return {
            f"{key}.difference": difference,
            f"{key}.step": step,
            f"{key}.zeros": torch.tensor(shares, dtype=torch.float64),
        }


def in_steps(difference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A `difference` [out, in] as int8, in steps [out] of a 127th of each row's largest."""
    step = difference.abs().amax(dim=1) / 127
    return (difference / step.clamp(min=1e-30).unsqueeze(1)).round().to(torch.int8), step


def of_linear(found: Mapping[str, torch.Tensor], key: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The difference and its step of a Linear, of all that was `found` of its block."""
    return found[f"{key}.difference"], found[f"{key}.step"]


def already(request: Request, store: Store, name: str) -> set[str]:
    """The blocks that the pass `name` has measured; with it all processes see their files."""
    names = request.shape.names
    return request.ranks.from_leader(
        lambda: {one for one in names if store.has_measured(one, name)}
    )
