"""`--tune MINUTES`: search how the sparsity is divided over the Linears, on held-out text.

The search of EvoPress (arXiv 2410.14649): the best division so far has offspring in which some
Linears lose more and others as many weights less; all are judged on little text, the best of them
on more. Here a move is also between whole blocks, between Linears of one name (keys against
down-projections, say) and between thirds of those, so that few hundred trials, which is what a
processor has time for, go far. It begins with the best of a few named allocations, that which was
asked for among them, so that the result is no worse than they on that text.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from owl_deploy.compression.allocation.judge import Division, Judge
from owl_deploy.compression.allocation.rules import ALLOCATIONS, hold_mean, in_groups, most_removed
from owl_deploy.compression.allocation.sparsities import Shape, Statistics, linear_sparsities
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.utils.progress import bar
from owl_deploy.utils.ranks import Ranks

HELD_OUT_WINDOWS, HELD_OUT_TOKENS = 8, 256  # to judge by: the first tokens of each window
OFFSPRING = 8
_SPREADS = (0.04, 0.08, 0.15)
_GROUP_WEIGHTS = (1.0, 1.5)  # half the range of N:M, in weights of a group
_STEPS: tuple[float, ...] = (0.02, 0.04, 0.08, 0.16)  # shares of the smaller of two sets that trade
_GROUP_STEPS = (1, 2)  # weights of a group that N:M's sets trade
_MOVES = (1, 1, 2, 3)  # how many trades make one of the offspring

Save = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Trial:
    """One division: what it is, the divergence of the model pruned with it, and when it was tried.

    `divergence`: from the dense model, in nats a token of the held-out text. `seconds`: since the
    search began, over all of its runs.
    """

    name: str
    divergence: float
    seconds: float


@dataclass
class Search:
    """How far a search has come: what was tried, the best division, its age and generations."""

    trials: list[Trial] = field(default_factory=list)
    best: Division = ()
    seconds: float = 0.0
    generation: int = 0

    @property
    def divergence(self) -> float:
        """That of the best division."""
        return min((trial.divergence for trial in self.trials), default=float("inf"))

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> "Search":
        """The one that `to_json` was made of."""
        trials = [Trial(**one) for one in kept["trials"]]
        return cls(**kept | {"trials": trials, "best": tuple(kept["best"])})

    def to_json(self) -> dict[str, Any]:
        """As JSON's types."""
        return asdict(self)

    def judged(self, name: str, division: Division, divergence: float) -> None:
        """Note a trial, and its division if that is the best."""
        if divergence < self.divergence:
            self.best = division
        self.trials.append(Trial(name, divergence, self.seconds))


def check(settings: PruneSettings, minutes: float) -> None:
    """Raise `BadInput` where there is nothing to search for, or no time."""
    if not 0 < minutes <= 1e6:
        raise BadInput(f"--tune {minutes:g} is no time.", "Give minutes, such as --tune 15.")
    if not ALLOCATIONS[settings.allocation].divides or not settings.sparsity:
        raise BadInput(
            "There is nothing to tune: what goes of each layer is said by other settings.",
            "Use --tune with a --sparsity, and neither a budget nor a recipe that lists layers.",
        )


def named(settings: PruneSettings) -> list[tuple[str, PruneSettings]]:
    """The allocations that a search begins with, by name: what was asked for is the first."""
    found = {_name(settings): settings}
    for allocation in dict.fromkeys((settings.allocation, "linear", "uniform")):
        spreads: tuple[float, ...] = _SPREADS if ALLOCATIONS[allocation].spread else (0.0,)
        if settings.group is not None and ALLOCATIONS[allocation].spread:
            spreads = tuple(min(0.5, weights / settings.group[1]) for weights in _GROUP_WEIGHTS)
        for spread in spreads:
            one = settings.model_copy(update={"allocation": allocation, "spread": spread})
            found.setdefault(_name(one), one)
    return list(found.items())


def _name(settings: PruneSettings) -> str:
    spread = ALLOCATIONS[settings.allocation].spread
    return settings.allocation + (f", spread {settings.spread:g}" if spread else "")


