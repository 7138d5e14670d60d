import pytest
import torch

from owl_deploy.compression.methods import SparseGPTOptions
from owl_deploy.compression.pruning import mask, score, sparsegpt
from owl_deploy.errors import BadInput
from tests.reference import sparsegpt as reference


@pytest.fixture(scope="module")
def layer():
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(6, 20, generator=generator)
    mix = torch.eye(20) + 0.2 * torch.randn(20, 20, generator=generator)  # features correlate
    inputs = torch.randn(400, 20, generator=generator) @ mix
    inputs[:, 7] = 0  # a dead input
    return weight, inputs, inputs.T @ inputs


@pytest.mark.parametrize("block_size", [4, 7, 128])
@pytest.mark.parametrize(
    ("sparsity", "group"), [(0.0, None), (0.5, None), (0.7, None), (0.5, (2, 4)), (0.25, (3, 4))]
)
def test_weights_equal_the_definition(layer, block_size, sparsity, group):
    weight, _, hessian = layer
    factor = sparsegpt.factorise(hessian, 0.01)
    options = SparseGPTOptions(block_size=block_size)
    found = sparsegpt.updated(weight, factor, sparsity, group, options).weight
    expected = reference.prune(weight, hessian, sparsity, group, block_size)
    assert torch.equal(found == 0, expected == 0)
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("group", [None, (2, 4)])
def test_preserved_zeros_stay_and_count(layer, group):
    weight, _, hessian = layer
    weight = weight.clone()
    weight[:, ::5] = 0
    factor = sparsegpt.factorise(hessian, 0.01)
    found = sparsegpt.updated(
        weight, factor, 0.5, group, SparseGPTOptions(block_size=8, preserve_mask=True)
    ).weight
    expected = reference.prune(weight, hessian, 0.5, group, 8, preserve=True)
    assert bool((found[:, ::5] == 0).all())
    assert (found == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert (found - expected).abs().max() < 1e-4


def test_zeros_that_are_not_preserved_are_weights_like_others(layer):
    weight, _, hessian = layer
    weight = weight.clone()
    weight[:, 18:] = 0  # half of the last block, of which a third goes
    found = sparsegpt.updated(
        weight, sparsegpt.factorise(hessian, 0.01), 0.3, None, SparseGPTOptions(block_size=4)
    ).weight
    assert (found[:, 18:] != 0).sum() >= 5
    assert (found - reference.prune(weight, hessian, 0.3, None, 4)).abs().max() < 1e-4


@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_preserved_zeros_may_be_more_than_are_asked_for(layer, size):
    weight, _, hessian = layer
    weight = size * weight
    weight[:, 3::5] = 0
    options = SparseGPTOptions(block_size=8, preserve_mask=True)
    found = sparsegpt.updated(weight, sparsegpt.factorise(hessian, 0.01), 0.1, None, options).weight
    dead = torch.zeros(20, dtype=torch.bool)
    dead[[3, 7, 8, 13, 18]] = True  # those, and the dead input
    assert torch.equal((found == 0).all(dim=0), dead)
    asked = sparsegpt.updated(weight, sparsegpt.factorise(hessian, 0.01), 0.6, None, options).weight
    expected = reference.prune(weight, hessian, 0.6, None, 8, preserve=True)
    assert torch.equal(asked == 0, expected == 0)


def test_reconstructs_the_outputs_better_than_wanda(layer):
    weight, inputs, hessian = layer
    factor = sparsegpt.factorise(hessian, 0.01)
    ours = sparsegpt.updated(weight, factor, 0.5, None, SparseGPTOptions()).weight
    removed = mask.lowest_in_rows(score.wanda(weight, inputs.norm(dim=0)), 0.5)
    wanda = weight.masked_fill(removed, 0)

    def error(pruned):
        return ((inputs @ (pruned - weight).T) ** 2).sum().item()

    assert error(ours) < error(wanda)


def test_the_scale_of_the_hessian_does_not_matter(layer):
    weight, _, hessian = layer
    found = [
        sparsegpt.updated(
            weight, sparsegpt.factorise(hessian * scale, 0.01), 0.5, None, SparseGPTOptions()
        ).weight
        for scale in (1.0, 1024.0)
    ]
    assert torch.allclose(*found, atol=1e-5)


def test_a_hessian_that_cannot_be_factorised_gets_a_sentence():
    hessian = torch.tensor([[1.0, 4.0], [4.0, 1.0]])
    with pytest.raises(BadInput, match="depend on each other"):
        sparsegpt.factorise(hessian, 0.01)
