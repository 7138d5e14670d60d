"""Pruning settings: what they mean together, and what is refused."""

import pytest

from owl_deploy.compression.settings import PruneSettings, parse_budget
from owl_deploy.errors import BadInput


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"sparsity": 1.2}, "sparsity of 1.2"),
        ({"sparsity": -1}, "sparsity of -1"),
        ({"sparsity": float("nan")}, "sparsity of nan"),
        ({"sparsity": float("nan"), "structure": "2:4"}, "nan contradicts the structure 2:4"),
        ({"sparsity": 1.0}, "sparsity of 1.0"),
        ({"method": "wandda"}, "Did you mean 'wanda'"),
        ({"method": [1]}, r"Unknown method '\[1\]'"),
        ({"allocation": {}}, r"Unknown allocation '\{\}'"),
        ({"allocation": "owls"}, "Did you mean 'owl'"),
        ({"spread": -0.1}, "spread"),
        ({"outlier_multiple": float("inf")}, "outlier_multiple"),
        ({"structure": "4:2"}, "neither 'unstructured' nor N:M"),
        ({"structure": "0:4"}, "neither 'unstructured' nor N:M"),
        ({"structure": "2-4"}, "neither 'unstructured' nor N:M"),
        ({"structure": "2:4", "sparsity": 0.7}, "contradicts the structure"),
        ({"structure": "1:3", "sparsity": 0.66}, "contradicts the structure"),
        ({"structure": "2:4", "sparsity": "0.5"}, "contradicts the structure"),
        ({"method": "none", "bits": 4, "allocation": "owl"}, "nothing for the allocation owl"),
        ({"method": "sparsegpt", "options": {"block_size": 0}}, "^block_size in the options of"),
        ({"method": "sparsegpt", "options": {"dampening": -1}}, "^dampening in the options of"),
        ({"method": "sparsegpt", "options": {"blocks": 1}}, "no option 'blocks'. It has: block_"),
        ({"options": {"dampening": 0.1}}, "wanda has no option 'dampening'. It has: none."),
        ({"options": 5}, "The options of wanda are 5, which names none"),
        ({"allocation": "list"}, "come together"),
    ],
)
def test_impossible_settings_get_a_sentence(values, complaint):
    with pytest.raises(BadInput, match=complaint):
        PruneSettings.checked(**values)


@pytest.mark.parametrize(
    ("structure", "said", "meant"),
    [("7:10", 0.3, 0.3), ("4:5", 0.2, 0.2), ("1:3", 0.667, 2 / 3), ("2:4", 0.5, 0.5)],
)
def test_a_sparsity_beside_its_structure_may_be_rounded(structure, said, meant):
    found = PruneSettings.checked(structure=structure, sparsity=said)
    assert (
        found.sparsity
        == PruneSettings.checked(structure=structure).sparsity
        == pytest.approx(meant)
    )


def test_settings_are_read_back_from_json_with_their_options():
    given = PruneSettings.checked(method="sparsegpt", options={"dampening": 0.25})
    assert PruneSettings.model_validate_json(given.model_dump_json()) == given


@pytest.mark.parametrize("structure", ["4:4", "0:4", "5:4"])
def test_a_structure_removes_some_and_keeps_some(structure):
    with pytest.raises(BadInput, match="N weights of every M neighbours"):
        PruneSettings.checked(structure=structure)
    assert PruneSettings.checked(structure="1:4").sparsity == 0.75


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ("3.5", (3.5, "bits")),
        ("4", (4.0, "bits")),
        (" .5 ", (0.5, "bits")),
        ("400MB", (400e6, "bytes")),
        ("1.5 GB", (1.5e9, "bytes")),
        ("20kB", (20e3, "bytes")),
    ],
)
def test_a_budget_is_in_bits_or_bytes(budget, expected):
    assert parse_budget(budget) == expected


@pytest.mark.parametrize("budget", ["", "many", "0", "-1", "3.5y", "x", "400MiB", "1e9", "nan"])
def test_what_is_no_budget(budget):
    with pytest.raises(BadInput, match="is none"):
        PruneSettings.checked(budget=budget)


def test_the_settings_of_a_plan_to_a_budget_can_be_read_again():
    asked = PruneSettings.checked(budget=3.5)
    assert (asked.method, asked.allocation, asked.bits, asked.bits_group) == (
        *("sparsegpt", "budget"),
        *(None, 32),
    )
    assert (asked.rounds, asked.needs, asked.sparsity) == (True, "hessian", 0)
    planned = asked.model_copy(update={"sparsity": 0.25})
    assert PruneSettings.model_validate(planned.model_dump(mode="json")) == planned


@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"method": "magnitude", "allocation": "uniform"}, False),
        ({"method": "magnitude", "allocation": "owl"}, True),
        ({"method": "magnitude", "allocation": "fisher"}, True),
        ({"method": "wanda", "allocation": "uniform"}, True),
        ({"method": "magnitude", "allocation": "uniform", "refit": True}, True),
        ({"method": "magnitude", "allocation": "uniform", "reconstruct": 1}, True),
    ],
)
def test_what_looks_at_a_text(settings, reads):
    assert PruneSettings.checked(**settings).calibrates == reads
