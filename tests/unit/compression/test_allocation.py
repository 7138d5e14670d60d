import itertools

import pytest
import torch

from owl_deploy.compression.allocation import rules
from tests.reference import owl as reference


def weighted_mean(values, sizes):
    return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def test_the_hand_worked_case():
    found = rules.owl(0.7, [10, 10, 10], [1, 2, 4], 0.08)
    assert found == pytest.approx([0.77111, 0.71778, 0.61111], abs=5e-6)


def test_equals_the_papers_map_where_no_bound_is_hit():
    ratios = [0.4, 1.7, 0.9, 3.3, 2.0]
    found = rules.owl(0.6, [7] * 5, ratios, 0.1)
    assert found == pytest.approx(reference.owl_sparsities(ratios, 0.6, 0.1), abs=1e-12)


@pytest.mark.parametrize("target", [0.0, 0.01, 0.3, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.0, 0.08, 0.5])
def test_any_target_is_held_within_the_bounds(target, spread):
    generator = torch.Generator().manual_seed(1)
    for count in (1, 2, 5, 30):
        ratios = torch.rand(count, generator=generator).tolist()
        sizes = torch.randint(1, 1000, (count,), generator=generator).tolist()
        found = rules.owl(target, sizes, ratios, spread)
        assert all(0 <= value <= 1 for value in found)
        assert weighted_mean(found, sizes) == pytest.approx(target, abs=1e-9)
        by_ratio = [value for _, value in sorted(zip(ratios, found, strict=True))]
        assert all(a >= b for a, b in itertools.pairwise(by_ratio))


def test_equal_ratios_give_uniform():
    assert rules.owl(0.7, [1, 2, 3], [1.5, 1.5, 1.5], 0.08) == [0.7] * 3


def test_a_bound_moves_the_others_and_keeps_their_differences():
    found = rules.hold_mean([0.0, 0.4, 0.8], [1, 1, 1], 0.8)
    assert found == pytest.approx([0.5, 0.9, 1.0])


def test_linear_grows_by_equal_steps():
    # s_i = S - beta (L - 1) / 2 + beta (i - 1), beta = 2 * spread / (L - 1)
    beta = 2 * 0.15 / 3
    expected = [0.7 - beta * 3 / 2 + beta * index for index in range(4)]
    assert rules.linear(0.7, [9] * 4, [], 0.15) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("target", [0.25, 0.5, 0.55, 0.625])
@pytest.mark.parametrize("spread", [0.0, 0.125, 0.4])
def test_whole_numbers_hold_the_mean_as_closely_as_they_can(target, spread):
    generator = torch.Generator().manual_seed(3)
    ratios = torch.rand(12, generator=generator).tolist()
    wanted = rules.owl(target, [64] * 12, ratios, spread)
    kept = rules.whole_kept(wanted, [64] * 12, 8)
    assert all(0 <= value <= 8 for value in kept)
    assert abs(sum(kept) / 12 - 8 * (1 - target)) <= 0.5 / 12 + 1e-9
    for value, sparsity in zip(kept, wanted, strict=True):
        assert abs(value - 8 * (1 - sparsity)) < 1


def test_the_hand_worked_case_of_whole_numbers():
    # 1.5, 1.4 and 1.2 of 8: 2.9 weights short of it, of which two parts of one weight give 2.
    found = rules.whole_kept([1 - 1.5 / 8, 1 - 1.4 / 8, 1 - 1.2 / 8], [1, 1, 10], 8)
    assert found == [2, 2, 1]


def test_what_is_nearest_to_the_next_whole_number_is_rounded_up_first():
    assert rules.whole_kept([1 - 1.2 / 8, 1 - 1.9 / 8], [1, 1], 8) == [1, 2]
    assert rules.whole_kept([1 - 1.9 / 8, 1 - 1.2 / 8], [1, 1], 8) == [2, 1]
    assert rules.whole_kept([1 - 1.5 / 8], [1], 8) == [1]  # no nearer either way


@pytest.mark.parametrize("target", [0.25, 0.5, 0.55, 0.625])
def test_whole_numbers_of_parts_that_differ_in_size(target):
    generator = torch.Generator().manual_seed(4)
    sizes = [*[9, 3, 3, 9, 40, 40, 40] * 4]
    ratios = torch.rand(len(sizes), generator=generator).tolist()
    wanted = rules.owl(target, sizes, ratios, 0.2)
    kept = rules.whole_kept(wanted, sizes, 8)
    missed = sum((k - 8 * (1 - s)) * n for k, s, n in zip(kept, wanted, sizes, strict=True))
    assert abs(missed) <= max(sizes) / 2
    assert all(abs(k - 8 * (1 - s)) < 1 for k, s in zip(kept, wanted, strict=True))


def test_no_part_loses_more_than_the_most():
    found = rules.hold_mean([0.9, 0.5, 0.1], [1, 2, 1], 0.6, 0.7)
    assert max(found) == 0.7
    assert weighted_mean(found, [1, 2, 1]) == pytest.approx(0.6)
    assert rules.hold_mean([0.2, 0.4], [1, 1], 0.7, 0.7) == pytest.approx([0.7, 0.7])


@pytest.mark.parametrize("name", [n for n, row in rules.ALLOCATIONS.items() if row.rule])
def test_every_rule_holds_the_target(name):
    rule = rules.ALLOCATIONS[name].rule
    found = rule(0.6, [3, 1, 2], [0.5, 1.0, 0.2], rules.ALLOCATIONS[name].spread)
    assert weighted_mean(found, [3, 1, 2]) == pytest.approx(0.6)
    assert (min(found) < max(found)) == bool(rules.ALLOCATIONS[name].spread)
