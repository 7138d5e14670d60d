"""What is known before the first block is pruned: how much of each Linear goes, and why."""

from collections.abc import Mapping, Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from owl_deploy.compression.allocation import fisher
from owl_deploy.compression.allocation.rules import ALLOCATIONS
from owl_deploy.compression.allocation.sensitivity import measure_costs
from owl_deploy.compression.allocation.sparsities import Shape, linear_sparsities
from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.compression.measure import measure
from owl_deploy.compression.quantization.budget import spend
from owl_deploy.compression.quantization.formats import Costs
from owl_deploy.compression.quantization.head import measure_head
from owl_deploy.compression.quantization.latency import Clock
from owl_deploy.compression.request import Request
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import PLAN, Store
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.manifest import Cost, Spent
from owl_deploy.utils.resume import damaged


class Plan(BaseModel):
    """The settings, and what follows from them.

    `sparsities`: for each block, its pruned Linears' by name; `bits` likewise, where a budget gave
    each its own. `outlier_ratios`: of each block, in percent, where the allocation looked at them;
    `costs`: what a budget chose from, and what is `spent` of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: PruneSettings
    sparsities: list[dict[str, float]]
    outlier_ratios: list[float | None] | None = None
    bits: list[dict[str, int]] | None = None
    costs: Costs | None = None
    spent: Spent | None = None

    def head(self, skeleton: Skeleton) -> str | None:
        """The output head's name, where it is pruned or rounded."""
        return skeleton.family.head if self.settings.changes_head else None

    @property
    def bits_of_head(self) -> int | None:
        """What the head is rounded to, where it is; else None."""
        return self.settings.head_bits or self.settings.bits

    def bits_of(self, index: int, linear: str) -> int | None:
        """What a pruned Linear of block `index` is rounded to, None where it is not."""
        return self.settings.bits if self.bits is None else self.bits[index][linear]

    def costs_of(self, index: int) -> Mapping[str, Sequence[Cost]]:
        """What a budget chose from for the Linears of block `index`; the head has none."""
        return {} if self.costs is None or index >= len(self.costs) else self.costs[index]

    def outlier_ratio(self, index: int) -> float | None:
        """That of block `index`, in percent, if it was measured; the head has none."""
        if self.outlier_ratios is None or index >= len(self.outlier_ratios):
            return None
        return self.outlier_ratios[index]


def resolve(request: Request, store: Store) -> tuple[Plan, InputStatistics | None]:
    """The plan, made now or by the run that this one resumes; `store` then holds it.

    Made now, with what a dense pass saw enter the first block, which need not be gathered again.
    """
    found = request.ranks.from_leader(lambda: store.read(PLAN))
    if found is not None:
        try:
            return Plan.model_validate(found), None
        except ValidationError as error:
            raise damaged(store.folder / PLAN) from error
    budget = request.settings.budget is not None
    plan, first = _within_budget(request, store) if budget else _by_rule(request, store)
    plan = request.ranks.from_leader(lambda: plan)  # other nodes' processors may round otherwise
    if request.ranks.leads:
        store.write(PLAN, plan.model_dump(mode="json", exclude_unset=True))
        store.forget_measured()
    return plan, first


def _by_rule(request: Request, store: Store) -> tuple[Plan, InputStatistics | None]:
    """The plan of an allocation; see `resolve`."""
    settings, measured = request.settings, None
    allocation = ALLOCATIONS[settings.allocation]
    if allocation.counts_outliers:
        measured = measure(request, store.folder)
    ratios = measured.outlier_ratios if measured else None
    if allocation.losses:
        sparsities = fisher.by_fisher(request, store)
    else:
        sparsities = linear_sparsities(settings, request.shape, ratios)
    if settings.layers is not None:  # the list has a mean, whatever the settings say
        settings = settings.model_copy(update={"sparsity": _removed(sparsities, request.shape)})
    plan = Plan(settings=settings, sparsities=sparsities, outlier_ratios=ratios)
    return plan, measured.first if measured else None


def _removed(sparsities: Sequence[Mapping[str, float]], shape: Shape) -> float:
    """The share of the weights that goes, of all that might."""
    gone = (
        sum(one * own[name] for name, one in asked.items())
        for own, asked in zip(shape.linears, sparsities, strict=True)
    )
    return sum(gone) / sum(shape.sizes)


def _spent(chosen: list[Cost], clock: Clock | None, head: Cost | None) -> Spent:
    size, loss = sum(one.bytes for one in chosen), sum(one.loss for one in chosen)
    loss += head.loss if head else 0.0
    if clock is None:
        return Spent(bytes=size, loss=loss)
    seconds = sum(one.microseconds or 0.0 for one in chosen) / 1e6
    return Spent(bytes=size, loss=loss, speed_up=clock.speed_up(seconds))


def _within_budget(request: Request, store: Store) -> tuple[Plan, None]:
    """The plan that loses least within the budget."""
    assert request.room is not None
    limit, clock, head = request.room.limit, request.room.clock, None
    costs = measure_costs(request, store)
    if request.room.head:
        *chosen, of_head = spend([*costs, {"": measure_head(request, store)}], limit)
        head = of_head[""]
    elif clock is None:
        chosen = spend(costs, limit)
    else:
        costs = clock.timed(costs, request.skeleton)
        chosen = spend(costs, 1e6 * limit, time=True)
    sparsities = [{name: one.sparsity for name, one in block.items()} for block in chosen]
    removed = _removed(sparsities, request.shape)
    each = [one for block in chosen for one in block.values()]
    found = {"sparsity": removed} | ({"head_bits": head.bits} if head and head.bits < 8 else {})
    plan = Plan(
        settings=request.settings.model_copy(update=found),
        sparsities=sparsities,
        bits=[{name: one.bits for name, one in block.items()} for block in chosen],
        costs=costs,
        spent=_spent(each, clock, head),
    )
    return plan, None
