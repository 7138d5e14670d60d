"""What each way to make a Linear costs the model's loss: a format of a budget, or a sparsity.

Two passes over the dense model. The first goes forward, as a pruning does: each block's Linears are
made in every way, by the calibration windows. The second goes backward through other windows (on
those that it was made by, a Linear of many inputs has a small part of its error) and asks what each
of the differences D [out, in] costs: with the gradients G_n [out, in] of the loss of window n,
whose tokens the model draws itself,

    loss = 1 / (2 tokens) sum_n sum_o (G_n[o] . D[o])^2 nats a token.

That is the second order of the divergence from the dense model, with the Fisher matrix of each
output's weights whole: the errors of one row belong together (rounding a column is made up for by
others), and an error that all tokens share, which attention passes on where it averages others out,
counts as such. Errors of different rows have no reason to agree and are taken as independent, which
spares the noise of their products.

Each way by its own difference: the loss is not linear in the squared error of a layer's outputs,
whatever made it (which HIGGS, arXiv 2411.17525, has of one kind of rounding). Of what would follow
from dense int4, all v_proj of SmolLM2-135M cost 0.6 in 3 bits and 0.45 with half of them gone, all
q_proj 1.3 and 1.5 times it. This sum mostly comes within a tenth of what running the model finds,
until half a nat is lost (`benchmarks/foretold.py`).
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TypeVar

import torch
from pydantic import TypeAdapter, ValidationError

from owl_deploy.compression.allocation.candidates import Trial, already, of_linear
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.measure import VALUES
from owl_deploy.compression.quantization.formats import Costs, Format, formats, packed_size
from owl_deploy.compression.quantization.latency import weight_size
from owl_deploy.compression.request import Request
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.data.text import token_digest
from owl_deploy.errors import OwlError
from owl_deploy.models import digests
from owl_deploy.models.blocks import Activations, check_finite
from owl_deploy.models.manifest import Cost
from owl_deploy.utils.artefact import read_object, write_json
from owl_deploy.utils.cache import cache_dir, cache_path
from owl_deploy.utils.progress import Advance, bar
from owl_deploy.utils.resume import ROUNDING

# Where later Linears make up for what was lost, some half of it is left, whichever Linear lost it;
# of what a v_proj loses so much of that: its errors are alike from token to token, and the o_proj
# meets them next. (Of SmolLM2-135M's in 3 bits: `benchmarks/made_up_for.py`.)
_LEFT_OF_VALUES = 0.45
_CACHE = "losses"  # the folder in the cache
_VERSION = 9  # of the measurement: what an earlier one found is not taken

T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """What one format costs: `loss` in nats a token, and `zeros` as a share, of which `gone` were
    zero before.
    """

    loss: float
    zeros: float
    gone: float


Losses = list[dict[str, list[Found]]]  # of each block, by the names of its pruned Linears


def measure_costs(request: Request, store: Store) -> Costs:
    """The costs of the formats that the method can make, of every pruned Linear."""
    ways = formats(request.settings.method)
    return costs(request, measure_losses(request, store, request.settings, ways))


def costs(request: Request, losses: Losses) -> Costs:
    """The costs by the `losses` of each format in turn; a v_proj's as they count (see above)."""
    known, group = formats(request.settings.method), request.settings.bits_group
    assert group is not None

    def cost(key: str, size: tuple[int, int], form: Format, one: Found) -> Cost:
        made_up_for = request.settings.asymmetric and key.endswith(VALUES)
        return Cost(
            bits=form.bits,
            sparsity=form.sparsity,
            bytes=packed_size(size, form, one.zeros, group),
            loss=one.loss * (_LEFT_OF_VALUES if made_up_for else 1),
        )

    found: Costs = []
    for index, block in enumerate(losses):
        sizes = {key: weight_size(one) for key, one in request.skeleton.linears(index).items()}
        found.append(
            {
                key: [
                    cost(key, sizes[key], form, one) for form, one in zip(known, own, strict=True)
                ]
                for key, own in block.items()
            }
        )
    return found


def measure_losses(
    request: Request, store: Store, settings: PruneSettings, ways: Sequence[Format]
) -> Losses:
    """What each of the `ways` to make a Linear costs, by the method of the `settings`.

    They depend neither on a budget nor on what is done with them: see `remembered`.
    """
    return remembered(
        request,
        settings,
        {"ways": [asdict(way) for way in ways]},
        TypeAdapter(Losses),
        lambda: Measuring(request, store, Maker(settings), ways).run(),
    )


def remembered(
    request: Request,
    settings: PruneSettings,
    asked: Mapping[str, object],
    kind: TypeAdapter[T],
    measure: Callable[[], T],
) -> T:
    """What the cache folder holds of what was `asked`, or `measure` finds, together; it is kept.

    For these weights and this text (wherever they lie), device and dtype, and what the `settings`
    make of a Linear; another machine, or other threads, may round sums otherwise.
    """
    decided = request.deciding() | {"measurement": _VERSION, **asked}
    decided[ROUNDING] = None  # the order of sums, which is not worth another hour
    decided["held_out"] = token_digest(request.measured_by)
    decided["calibration"] = (request.describe_calibration() or {}) | {"source": None}
    making = {"method", "structure", "skip", "bits_group", "options", "refit"}
    decided["settings"] = settings.model_dump(mode="json", include=making)
    decided["model"] = request.ranks.from_leader(request.checkpoint.content)
    name = f"{digests.of_json(decided)}.json"

    def kept() -> T | None:
        with contextlib.suppress(OwlError, OSError, ValidationError, KeyError):
            return kind.validate_python(read_object(cache_path() / _CACHE / name, "")["found"])
        return None

    found = request.ranks.from_leader(kept)
    if found is None:
        found = measure()
        if request.ranks.leads:
            with contextlib.suppress(OwlError, OSError):  # what cannot be kept costs time
                value = {"found": kind.dump_python(found, mode="json")}
                write_json(cache_dir(_CACHE) / name, value)
    return found


