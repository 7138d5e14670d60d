"""The pass that prunes: block after block, each on what the pruned ones before it let through.

One block is on the device at a time and is pruned in one go; in an asymmetric pruning beside its
dense twin, half by half, and each in several stages. Of several processes each runs its part of the
windows through it and prunes its part of the Linears (`ranks`); the first writes.
"""

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from owl_deploy.compression import gptaq
from owl_deploy.compression.gptaq import Twins
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.layer import Maker, zeros
from owl_deploy.compression.measure import empty_statistics, gather, gather_head
from owl_deploy.compression.partition import divide, owners
from owl_deploy.compression.plan import Plan
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.reconstruct import Reconstruction, Streams
from owl_deploy.compression.request import Request
from owl_deploy.compression.store import Store
from owl_deploy.compression.sublayers import Half, halves
from owl_deploy.errors import BadInput
from owl_deploy.models.blocks import Activations
from owl_deploy.models.manifest import CheckpointManifest, TrainedHalf, read_manifest
from owl_deploy.models.rounded_grid import SCALE
from owl_deploy.models.sparse_linear import SPARSE_FROM, LinearGrid
from owl_deploy.utils.hardware import name_of
from owl_deploy.utils.progress import Advance, bar


@dataclass(frozen=True)
class Part:
    """A finished block, or the head: its tensors, by their names in it, in the checkpoint's dtype.

    `linears`: those that may be pruned, name to number of weights; the head is one itself, called
    "". `sparsities`: what was asked of them; `bits`: what they are rounded to, if they are.
    `halves`: those that were reconstructed, by name. `whole`: the Linears that were rounded, and of
    which nothing was removed.
    """

    name: str
    linears: Mapping[str, int]
    sparsities: Mapping[str, float]
    bits: Mapping[str, int | None]
    tensors: Mapping[str, torch.Tensor]
    halves: Mapping[str, TrainedHalf] = field(default_factory=dict)
    whole: Collection[str] = ()

    def weight(self, linear: str) -> torch.Tensor:
        """The weight of one of its Linears."""
        return self.tensors[f"{linear}.weight" if linear else "weight"]