class Mutation:
    """Makes offspring of divisions: Linears that trade weights, so that the sparsity stays."""

    def __init__(self, settings: PruneSettings, shape: Shape) -> None:
        self.sizes = shape.linear_sizes
        self.group, self.sparsity = settings.group, settings.sparsity
        self.most, self.steps = most_removed(settings.sparsity), _STEPS
        if self.group is not None:
            size = self.group[1]
            self.most = 1 - max(1, round((1 - self.most) * size)) / size
            self.steps = tuple(weights / size for weights in _GROUP_STEPS)
        self.ways = [sets for sets in _ways(shape) if len(sets) > 1]

    def offspring(self, division: Division, draw: random.Random) -> Division:
        """Another division of the same sparsity."""
        if not self.ways:  # one Linear
            return division
        wanted = list(division)
        for _ in range(draw.choice(_MOVES)):
            more, less = draw.sample(draw.choice(self.ways), 2)
            sizes = [sum(self.sizes[place] for place in one) for one in (more, less)]
            traded = draw.choice(self.steps) * min(sizes)
            for places, change in ((more, traded / sizes[0]), (less, -traded / sizes[1])):
                for place in places:
                    wanted[place] += change
        return self.feasible(wanted)

    def feasible(self, wanted: Sequence[float]) -> Division:
        """The sparsities nearest to those `wanted` that the structure has, of the right mean."""
        found = hold_mean(wanted, self.sizes, self.sparsity, self.most)
        if self.group is not None:
            found = in_groups(found, self.sizes, self.group[1])
        return tuple(found)


def _ways(shape: Shape) -> list[list[list[int]]]:
    """The ways to part the Linears, by their numbers in model order, into sets that trade."""
    places = list(
        enumerate((block, name) for block, own in enumerate(shape.linears) for name in own)
    )
    depth = len(shape.linears)

    def parted(key: Callable[[int, str], object]) -> list[list[int]]:
        sets: dict[object, list[int]] = {}
        for place, (block, name) in places:
            sets.setdefault(key(block, name), []).append(place)
        return list(sets.values())

    return [
        parted(lambda block, name: (block, name)),
        parted(lambda block, _: block),
        parted(lambda _, name: name),
        parted(lambda block, name: (3 * block // depth, name)),
    ]


class Searcher:
    """A search of `state`, by all ranks together; `save` is given it after each generation."""

    def __init__(
        self, mutation: Mutation, judge: Judge, state: Search, seed: int, ranks: Ranks, save: Save
    ) -> None:
        self.mutation, self.judge, self.state = mutation, judge, state
        self.seed, self.ranks, self.save = seed, ranks, save
        self.everywhere = range(len(judge.windows))

    def run(self, start: Sequence[tuple[str, Division]], minutes: float) -> None:
        """Judge what is there at the start, unless an earlier run has; then search until the end.

        Each rank ends where the first does, whose clock counts.
        """
        state, total = self.state, 60 * minutes
        with bar("Searching", total, lambda: f"{state.divergence:.4f} nats a token") as advance:
            advance(min(state.seconds, total))
            while not state.trials or state.seconds < total:
                since, before = self.ranks.from_leader(time.monotonic), min(state.seconds, total)
                found = self._generation() if state.trials else self._judged(start)
                state.seconds += self.ranks.from_leader(time.monotonic) - since
                for name, division, divergence in found:
                    state.judged(name, division, divergence)
                self.save(state.to_json())
                advance(min(state.seconds, total) - before)

    def _generation(self) -> list[tuple[str, Division, float]]:
        state = self.state
        draw = random.Random(f"{self.seed} {state.generation}")
        young = [self.mutation.offspring(state.best, draw) for _ in range(OFFSPRING)]
        few = self._divergences(young, [draw.choice(self.everywhere)])
        best = young[few.index(min(few))]
        state.generation += 1
        return self._judged([(f"generation {state.generation}", best)])

    def _judged(
        self, divisions: Sequence[tuple[str, Division]]
    ) -> list[tuple[str, Division, float]]:
        found = self._divergences([one for _, one in divisions], self.everywhere)
        return [(*one, divergence) for one, divergence in zip(divisions, found, strict=True)]

    def _divergences(self, divisions: Sequence[Division], places: Sequence[int]) -> list[float]:
        return self.ranks.shared(divisions, lambda own: self.judge.divergences(own, places))


def start(
    settings: PruneSettings,
    shape: Shape,
    statistics: Statistics | None,
    asked: Sequence[Mapping[str, float]],
) -> list[tuple[str, Division]]:
    """The divisions of the `named` allocations; `asked`: that of the settings themselves."""
    found = []
    for name, one in named(settings):
        blocks = asked if one == settings else linear_sparsities(one, shape, statistics)
        found.append((name, tuple(value for block in blocks for value in block.values())))
    return found
