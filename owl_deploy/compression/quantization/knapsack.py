"""From what each format of each weight takes and costs to the cheapest choice within a budget.

One option is chosen for each of many weights; the sum of the sizes is at most the budget, that of
the losses as small as can be: a multiple-choice knapsack. Shoham and Gersho ("Efficient bit
allocation for an arbitrary set of quantizers", 1988) solve it by a Lagrange multiplier: for every
price of a byte each weight by itself takes the option with the least loss + price x size, which is
a corner of the lower convex hull of its options. Going down with the price takes the steps between
corners in the order of what they gain for a byte, and every choice on that way is the best one of
its size. Between two of them, the gap is at most what the step that no longer fits would gain.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Option:
    """One way to store a weight: what it takes, and the loss that it costs, in any units."""

    size: float
    loss: float


@dataclass(frozen=True)
class _Step:
    """From one corner of a weight's hull to the next larger one, for so much `gain` a byte."""

    weight: int
    to: int
    size: float
    gain: float


def cheapest(weights: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """The index of the option that each of `weights` gets, for little loss within the `budget`.

    The best of its size where the budget ends at a corner, and else within one step of it. Of
    equal gains those of earlier weights come first. ValueError where not even the least options
    fit.
    """
    hulls = [hull(options) for options in weights]
    chosen = [corners[0] for corners in hulls]
    left = budget - sum(own[at].size for own, at in zip(weights, chosen, strict=True))
    if left < 0:
        raise ValueError("the budget holds not even the least options")
    steps = [
        step
        for number, (options, corners) in enumerate(zip(weights, hulls, strict=True))
        for step in _steps(number, options, corners)
    ]
    stopped: set[int] = set()  # weights whose next step does not fit: the later ones start there
    for step in sorted(steps, key=lambda one: -one.gain):  # stable
        if step.weight in stopped or step.size > left:
            stopped.add(step.weight)
            continue
        chosen[step.weight] = step.to
        left -= step.size
    _fill_in(weights, chosen, left)
    return chosen


def hull(options: Sequence[Option]) -> list[int]:
    """The corners of the lower convex hull of `options`, from the least size to the least loss.

    Of equal options the first; none lies on the line between two corners.
    """
    found: list[int] = []
    for at in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].loss)):
        if found and options[at].loss >= options[found[-1]].loss:
            continue
        while len(found) > 1 and _lies_above(*(options[i] for i in (found[-2], found[-1], at))):
            found.pop()
        found.append(at)
    return found


def _lies_above(left: Option, middle: Option, right: Option) -> bool:
    """Whether `middle` lies on or above the line from `left` to `right`."""
    rise = (middle.loss - left.loss) * (right.size - left.size)
    return rise >= (right.loss - left.loss) * (middle.size - left.size)


def _steps(number: int, options: Sequence[Option], corners: Sequence[int]) -> Iterator[_Step]:
    gain = math.inf
    for here, there in pairwise(corners):
        one, other = options[here], options[there]
        size = other.size - one.size
        # Along a straight line rounding may turn two: the later must not come first.
        gain = min(gain, (one.loss - other.loss) / size)
        yield _Step(number, there, size, gain)


def _fill_in(weights: Sequence[Sequence[Option]], chosen: list[int], left: float) -> None:
    """Spend what is `left` on the options, corners or not, that take off most; changes `chosen`."""
    while True:
        found: tuple[float, float, int, int] | None = None
        for number, (options, now) in enumerate(zip(weights, chosen, strict=True)):
            for at, option in enumerate(options):
                size, gain = option.size - options[now].size, options[now].loss - option.loss
                if size <= left and gain > (found[0] if found else 0):
                    found = gain, size, number, at
        if found is None:
            return
        _, size, number, chosen[number] = found
        left -= size