class Walk:
    """One pruning pass; `store` holds every part of it when it has ended.

    `first`: what enters the first block, if a pass before has gathered it.
    """

    def __init__(
        self, request: Request, plan: Plan, store: Store, first: InputStatistics | None
    ) -> None:
        self.request, self.plan, self.store, self.first = request, plan, store, first
        self.skeleton, self.names, self.ranks = request.skeleton, request.shape.names, request.ranks
        self.maker, self.needs = Maker(plan.settings), plan.settings.needs
        self.head = plan.head(self.skeleton)
        before = read_manifest(request.checkpoint.folder, CheckpointManifest)
        self.linears_before = before.linears if before else {}
        self.hidden: Activations | None = None
        self.streams: Streams | None = None  # those of an asymmetric pruning
        self.stages: list[list[str]] = []  # of a block, then
        self.halves: tuple[Half, ...] = (Half("block"),)  # pruned and passed one after the other
        self.reconstruction: Reconstruction | None = None
        self.advance: Advance = lambda _: None

    def parts(self) -> Iterator[Part]:
        """Every block in model order, then the head if it is pruned; made now where not yet."""
        head = self.head
        names = [*self.names, *([head] if head else [])]
        held = self.ranks.from_leader(lambda: set(filter(self.store.holds, names)))
        if len(held) < len(names):
            self._embed()
        passes = 2 * len(names) - (self.hidden is not None)
        if self.streams:
            # Two streams through every stage, and then on; none goes on from the last half.
            passes = 2 * (len(self.names) * (len(self.stages) + len(self.halves)) - 1 + bool(head))
            if self.reconstruction:  # which brings both on, and counts as one
                passes = len(self.names) * (2 * len(self.stages) + len(self.halves)) + bool(head)
        if self.reconstruction:
            passes += len(self.names) * self.reconstruction.passes
        with bar("Pruning", passes * self.request.steps) as self.advance:
            for index, name in enumerate(self.names):
                whole = self._whole(index)
                if name in held:
                    weights = self.store.load(name)
                    self._replay(index, weights)
                else:
                    weights = self._prune_block(index, whole)
                    self._save(name, weights)
                linears, asked = self.request.shape.linears[index], self.plan.sparsities[index]
                bits = {key: self.plan.bits_of(index, key) for key in linears}
                outcomes = self.store.halves(name)
                yield Part(name, linears, asked, bits, weights, outcomes, whole)
            if head:
                yield self._finish_head(head, stored=head in held)

    def _embed(self) -> None:
        """Gather what enters the first block, if anything looks at it."""
        request, epochs = self.request, self.request.settings.reconstruct
        if epochs:
            assert request.windows is not None
            self.reconstruction = Reconstruction(
                self.skeleton,
                (request.windows, request.reconstructed_by),
                batch=request.batch,
                epochs=epochs,
                dtype=request.training_dtype,
                scratch=self.store.folder,
            )
            self.hidden = self.reconstruction.training.pruned
        elif self.needs != "nothing":
            assert request.windows is not None
            self.hidden = self.skeleton.embed(request.own_windows, request.batch, self.store.folder)
        if request.settings.asymmetric:
            self._twin()

    def _twin(self) -> None:
        """Make the dense model's stream beside the pruned one's, and see how blocks run."""
        assert self.hidden is not None
        self.first = None  # what it was crossed with is not known
        if self.reconstruction:
            self.streams = self.reconstruction.training
        else:
            self.streams = Streams(self.hidden, self.hidden.copy(self.store.folder))
        self.halves = halves(self.skeleton.family)
        with self.skeleton.loaded(self.names[0]) as block:
            linears = self.skeleton.linears(0)
            self.stages = gptaq.stages(block, linears, self.hidden, 0)

    @torch.no_grad()
    def _prune_block(self, index: int, whole: set[str]) -> dict[str, torch.Tensor]:
        name = self.names[index]
        weights = self.request.checkpoint.read_module(name)
        linears = self.skeleton.linears(index)
        with self.skeleton.loaded(name, weights) as block:
            twins = Twins(block, copy.deepcopy(block) if self.streams else block)
            outcomes: dict[str, TrainedHalf] = {}
            for half in self.halves:
                for stage, statistics in self._inputs(half, twins, index):
                    weights |= self._divided(weights, statistics, index, stage, whole)
                    for key in stage:
                        linears[key].weight.copy_(weights[f"{key}.weight"])
                if self.reconstruction:
                    weights, own = self._reconstructed(
                        self.reconstruction, half, index, weights, whole
                    )
                    outcomes |= own
                    self.advance(self.request.steps)
                else:
                    self._pass_on(half, twins, index, dense=not self._is_run(half, index))
        if self.reconstruction:
            self.store.keep_halves(name, outcomes)
        return weights

    def _inputs(
        self, half: Half, twins: Twins, index: int
    ) -> Iterator[tuple[list[str], InputStatistics | None]]:
        """The Linears of a `half` of block `index` by stages, with what enters them once those
        before are done.

        Not asymmetric, they are one stage.
        """
        asked = list(self.plan.sparsities[index])
        if self.streams is None:
            yield asked, self._block_inputs(twins.pruned, index)
            return
        stages = self._stages_of(half)
        for stage in stages:
            own = [key for key in stage if key in asked]
            if not own:
                self.advance(2 * self.request.steps)
                continue
            found = empty_statistics(self.request, index, own, hessian=True)
            gptaq.gather(
                found,
                own,
                twins,
                index,
                self.streams,
                self.skeleton.family,
                self.advance,
                keep=stage is stages[-1] and self._is_run(half, index),
            )
            yield own, found

    def _is_run(self, half: Half, index: int) -> bool:
        """Whether the dense `half` of block `index` is run to its end for what its last Linears are
        to make up for, which brings its stream on.
        """
        if self.streams is None or self.reconstruction:
            return False
        asked, family = self.plan.sparsities[index], self.skeleton.family
        last = self._stages_of(half)[-1]
        return any(key in asked and gptaq.writes(family, key) for key in last)

    def _stages_of(self, half: Half) -> list[list[str]]:
        return [stage for stage in self.stages if half.holds(stage[0])]

    def _reconstructed(
        self,
        reconstruction: Reconstruction,
        half: Half,
        index: int,
        made: dict[str, torch.Tensor],
        whole: set[str],
    ) -> tuple[dict[str, torch.Tensor], dict[str, TrainedHalf]]:
        """What `made` of block `index`, its tensors and scales, becomes by training a `half`, or
        its halves; and what came of each.
        """
        scales = {key: one for key, one in made.items() if key.endswith(f".{SCALE}")}
        weights = {key: one for key, one in made.items() if key not in scales}
        grids, changed = {}, []
        asked = self.plan.sparsities[index].items()
        for key, sparsity in ((key, one) for key, one in asked if half.holds(key)):
            bits, group = self.plan.bits_of(index, key), self.plan.settings.bits_group
            if bits and group:
                grids[key] = LinearGrid(bits, group, scales[f"{key}.{SCALE}"], key in whole)
            if bits or sparsity:
                changed.append(key)
        parts = None if half.name == "block" else (half,)
        weights, outcomes = reconstruction.block(
            index, weights, changed, self.advance, grids, parts
        )
        return weights | scales, outcomes

    def _whole(self, index: int) -> set[str]:
        """The Linears of block `index` that are rounded, and of which nothing is removed, or was.

        Where a model was pruned before, its zeros stay; those of rounding alone are integers.
        """
        asked = self.plan.sparsities[index].items()
        rounded = {key for key, one in asked if self.plan.bits_of(index, key) and not one}
        if not rounded:
            return set()
        name = self.names[index]
        before = self.request.checkpoint.read_module(name)

        def is_whole(key: str) -> bool:
            told = self.linears_before.get(f"{name}.{key}")
            if told and (told.whole or told.sparsity):
                return bool(told.whole)
            return zeros(before[f"{key}.weight"]) < SPARSE_FROM

        return set(filter(is_whole, rounded))

    def _divided(
        self,
        dense: dict[str, torch.Tensor],
        statistics: InputStatistics | None,
        index: int,
        stage: list[str],
        whole: set[str],
    ) -> dict[str, torch.Tensor]:
        """What becomes of the `dense` Linears of a `stage`: each rank prunes its own of them.

        Those that have one input stay together: they share what is made of its statistic.
        """
        asked = {key: self.plan.sparsities[index][key] for key in stage}
        linears, hessian = self.skeleton.linears(index), self.needs == "hessian"
        if statistics:
            owner = divide(statistics, linears, self.ranks, hessian=hessian)
        else:
            owner = owners([[key] for key in asked], linears, self.ranks.size, hessian=hessian)
        own: dict[str, torch.Tensor] = {}
        for key, sparsity in asked.items():
            if owner[key] == self.ranks.rank:
                form = Format(self.plan.bits_of(index, key), sparsity)
                inputs = Inputs(statistics, key)
                weight = dense[f"{key}.weight"]
                made = self._made(weight, inputs, form, linear=key, whole=key in whole)
                own |= {f"{key}.{name}": tensor for name, tensor in made.items()}
        return self.ranks.merged(own, self.skeleton.device)

    def _save(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Keep what is made, all of it numbers: what makes up for others may outgrow 16 bits."""
        for key, tensor in weights.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise BadInput(
                    f"{key} in {name} becomes larger than {name_of(tensor.dtype)} holds.",
                    "Convert the model to bfloat16 or float32 first.",
                )
        if self.ranks.leads:
            self.store.save(name, weights)

    def _block_inputs(self, block: nn.Module, index: int) -> InputStatistics | None:
        if self.hidden is None:
            return None
        if self.needs == "nothing":
            self.advance(self.request.steps)
            return None
        if index == 0 and self.first is not None:
            self.advance(self.request.steps)
            first, self.first = self.first, None  # with all that is made of it, for one block
            return first
        return gather(
            self.request,
            block,
            index,
            self.hidden,
            self.advance,
            keep=False,
            hessian=self.needs == "hessian",
        )

    def _made(
        self,
        dense: torch.Tensor,
        inputs: Inputs,
        form: Format,
        *,
        linear: str = "",
        whole: bool = False,
    ) -> dict[str, torch.Tensor]:
        """The "weight" made of `dense` [out, in], where that lies and in its dtype.

        Where it is rounded, with its scales, [out, groups]: "weight_scale". `linear`: its name in
        the block; the head has none.
        """
        weight = dense.to(self.skeleton.device, torch.float32)
        if self.streams and linear:
            writes = gptaq.writes(self.skeleton.family, linear)
            keep_zeros = not whole and self._keeps_zeros(weight, form)
            weight = gptaq.aimed(weight, inputs, writes=writes, keep_zeros=keep_zeros)
        made = self.maker.make(weight, inputs, form, whole=whole, dtype=dense.dtype)
        found = {"weight": made.weight.to(dense.device, dense.dtype)}
        return found if made.scales is None else found | {SCALE: made.scales.to(dense.device)}

    def _keeps_zeros(self, weight: torch.Tensor, form: Format) -> bool:
        """Whether what is zero in `weight` stays so, though others make up for what was lost: by
        the method, or since a pruning before has put it there, and nothing more is removed or the
        budget counts on it.
        """
        if self.maker.keeps_zeros:
            return True
        counted = self.plan.costs is not None or (form.bits is not None and not form.sparsity)
        return counted and zeros(weight) >= SPARSE_FROM

    @torch.no_grad()
    def _finish_head(self, name: str, *, stored: bool) -> Part:
        """Prune the head, by what the pruned blocks let enter it, unless it is stored."""
        sparsity, bits = self.plan.settings.head_sparsity or 0.0, self.plan.bits_of_head
        if stored:
            weights = self.store.load(name)
        else:
            statistics = None
            if self.hidden is not None and self.needs != "nothing":
                hessian = self.needs == "hessian"
                statistics = gather_head(self.request, self.hidden, self.advance, hessian=hessian)
            dense = self.request.checkpoint.read(self.skeleton.head_weights[0])
            own = {}
            if self.ranks.leads:
                own = self._made(dense, Inputs(statistics, name), Format(bits, sparsity))
            weights = self.ranks.merged(own, self.skeleton.device)
            self._save(name, weights)
        if self.hidden is None or self.needs == "nothing":
            self.advance(2 * self.request.steps)
        return Part(name, {"": weights["weight"].numel()}, {"": sparsity}, {"": bits}, weights)

    def _replay(self, index: int, weights: dict[str, torch.Tensor]) -> None:
        """Bring the hidden states past a block that an earlier run has finished."""
        with self.skeleton.loaded(self.names[index], weights) as block, torch.no_grad():
            if self.hidden is not None:
                self.advance(max(1, 2 * len(self.stages)) * self.request.steps)
            if self.reconstruction:
                self.reconstruction.replay(index, weights)
                self.advance((len(self.halves) + self.reconstruction.passes) * self.request.steps)
            else:
                dense = copy.deepcopy(block) if self.streams else block
                if self.streams:
                    dense.load_state_dict(self.request.checkpoint.read_module(self.names[index]))
                for half in self.halves:
                    self._pass_on(half, Twins(block, dense), index)

    def _pass_on(self, half: Half, twins: Twins, index: int, *, dense: bool = True) -> None:
        """Run a `half` of the pruned block, for what enters the next; after the last only a head
        may look. And of the `dense` twin, where there is one.
        """
        if self.hidden is None:
            self.advance(2 * self.request.steps)
            return
        last = index + 1 == len(self.names) and half is self.halves[-1]
        if not last or self.head:
            self.hidden.through(half.of(twins.pruned), index, self.advance, keep=True)
        if self.streams and not last:
            if dense:
                self.streams.dense.through(half.of(twins.dense), index, self.advance, keep=True)
            else:
                self.advance(self.request.steps)
