"""From settings and a model to one sparsity for every Linear that is pruned."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from owl_deploy.compression.allocation.rules import ALLOCATIONS, hold_mean, in_groups, most_removed
from owl_deploy.compression.settings import PruneSettings, is_named
from owl_deploy.errors import BadInput
from owl_deploy.models.families import heads

T = TypeVar("T")


@dataclass(frozen=True)
class Shape:
    """The pruned Linears of a model: for each block, name and number of weights, in model order."""

    names: Sequence[str]
    linears: Sequence[Mapping[str, int]]

    @property
    def sizes(self) -> list[int]:
        """The pruned weights of each block."""
        return [sum(linears.values()) for linears in self.linears]

    @property
    def linear_sizes(self) -> list[int]:
        """The weights of each Linear."""
        return [size for linears in self.linears for size in linears.values()]

    def by_block(self, each: Iterable[T]) -> list[dict[str, T]]:
        """For each block, its Linears' values by name, of one for `each` Linear in model order."""
        values = iter(each)
        return [{name: next(values) for name in own} for own in self.linears]


# Of each block, in percent; None of a block of which nothing is pruned.
OutlierRatios = Sequence[float | None]


def select(
    names: Sequence[str], linears: Sequence[Mapping[str, int]], skip: Sequence[str]
) -> Shape:
    """The Linears to prune: all of `linears` (by block) but those whose name ends in one of `skip`.

    Raises `BadInput` for a name in `skip` that no Linear has, or when nothing is left.
    """
    full = [f"{block}.{name}" for block, own in zip(names, linears, strict=True) for name in own]
    for ending in skip:
        if not any(is_named(name, ending) for name in full) and ending not in heads():
            known = sorted({name.rpartition(".")[2] for name in full})
            raise BadInput(f"No layer is called {ending!r}.", f"There are: {', '.join(known)}.")
    kept = [
        {
            name: size
            for name, size in own.items()
            if not any(is_named(f"{block}.{name}", ending) for ending in skip)
        }
        for block, own in zip(names, linears, strict=True)
    ]
    if not any(kept):
        raise BadInput("With these --skip nothing is left to prune.")
    return Shape(names, kept)


def linear_sparsities(
    settings: PruneSettings, shape: Shape, ratios: OutlierRatios | None
) -> list[dict[str, float]]:
    """For each block, its pruned Linears' sparsities by name: the explicit list, or by the rule.

    Where what is made is rounded, a Linear that the list leaves out is there as well, and nothing
    of it is removed. `ratios`: of outliers, where the rule looks at them.
    """
    if settings.layers is not None:
        return _explicit(settings, shape, settings.layers)
    sizes = [sum(own.values()) for own in shape.linears if own]
    values = [ratio for ratio in ratios or () if ratio is not None]
    by_block = iter(_by_rule(settings, sizes, values))
    return [dict.fromkeys(own, next(by_block)) if own else {} for own in shape.linears]


def _by_rule(settings: PruneSettings, sizes: Sequence[int], ratios: Sequence[float]) -> list[float]:
    """The sparsities of blocks of these `sizes`, by the rule of the allocation.

    No block is emptied (see `most_removed`). Of N:M, every N is 1 at least, and M - 1 at most.
    """
    rule = ALLOCATIONS[settings.allocation].rule
    assert rule is not None
    found = rule(settings.sparsity, sizes, ratios, settings.spread)
    least, most = 0.0, most_removed(settings.sparsity)
    if settings.group is not None:
        least, most = 1 / settings.group[1], 1 - 1 / settings.group[1]
    if min(found) < least or max(found) > most:
        found = hold_mean(found, sizes, settings.sparsity, most, least)
    if settings.group is not None:
        found = in_groups(found, sizes, settings.group[1])
    return found


def _explicit(
    settings: PruneSettings, shape: Shape, layers: Mapping[str, float]
) -> list[dict[str, float]]:
    """The sparsities of the settings' list, `layers`.

    What the list names and `skip` does as well is in no shape, and stays dense.
    """
    used: set[str] = set()
    found: list[dict[str, float]] = []
    for block, own in zip(shape.names, shape.linears, strict=True):
        found.append({})
        for name in own:
            for target in (f"{block}.{name}", block):
                if target in layers:
                    used.add(target)
                    found[-1][name] = layers[target]
                    break
    strange = [
        target
        for target in layers
        if target not in used and not any(is_named(target, ending) for ending in settings.skip)
    ]
    if strange:
        raise BadInput(
            f"The recipe's layers are not the model's: it has no {strange[0]}.",
            f"The model has {len(shape.names)} blocks, {shape.names[0]} to {shape.names[-1]}.",
        )
    names = zip(shape.names, shape.linears, found, strict=True)
    empty = [name for name, linears, own in names if linears and not own]
    if empty and all(target in shape.names for target in layers):
        raise BadInput(
            f"The recipe's layers are not the model's: {empty[0]} has no sparsity.",
            f"Give --skip {empty[0]} if it is to stay dense, else prune this model without the "
            "list.",
        )
    if not settings.rounds:
        return found
    return [
        {name: one.get(name, 0.0) for name in own}
        for own, one in zip(shape.linears, found, strict=True)
    ]


def resolved_layers(
    shape: Shape, sparsities: Sequence[Mapping[str, float]], all_linears: Sequence[int]
) -> dict[str, float]:
    """The targets of a resolved recipe: blocks, or Linears where a block is pruned in part.

    `all_linears`: how many Linears each block has.
    """
    layers: dict[str, float] = {}
    for block, own, count in zip(shape.names, sparsities, all_linears, strict=True):
        if len(own) == count and len(set(own.values())) == 1:
            layers[block] = next(iter(own.values()))
        else:
            layers |= {f"{block}.{name}": value for name, value in own.items()}
    return layers
