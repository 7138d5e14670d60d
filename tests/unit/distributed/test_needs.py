import pytest

from owl_deploy.distributed.cluster.needs import GIB, Need, Node, needs_of, read_needs
from owl_deploy.errors import BadInput

SMALL = Node("1", "small", Need(2, 4 * GIB))
LARGE = Node("2", "large", Need(8, 32 * GIB))
CARD = Node("3", "card", Need(6, 64 * GIB, 2))


def test_needs_are_read_by_kind():
    given = ["prune=4cpu,16GB,1gpu", "export=1CPU, 2GiB", "prune=0.5gpu", "bench=1GiB"]
    assert read_needs(given) == {
        "prune": {"cores": 4, "memory": 16 * 10**9, "gpus": 0.5},
        "export": {"cores": 1, "memory": 2 * GIB},
        "bench": {"memory": GIB},
    }
    assert read_needs([]) == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("prun=1cpu", "Did you mean 'prune'"),
        ("prune", "'' is not an amount"),
        ("prune=many", "'many' is not an amount"),
        ("prune=-1cpu", "'-1cpu' is not an amount"),
        ("prune=4", "'4' is not an amount"),
        (f"prune={'9' * 400}GB", "no node has so much"),
        ("prune=0cpu", "whole number of cores"),
        ("prune=1.5cpu", "whole number of cores"),
        ("prune=1.5gpu", "whole GPUs"),
        ("prune=0.00001gpu", "whole GPUs, or 0.0001 of one"),
        ("bench=2cpu", "a bench has all cores of its node"),
    ],
)
def test_wrong_needs_get_one_sentence(line, words):
    with pytest.raises(BadInput, match=words):
        read_needs([line])


def test_defaults_are_cut_to_the_node_that_suits_best():
    size = 2 * GIB
    kinds = ["prune", "export", "evaluate", "bench"]
    assert needs_of(kinds, [SMALL], {}, size) == {
        "prune": Need(2, 2 * GIB),
        "export": Need(2, 4 * GIB),
        "evaluate": Need(2, 4 * GIB),
        "bench": Need(2),
    }
    assert needs_of(kinds, [SMALL, LARGE, CARD], {}, size) == {
        "prune": Need(4, 2 * GIB, 1),  # where there is a card
        "export": Need(2, 6 * GIB),
        "evaluate": Need(4, 6 * GIB),
        "bench": Need(8),
    }


def test_a_benchmark_fits_only_where_it_has_all_cores():
    need = needs_of(["bench"], [SMALL, LARGE, CARD], {}, 0)["bench"]
    assert [need.fits(node) for node in (SMALL, LARGE, CARD)] == [False, True, False]


def test_what_is_given_is_not_cut_and_the_rest_is():
    given = {"prune": {"cores": 6}}
    assert needs_of(["prune"], [SMALL, LARGE], given, GIB)["prune"] == Need(6, GIB)


def test_what_no_node_has_is_said_with_what_they_have():
    with pytest.raises(BadInput) as refused:
        needs_of(["prune"], [SMALL, LARGE], {"prune": {"memory": 64 * GIB}}, 0)
    assert str(refused.value) == (
        "No node can prune, which needs 4 cpu, 64.0 GiB: small has 2 cpu, 4.0 GiB; "
        "large has 8 cpu, 32.0 GiB. Ask for less, as in --needs prune=1cpu, or add a node."
    )
    with pytest.raises(BadInput, match="there is none"):
        needs_of(["bench"], [], {}, 0)
    # No one node has both: the card's has fewer cores.
    both = {"prune": {"cores": 8, "gpus": 1}}
    with pytest.raises(BadInput, match="8 cpu, 1 gpu"):
        needs_of(["prune"], [SMALL, LARGE, CARD], both, 0)


def test_the_same_in_rays_words():
    need = Need(2, GIB, 0.5)
    assert need.options() == {"num_cpus": 2, "memory": GIB, "num_gpus": 0.5}
