"""From settings to one sparsity for every Linear: with names, order and sizes that all differ."""

import pytest

from owl_deploy.compression.allocation import sparsities
from owl_deploy.compression.allocation.rules import ALLOCATIONS, Allocation
from owl_deploy.compression.allocation.sparsities import Shape, linear_sparsities
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput

SHAPE = Shape(("m.0", "m.1", "m.2"), ({"q": 10, "up": 30}, {}, {"q": 10, "up": 50}))


def test_a_rule_sees_its_blocks_in_model_order(monkeypatch):
    seen = []

    def tenth(*arguments):
        seen.append(arguments)
        return [value / 10 for value in arguments[2]]

    monkeypatch.setitem(ALLOCATIONS, "tenth", Allocation(tenth, 0.2))
    settings = PruneSettings.checked(allocation="tenth", sparsity=0.35, outlier_multiple=4)
    expected = [{"q": 0.1, "up": 0.1}, {}, {"q": 0.3, "up": 0.3}]
    assert linear_sparsities(settings, SHAPE, [1, None, 3]) == expected
    assert seen == [(0.35, [40, 60], [1, 3], 0.2)]


def test_a_list_may_name_blocks_and_linears():
    layers = {"m.0": 0.25, "m.2.up": 0.75}
    settings = PruneSettings.checked(allocation="list", layers=layers)
    found = linear_sparsities(settings, SHAPE, None)
    assert found == [{"q": 0.25, "up": 0.25}, {}, {"up": 0.75}]
    resolved = sparsities.resolved_layers(SHAPE, found, [2, 2, 2])
    assert resolved == layers


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [({"m.0": 0.5, "m.3": 0.5}, r"it has no m\.3"), ({"m.0": 0.5}, r"m\.2 has no sparsity")],
)
def test_a_list_for_another_model_is_refused(layers, complaint):
    settings = PruneSettings.checked(allocation="list", layers=layers)
    with pytest.raises(BadInput, match=complaint):
        linear_sparsities(settings, SHAPE, None)


def test_what_a_list_names_and_skip_does_as_well_stays_dense():
    full = [{"q": 10, "up": 30}, {"q": 10, "up": 30}, {"q": 10, "up": 50}]
    layers = {"m.0.q": 0.1, "m.0.up": 0.2, "m.1": 0.5, "m.2": 0.3}
    settings = PruneSettings.checked(allocation="list", layers=layers, skip=("q", "m.1"))
    shape = sparsities.select(SHAPE.names, full, settings.skip)
    assert linear_sparsities(settings, shape, None) == [{"up": 0.2}, {}, {"up": 0.3}]
    other = PruneSettings.checked(
        allocation="list", layers=layers | {"m.0.p": 0.5}, skip=("q", "m.1")
    )
    with pytest.raises(BadInput, match=r"it has no m\.0\.p"):
        linear_sparsities(other, shape, None)


def test_a_block_without_a_sparsity_may_be_skipped():
    settings = PruneSettings.checked(allocation="list", layers={"m.0": 0.5})
    with pytest.raises(BadInput, match=r"Give --skip m\.2 if"):
        linear_sparsities(settings, SHAPE, None)


def test_linears_that_differ_or_are_skipped_are_targets_of_their_own():
    found = sparsities.resolved_layers(
        SHAPE, [{"q": 0.5, "up": 0.5}, {}, {"q": 0.5, "up": 0.25}], [2, 2, 2]
    )
    assert found == {"m.0": 0.5, "m.2.q": 0.5, "m.2.up": 0.25}
    in_part = sparsities.resolved_layers(SHAPE, [{"q": 0.5, "up": 0.5}, {}, {"q": 0.1}], [3, 2, 2])
    assert in_part == {"m.0.q": 0.5, "m.0.up": 0.5, "m.2.q": 0.1}


NAMES, LINEARS = ["m.layers.0", "m.layers.1"], [{"a.q": 2, "a.v": 3}, {"a.q": 5, "up": 7}]


