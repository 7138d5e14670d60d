"""The choice of options within a budget, against trying all of them."""

import random

import pytest

from owl_deploy.compression.quantization.knapsack import Option, cheapest, hull
from tests.reference import knapsack


def drawn(seed, weights=4, options=4):
    """Random options; whole numbers, so that sums are exact and some tie."""
    draw = random.Random(seed)
    return [
        [Option(draw.randint(1, 20), draw.randint(0, 30)) for _ in range(options)]
        for _ in range(weights)
    ]


def total(weights, chosen):
    picked = [own[at] for own, at in zip(weights, chosen, strict=True)]
    return sum(one.size for one in picked), sum(one.loss for one in picked)


def test_by_hand():
    weights = [
        [Option(1, 10), Option(2, 4), Option(3, 3)],  # 6, then 1 a byte
        [Option(1, 5), Option(3, 1)],  # 2 a byte
    ]
    assert [cheapest(weights, budget) for budget in (2, 3, 5, 6, 99)] == [
        *([0, 0], [1, 0], [1, 1]),
        *([2, 1], [2, 1]),
    ]


def test_what_no_longer_fits_leaves_room_for_less():
    # At 4 the step of the first weight is too long, and a corner of the second fits.
    weights = [[Option(1, 10), Option(5, 0)], [Option(1, 5), Option(3, 1)]]
    assert cheapest(weights, 4) == [0, 1]


def test_options_within_the_hull_fill_what_is_left():
    weights = [[Option(1, 10), Option(2, 9), Option(5, 0)]]
    assert hull(weights[0]) == [0, 2]
    assert cheapest(weights, 4) == [1]


def test_of_equal_gains_the_earlier_weight_comes_first():
    weights = [[Option(1, 4), Option(2, 2)]] * 3
    assert cheapest(weights, 4) == [1, 0, 0]


def test_less_than_the_least_is_refused():
    with pytest.raises(ValueError, match="not even the least"):
        cheapest([[Option(2, 1)], [Option(3, 1)]], 4)


@pytest.mark.parametrize("weights", [1, 12])
def test_a_straight_line_does_not_overspend(weights):
    """Its corners gain the same for a byte, but for rounding."""
    left = [0.25, *(step / 100 for step in range(26, 91))]
    line = [Option(1920 * (1 - one), (one - 0.25) / 0.65 * 0.01) for one in left]
    for budget in range(200, 1500, 7):
        spent, _ = total([line] * weights, cheapest([line] * weights, budget * weights))
        assert spent <= budget * weights * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(40))
def test_the_hull_is_what_wins_at_some_price(seed):
    for options in drawn(seed, options=6):
        assert hull(options) == knapsack.corners(options)


@pytest.mark.parametrize("seed", range(40))
def test_no_choice_is_better_by_more_than_one_step(seed):
    weights = drawn(seed)
    steps = [
        own[a].loss - own[b].loss
        for own in weights
        for a, b in zip(hull(own), hull(own)[1:], strict=False)
    ]
    least = sum(min(one.size for one in own) for own in weights)
    for budget in range(least, 81, 3):
        size, loss = total(weights, cheapest(weights, budget))
        assert size <= budget
        best = knapsack.best(weights, budget)
        assert best <= loss <= best + max(steps, default=0)


@pytest.mark.parametrize("seed", range(40))
def test_at_a_corner_no_choice_is_better(seed):
    """A budget that the steps in the order of their gains spend to the byte."""
    weights = drawn(seed)
    steps = sorted(
        (
            (own[b].loss - own[a].loss) / (own[b].size - own[a].size),
            own[b].size - own[a].size,
        )
        for own in weights
        for a, b in zip(hull(own), hull(own)[1:], strict=False)
    )
    budget = sum(own[hull(own)[0]].size for own in weights)
    for _, size in steps:
        budget += size
        assert total(weights, cheapest(weights, budget))[1] == knapsack.best(weights, budget)
