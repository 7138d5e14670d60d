import pytest
import torch

from owl_deploy.compression.methods import SparseGPTOptions
from owl_deploy.compression.pruning import alps, refit, sparsegpt
from tests.reference import alps as reference

SETTINGS = [(0.0, None), (0.5, None), (0.7, None), (0.5, (2, 4)), (0.25, (3, 4)), (0.6, (2, 5))]


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 20, generator=generator)
    mix = torch.eye(20) + 0.2 * torch.randn(20, 20, generator=generator)  # features correlate
    inputs = torch.randn(400, 20, generator=generator) @ mix
    inputs[:, 7] = 0  # a dead input
    inputs[:, 3] *= 100  # and sizes differ
    return weight, inputs.T @ inputs


def solved(layer, sparsity, group, iterations=20):
    weight, hessian = layer
    return alps.solved(weight, refit.gram(hessian, 0.05), sparsity, group, iterations)


@pytest.mark.parametrize("iterations", [1, 2, 20])
@pytest.mark.parametrize(("sparsity", "group"), SETTINGS)
def test_support_and_weights_equal_the_definition(layer, sparsity, group, iterations):
    found = solved(layer, sparsity, group, iterations)
    gone = reference.support(*layer, sparsity, group, iterations=iterations)
    gone[:, 7] = True  # whose weights are nothing
    assert torch.equal(found == 0, gone)
    best = reference.best_on(*layer, ~gone)
    assert (found - best).abs().max() < 5e-3  # ten steps from where ADMM is
    errors = [reference.error(layer[0], one, layer[1]) for one in (found, best, best * 0)]
    assert errors[0] - errors[1] < 1e-5 * errors[2]


@pytest.mark.parametrize("sparsity", [0.1, 1 / 3, 0.5, 0.77])
def test_exactly_as_many_go_as_are_asked_for(layer, sparsity):
    assert int((solved(layer, sparsity, None) == 0).sum()) == round(sparsity * 120)


@pytest.mark.parametrize("group", [(1, 4), (2, 4), (4, 5)])
def test_every_group_keeps_its_n(layer, group):
    weight, hessian = layer
    alive = hessian + torch.eye(20)
    found = solved((weight, alive), 1 - group[0] / group[1], group)
    assert bool(((found.reshape(-1, group[1]) != 0).sum(1) == group[0]).all())


def test_a_dead_input_goes_first(layer):
    dead = torch.zeros(6, 20, dtype=torch.bool)
    dead[:, 7] = True
    for sparsity in (0.0, 6 / 120):
        found = solved(layer, sparsity, None)
        assert torch.equal(found == 0, dead)
        assert torch.allclose(found, layer[0].masked_fill(dead, 0), atol=1e-5)


def test_inputs_that_do_not_correlate_leave_the_largest_scores():
    weight = torch.tensor([[3.0, -1.0, 2.0, 0.5], [0.4, 1.5, -0.3, 2.5]])
    gram = refit.gram(torch.diag(torch.tensor([1.0, 4.0, 1.0, 0.04])), 0.05)
    # Scores, |w| times the norm of the input: 3, 2, 2, 0.1 and 0.4, 3, 0.3, 0.5.
    expected = torch.tensor([[3.0, -1.0, 2.0, 0.0], [0.0, 1.5, 0.0, 0.0]])
    assert torch.allclose(alps.solved(weight, gram, 0.5, None, 20), expected)


def test_of_two_equal_inputs_one_takes_the_weight_of_both():
    """X has the columns a, a and b: (1, 1, 1.2) is (2, 0, 1.2) to it, and no better pair is left.

    Magnitude keeps the last and either of the others, at its own value.
    """
    columns = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])  # two tokens
    gram = refit.gram(columns.T @ columns, 1e-4)
    found = alps.solved(torch.tensor([[1.0, 1.0, 1.2]]), gram, 1 / 3, None, 20)
    assert sorted(found[0, :2].abs().tolist()) == pytest.approx([0.0, 2.0], abs=1e-3)
    assert float(found[0, 2]) == pytest.approx(1.2, abs=1e-3)


def test_the_support_is_near_the_best_of_all():
    """Of what SparseGPT loses beyond the best support, ALPS loses a fraction, over many rows."""
    generator = torch.Generator().manual_seed(3)
    beyond = torch.zeros(2)
    for _ in range(20):
        inputs = torch.randn(60, 10, generator=generator)
        inputs = inputs @ (torch.eye(10) + 0.4 * torch.randn(10, 10, generator=generator))
        weight, hessian = torch.randn(1, 10, generator=generator), inputs.T @ inputs
        factor = sparsegpt.factorise(hessian, 0.01)
        theirs = sparsegpt.updated(weight, factor, 0.5, None, SparseGPTOptions()).weight
        best = reference.best_support(weight, hessian, 5)
        for index, one in enumerate((solved((weight, hessian), 0.5, None), theirs)):
            beyond[index] += reference.error(weight, one, hessian) / best - 1
    assert beyond[0] < 0.5 * beyond[1], beyond


@pytest.mark.parametrize(("sparsity", "group"), [(0.5, None), (0.7, None), (0.5, (2, 4))])
def test_loses_less_than_sparsegpt(layer, sparsity, group):
    weight, hessian = layer
    factor = sparsegpt.factorise(hessian, 0.01)
    theirs = sparsegpt.updated(weight, factor, sparsity, group, SparseGPTOptions()).weight
    ours = solved(layer, sparsity, group)
    assert reference.error(weight, ours, hessian) < reference.error(weight, theirs, hessian)


def test_the_scale_of_the_hessian_does_not_matter(layer):
    weight, hessian = layer
    found = [solved((weight, hessian * scale), 0.5, None) for scale in (1.0, 1024.0)]
    assert torch.allclose(*found, atol=1e-5)
