"""What is known before the first block is pruned: how much of each Linear goes, and why."""

from pydantic import BaseModel, ConfigDict

from owl_deploy.allocation import ALLOCATIONS
from owl_deploy.prune import tune
from owl_deploy.prune.calibrate import InputStatistics
from owl_deploy.prune.measure import measure
from owl_deploy.prune.request import Request
from owl_deploy.prune.sparsities import BlockStatistics, linear_sparsities
from owl_deploy.prune.store import Store
from owl_deploy.recipe import PruneSettings


class Plan(BaseModel):
    """The settings, tuned if that was asked for, and what follows from them.

    `sparsities`: for each block, its pruned Linears' by name. `statistics`: of each block, where
    the allocation or tuning looked at any; `trials`: what tuning compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: PruneSettings
    sparsities: list[dict[str, float]]
    statistics: list[BlockStatistics] | None = None
    trials: list[tune.Trial] = []

    def outlier_ratio(self, index: int) -> float | None:
        """That of block `index`, in percent, if it was measured; the head has none."""
        if self.statistics is None or index >= len(self.statistics):
            return None
        return self.statistics[index].outlier_ratios.get(self.settings.outlier_multiple)


def resolve(request: Request, store: Store) -> tuple[Plan, InputStatistics | None]:
    """The plan, made now or by the run that this one resumes; `store` then holds it.

    Made now, with what a dense pass saw enter the first block, which need not be gathered again.
    """
    found = request.ranks.from_leader(lambda: store.read("plan.json"))
    if found is not None:
        return Plan.model_validate(found), None
    settings, measured, trials = request.settings, None, []
    if request.tune:
        candidates = tune.candidates(settings)
        multiples = list(dict.fromkeys(one.outlier_multiple for one in candidates))
        measured = measure(request, multiples, store.folder)
        assert request.held_out is not None
        judge = tune.Judge(
            request.skeleton,
            request.shape,
            measured.norms,
            request.held_out,
            store.folder,
            request.ranks,
        )
        trials = judge.trials(candidates, measured.statistics)
        settings = tune.best(settings, trials)
    elif ALLOCATIONS[settings.allocation].statistic is not None:
        measured = measure(request, [settings.outlier_multiple], store.folder)
    statistics = measured.statistics if measured else None
    plan = Plan(
        settings=settings,
        sparsities=linear_sparsities(settings, request.shape, statistics),
        statistics=statistics,
        trials=trials,
    )
    plan = request.ranks.from_leader(lambda: plan)  # other nodes' processors may round otherwise
    if request.ranks.leads:
        store.write("plan.json", plan.model_dump(mode="json"))
    return plan, measured.first if measured else None