class Measuring:
    """The two passes; what each leaves of a block is a file of tensors.

    Forward: what `entered` the block in the windows that are held out, and of each Linear for every
    way the `difference` [ways, out, in], int8, in steps of `step` [ways, out], and the `zeros`
    [ways, 2]: after and before. Backward: the `gradient` by what entered the block, and of each
    Linear the `loss` [ways], with its `zeros`: all that is asked for in the end.

    Of several processes each runs its part of the windows that Linears are made by, and makes its
    part of the Linears; backward it runs its part of the other windows. The first writes the files,
    and all read them.
    """

    def __init__(
        self, request: Request, store: Store, maker: Maker, ways: Sequence[Format]
    ) -> None:
        self.request, self.store, self.skeleton = request, store, request.skeleton
        self.ranks = request.ranks
        self.names, self.linears = request.shape.names, request.shape.linears
        self.maker, self.ways = maker, ways
        self.held_out = request.measured_by

    def run(self) -> Losses:
        """For each block, by its pruned Linears' names, what each of the `ways` costs.

        Finished blocks are durable in the store, for a run that resumes.
        """
        self._backward(self._forward())
        return self.ranks.from_leader(lambda: [self._found(name) for name in self.names])

    def _forward(self) -> Activations:
        """What leaves the last block for the windows that are held out."""
        held_out = self.skeleton.embed(self.held_out, self.request.batch, self.store.folder)
        trial = Trial(self.request, self.store, "forward", self.maker, self.ways)
        trial.run("Measuring losses", held_out)
        return held_out

    def _backward(self, hidden: Activations) -> None:
        """Ask what each Linear's difference costs, from the last block to the first."""
        known = already(self.request, self.store, "backward")
        todo = [index for index, name in enumerate(self.names) if name not in known]
        if not todo:
            return
        own = self.ranks.part(torch.arange(len(self.held_out))).tolist()
        with bar("Measuring what counts", len(todo) * len(own)) as advance:
            if todo[-1] + 1 < len(self.names):  # those behind are finished
                gradient = self.store.measured(self.names[todo[-1] + 1], "backward")["gradient"]
            else:
                assert self.request.calibration is not None
                seed = self.request.calibration.seed
                gradient = self.skeleton.loss_gradients(self.held_out, hidden, seed)
            for index in reversed(todo):
                arguments = hidden.arguments[index]
                losses = self._backward_block(index, gradient, own, arguments, advance)
                whole = {"gradient": self._whole(gradient, own)}
                if self.ranks.leads:
                    self.store.keep(self.names[index], "backward", losses | whole)

    def _backward_block(
        self,
        index: int,
        gradient: torch.Tensor,
        places: Sequence[int],
        arguments: Mapping[str, object],
        advance: Advance,
    ) -> dict[str, torch.Tensor]:
        """The losses of one block; the `gradient` becomes that by what enters it.

        `places`: those of this process's windows.
        """
        name, keys = self.names[index], list(self.linears[index])
        forward = self.store.measured(name, "forward")
        device = self.skeleton.device
        kept = {key: of_linear(forward, key) for key in keys}
        losses = torch.zeros(len(keys), len(self.ways), dtype=torch.float64)
        with self.skeleton.loaded(name) as block:
            block.requires_grad_(False)
            weights = [self.skeleton.linears(index)[key].weight for key in keys]
            for weight in weights:
                weight.requires_grad_(True)
            for place in places:
                entered = forward["entered"][place].unsqueeze(0).to(device).requires_grad_()
                left = block(entered, **arguments)
                by_left = gradient[place].unsqueeze(0).to(device)
                by_entered, *by_weight = torch.autograd.grad(left, [entered, *weights], by_left)
                gradient[place] = by_entered[0].to(gradient.device)
                for at, key in enumerate(keys):
                    losses[at] += _squares(by_weight[at].float(), *kept[key])
                advance(1)
        check_finite(losses, f"the gradient in {name}")
        found = {f"{key}.zeros": forward[f"{key}.zeros"] for key in keys}
        shares = self.ranks.summed(losses) / (2 * self.held_out.numel())
        return found | {f"{key}.loss": own for key, own in zip(keys, shares, strict=True)}

    def _whole(self, gradient: torch.Tensor, places: Sequence[int]) -> torch.Tensor:
        """The `gradient` with every process's windows, for whoever goes on from it."""
        own = {str(place): gradient[place].cpu() for place in places}
        found = self.ranks.merged(own, self.skeleton.device)
        return torch.stack([found[str(place)] for place in range(len(gradient))])

    def _found(self, name: str) -> dict[str, list[Found]]:
        backward = self.store.measured(name, "backward")
        return {
            key: [
                Found(loss, *shares)
                for loss, shares in zip(
                    backward[f"{key}.loss"].tolist(), backward[f"{key}.zeros"].tolist(), strict=True
                )
            ]
            for key in self.linears[self.names.index(name)]
        }


def _squares(
    gradient: torch.Tensor, differences: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    """sum_o (G[o] . D[o])^2 [ways], for one window's gradient G [out, in]."""
    of_rows = torch.stack([(gradient * one.to(gradient.device)).sum(dim=1) for one in differences])
    return (of_rows.cpu() * steps).double().square().sum(dim=1)
