"""LSA: its error by the definition, and a model whose blocks are pruned by it."""

import pytest
import torch
import transformers

from owl_deploy.compression import recipe
from owl_deploy.compression.allocation.least_error import least_error
from owl_deploy.compression.allocation.rules import ALLOCATIONS
from owl_deploy.compression.request import check
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.utils.hardware import Hardware
from tests import tiny
from tests.reference import lsa as reference


def test_uncorrelated_inputs_lose_the_least_weights():
    """Of 1, 2, 3, 4 the first two go: 1 + 4; by two columns at a time 1 and 3 do: 1 + 9."""
    weight = torch.tensor([[1.0, -2.0, 3.0, 4.0]])
    assert least_error(weight, torch.eye(4)) == 5
    assert least_error(weight, torch.eye(4), width=2) == 10


def test_errors_that_cancel_go_together():
    """All inputs are one: 1 goes, then -1 takes that back, where 0.9 alone is the least."""
    weight = torch.tensor([[1.0, -1.0, 3.0, 5.0]])
    assert least_error(weight, torch.ones(4, 4)) == 0
    assert least_error(torch.tensor([[0.9, 1.0, -1.0, 5.0]]), torch.ones(4, 4)) == pytest.approx(
        0.01, rel=1e-4
    )


@pytest.mark.parametrize(("share", "width"), [(0.5, 128), (0.5, 8), (0.75, 5), (0.3, 20)])
def test_it_is_the_error_of_the_outputs(share, width):
    """In groups that do not divide the columns, of inputs that are correlated."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(20, 20, generator=generator)
    inputs = torch.randn(60, 20, generator=generator) @ mixed
    weight = torch.randn(7, 20, generator=generator)
    found = least_error(weight, inputs.T @ inputs, share, width)
    assert found == pytest.approx(reference.least_error(weight, inputs, share, width), rel=1e-4)


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), samples=3, sequence_length=32)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_blocks_lose_by_the_mean_error_of_their_linears(family, calibration, tmp_path):
    model = tiny.write_model(family, tmp_path / "dense", num_hidden_layers=4)
    settings = PruneSettings.checked(method="wanda", allocation="lsa", sparsity=0.7)
    manifest = prune(model, tmp_path / "out", settings, calibration)
    windows = check(model, settings, calibration, Hardware(), tune_minutes=None).windows
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    errors = []
    for block in manifest.blocks:
        own = [whole.get_submodule(f"{block.name}.{name}") for name in block.linears]
        found = [least_error(one.weight.detach(), squares(whole, one, windows)) for one in own]
        errors.append(sum(found) / len(found))
    expected = ALLOCATIONS["lsa"].rule(0.7, [1] * 4, errors, 0.15)
    assert [block.sparsity for block in manifest.blocks] == pytest.approx(expected, abs=1e-4)
    assert manifest.sparsity.achieved == pytest.approx(0.7, abs=0.01)


def squares(model, linear, windows):
    """X^T X of what enters the Linear."""
    seen = []
    handle = linear.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(windows, use_cache=False)
    handle.remove()
    rows = seen[0].flatten(0, -2)
    return rows.T @ rows


def test_without_a_spread_it_is_uniform(llama, calibration, tmp_path):
    settings = PruneSettings.checked(method="wanda", allocation="lsa", sparsity=0.7, spread=0.0)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    assert {block.sparsity for block in manifest.blocks} == {0.7}


def test_what_the_pruning_sees_is_not_spent(llama, calibration, tmp_path):
    """By its own recipe, which measures nothing, the model is the same."""
    settings = PruneSettings.checked(method="sparsegpt", allocation="lsa", sparsity=0.7)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    listed = recipe.merged(tmp_path / "out" / "recipe.yaml", {"method": "sparsegpt"})
    prune(llama, tmp_path / "again", listed, calibration)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert one == other
    assert manifest.settings.allocation == "lsa"
