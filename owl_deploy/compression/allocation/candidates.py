"""The pass in which every Linear is made in several ways, by what enters it.

What the ways cost (`sensitivity`) begins with it, by the dense model's inputs. What a search puts
together (`judge`) does, too, by inputs that the blocks before give when they are pruned as the
search begins: a pruning goes so as well, and makes up for what was lost before.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from owl_deploy.compression.allocation.interpolate import in_steps, mixed, of_linear
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

    `divided`: the sparsities of each block's Linears that the blocks before have, `mixed` from the
    `ways`, which tell sparsities in order then; without it they are dense. Found of each Linear is
    the `difference` [ways, out, in] from its weight, int8, in steps of `step` [ways, out], and its
    `zeros` [ways, 2]: after and before. Finished blocks are durable, for a run that resumes. Of
    several processes each runs its part of the windows and makes its part of the Linears; the first
    writes the files, and all read them.
    """

    def __init__(
        self,
        request: Request,
        store: Store,
        name: str,
        maker: Maker,
        ways: Sequence[Format],
        divided: Sequence[Mapping[str, float]] | None = None,
    ) -> None:
        self.request, self.store, self.name = request, store, name
        self.maker, self.ways, self.divided = maker, ways, divided

    @torch.no_grad()
    def run(self, title: str, beside: Activations | None = None) -> None:
        """Make what the store lacks; with `beside`, states of other windows, which go through the
        dense model too, what `entered` each block of them is kept as well.
        """
        request, names = self.request, self.request.shape.names
        known = already(request, self.store, self.name)
        whole = known.issuperset(names)  # then nothing asks for the calibration windows
        if whole and not beside:
            return
        hidden = request.skeleton.embed(request.own_windows, request.batch, self.store.folder)
        passes = len(names)
        if self.divided is not None:  # each block but the last is run as it is pruned, too
            passes = len(names) - len(known) + len(names) - 1
        total = 0 if whole else passes * request.steps
        with bar(title, total + (len(names) * len(beside.hidden) if beside else 0)) as advance:
            for index, name in enumerate(names):
                entered = {"entered": beside.hidden.clone()} if beside else {}
                with request.skeleton.loaded(name) as block:
                    if name not in known:
                        found = self._block(block, index, hidden, advance)
                        if request.ranks.leads:
                            self.store.keep(name, self.name, found | entered)
                    elif self.divided is not None:
                        found = self.store.measured(name, self.name)
                    elif not whole:
                        hidden.through(block, index, advance, keep=True)
                    if beside:
                        beside.through(block, index, advance, keep=True)
                    if self.divided is not None and index + 1 < len(names):
                        self._prune(index, found, self.divided[index])
                        hidden.through(block, index, advance, keep=True)

    def _block(
        self, block: nn.Module, index: int, hidden: Activations, advance: Advance
    ) -> dict[str, torch.Tensor]:
        """What is found of block `index` by what `hidden` it is given, which leaves it if dense."""
        request, hessian = self.request, self.maker.settings.needs == "hessian"
        linears, keep = request.skeleton.linears(index), self.divided is None
        statistics = gather(request, block, index, hidden, advance, keep=keep, hessian=hessian)
        owner = divide(statistics, linears, request.ranks, hessian=hessian)
        found: dict[str, torch.Tensor] = {}
        for key in request.shape.linears[index]:
            if owner[key] == request.ranks.rank:
                dense = linears[key].weight.float()
                found |= self._linear(key, dense, Inputs(statistics, key))
        return request.ranks.merged(found, request.skeleton.device)

    def _prune(
        self, index: int, found: Mapping[str, torch.Tensor], sparsities: Mapping[str, float]
    ) -> None:
        """Give the Linears of block `index`, which is loaded, these `sparsities`."""
        linears, tried = self.request.skeleton.linears(index), [way.sparsity for way in self.ways]
        for key, sparsity in sparsities.items():
            weight, (difference, step) = linears[key].weight, of_linear(found, key)
            weight.copy_(mixed(weight.float(), difference, step, tried, sparsity))

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


def already(request: Request, store: Store, name: str) -> set[str]:
    """The blocks that the pass `name` has measured; with it all processes see their files."""
    names = request.shape.names
    return request.ranks.from_leader(
        lambda: {one for one in names if store.has_measured(one, name)}
    )
