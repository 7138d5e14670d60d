import pytest
import torch
from safetensors.torch import load_file

from owl_deploy.compression.methods import METHODS
from owl_deploy.compression.pruning import refit
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import WEIGHTS
from tests import tiny
from tests.reference import alps as reference


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=8, sequence_length=48)


def on_support(weight, start, kept, hessian):
    gram = refit.gram(hessian, 0.05)
    found = refit.on_support(weight * gram.scale, start * gram.scale, kept, gram.matrix)
    return found / gram.scale


def test_two_weights_by_hand():
    """X^T X scaled is [[1, 1/2], [1/2, 1]]; with norms 2 and 3, 2 w1 gets 1/2 of 3 w2 / 1.05."""
    hessian = torch.tensor([[4.0, 3.0], [3.0, 9.0]])
    weight = torch.tensor([[1.0, 7.0], [1.0, 7.0]])
    kept = torch.tensor([[True, False], [False, False]])
    found = on_support(weight, weight * kept, kept, hessian)
    assert torch.allclose(found, torch.tensor([[1 + 5.25 / 1.05, 0], [0, 0]]))


def test_it_comes_close_to_the_exact_values_from_any_start():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(7, 24, generator=generator)
    mix = torch.eye(24) + 0.2 * torch.randn(24, 24, generator=generator)
    inputs = torch.randn(300, 24, generator=generator) @ mix
    hessian = inputs.T @ inputs
    kept = torch.rand(weight.shape, generator=generator) < 0.5
    kept[3] = False
    best = reference.best_on(weight, hessian, kept)
    for start in (weight * kept, torch.zeros_like(weight), best.float()):
        found = on_support(weight, start, kept, hessian)
        assert bool((found[~kept] == 0).all())
        assert torch.equal(start, start * kept)  # it is left as it was
        errors = [reference.error(weight, one, hessian) for one in (found, start, best)]
        assert errors[0] <= errors[2] + 1e-3 * reference.error(weight, weight * 0, hessian)
        assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", tiny.REMOVING)
def test_the_first_block_keeps_its_mask_and_gets_other_values(
    llama, tmp_path, calibration, method, structure
):
    """Later blocks see other inputs, so that their masks may differ."""
    values = {"method": method, "allocation": "uniform", "structure": structure, "sparsity": 0.5}
    for name, refitted in (("plain", False), ("refit", True)):
        settings = PruneSettings.checked(**values, refit=refitted)
        manifest = prune(llama, tmp_path / name, settings, calibration).to_json()
        assert manifest["settings"]["refit"] is refitted
        told = "no refit of the weights" in (tmp_path / name / "recipe.yaml").read_text()
        assert told == refitted
    plain, found, dense = (
        load_file(folder / WEIGHTS) for folder in (tmp_path / "plain", tmp_path / "refit", llama)
    )
    for name in (one for one in dense if one.startswith("model.layers.0") and "proj" in one):
        assert torch.equal(plain[name] == 0, found[name] == 0)
        assert torch.equal(plain[name], found[name]) == METHODS[method].refits, name


def test_it_needs_a_text(llama, tmp_path):
    settings = PruneSettings.checked(method="magnitude", allocation="uniform", refit=True)
    with pytest.raises(BadInput, match="magnitude, with a refit, with the allocation uniform"):
        prune(llama, tmp_path / "out", settings, None)


@pytest.mark.parametrize("method", ["sparsegpt", "magnitude"])
def test_what_is_rounded_is_refitted_before(llama, tmp_path, calibration, method):
    found = []
    for again in (False, True):
        settings = PruneSettings.checked(
            method=method, allocation="uniform", sparsity=0.5, bits=4, refit=again
        )
        prune(llama, tmp_path / str(again), settings, calibration)
        weights = load_file(tmp_path / str(again) / WEIGHTS)
        found.append(weights["model.layers.0.mlp.up_proj.weight"])
    assert not torch.equal(*found)