@pytest.mark.parametrize(
    ("skip", "kept"),
    [
        ((), LINEARS),
        (("q",), [{"a.v": 3}, {"up": 7}]),
        (("a.q", "up"), [{"a.v": 3}, {}]),
        (("m.layers.0",), [{}, LINEARS[1]]),
        (("m.layers.1.up",), [LINEARS[0], {"a.q": 5}]),
        (("lm_head",), LINEARS),  # the head is no Linear of a block
    ],
)
def test_what_is_skipped_is_left_out(skip, kept):
    found = sparsities.select(NAMES, LINEARS, skip)
    assert found == Shape(NAMES, kept)
    assert found.sizes == [sum(own.values()) for own in kept]


@pytest.mark.parametrize("name", ["p", "layers.2", "m.layers.2.up"])
def test_a_name_that_nothing_has_is_refused_with_those_that_there_are(name):
    with pytest.raises(BadInput) as refused:
        sparsities.select(NAMES, LINEARS, [name])
    assert str(refused.value) == f"No layer is called {name!r}. There are: q, up, v."


def test_something_must_be_left():
    with pytest.raises(BadInput, match="nothing is left to prune"):
        sparsities.select(NAMES, LINEARS, ["q", "v", "up"])


def test_mixed_groups_are_whole_numbers_for_each_block(monkeypatch):
    monkeypatch.setitem(ALLOCATIONS, "given", Allocation(lambda *_: [0.3, 0.5, 0.6, 0.6]))
    shape = Shape([f"m.{number}" for number in range(4)], [{"q": 1, "up": 1}] * 4)
    settings = PruneSettings.checked(allocation="given", structure="4:8")
    found = linear_sparsities(settings, shape, None)
    values = [own["q"] for own in found]
    assert sum(values) == pytest.approx(2.0, abs=1 / 16)
    assert all(8 * value == round(8 * value) for value in values)


def test_a_block_that_is_skipped_does_not_move_the_others():
    """Its share is not 0 outliers: then the others would have half the range."""
    settings = PruneSettings.checked(allocation="owl", sparsity=0.5, spread=0.1)
    found = linear_sparsities(settings, SHAPE, [4.0, None, 6.0])
    assert found[1] == {}
    assert found[0]["q"] - found[2]["q"] == pytest.approx(0.2)


@pytest.mark.parametrize("structure", ["unstructured", "1:2", "1:4", "2:4", "3:4", "6:8"])
@pytest.mark.parametrize("allocation", ["owl", "linear", "uniform"])
def test_no_rule_empties_a_part_and_the_mean_is_held(allocation, structure):
    shape = Shape([f"m.{n}" for n in range(6)], [{"q": 64, "up": 128}] * 6)
    asked = {"sparsity": 0.95} if structure == "unstructured" else {"structure": structure}
    settings = PruneSettings.checked(allocation=allocation, spread=0.5, **asked)
    found = linear_sparsities(settings, shape, [float(number) for number in range(6)])
    every = [one for own in found for one in own.values()]
    group = settings.group
    most = 0.9875 if group is None else 1 - 1 / group[1]
    assert max(every) <= most + 1e-9
    assert min(every) >= (0.0 if group is None else 1 / group[1] - 1e-9)
    mean = sum(own["q"] * 64 + own["up"] * 128 for own in found) / (6 * 192)
    assert mean == pytest.approx(settings.sparsity, abs=1e-9 if group is None else 0.03)


def test_what_a_list_leaves_out_is_there_where_it_is_rounded():
    settings = PruneSettings.checked(
        allocation="list", layers={"m.0": 0.25, "m.2.up": 0.75}, bits=4
    )
    found = linear_sparsities(settings, SHAPE, None)
    assert found == [{"q": 0.25, "up": 0.25}, {}, {"q": 0.0, "up": 0.75}]
