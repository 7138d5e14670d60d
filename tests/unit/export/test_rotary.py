"""A model's rotary tables by its own module."""

import pytest
import torch
import transformers

from owl_deploy.export import rotary
from tests import tiny

GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}


def test_a_module_without_the_weights():
    config = tiny.config_of("llama")
    model = transformers.AutoModelForCausalLM.from_config(config)
    own = rotary.modules(model)
    assert list(own) == ["model.rotary_emb"]
    module = rotary.of_config(config)
    assert torch.equal(module.inv_freq, own["model.rotary_emb"].inv_freq)
    assert rotary.layer_types(module) == [None]
    positions = torch.tensor([3, 400])
    cosine, sine = rotary.tables(module, positions)
    wanted = model.model.rotary_emb(torch.zeros(1), positions[None])
    assert torch.equal(cosine, wanted[0][0])
    assert torch.equal(sine, wanted[1][0])


def test_halves_leave_out_what_repeats():
    module = rotary.of_config(tiny.config_of("llama"))
    cosine, sine = rotary.halves(module, 40, None)
    whole = rotary.tables(module, torch.arange(40))
    assert torch.equal(torch.cat([cosine, cosine], 1), whole[0])
    assert torch.equal(torch.cat([sine, sine], 1), whole[1])


def test_layers_that_a_model_does_not_have():
    ropes = {"rope_parameters": GEMMA_ROPES, "layer_types": ["full_attention"] * 2}
    module = rotary.of_config(tiny.config_of("gemma3_text", **ropes))
    assert rotary.layer_types(module) == ["full_attention"]
    other, own = (rotary.halves(module, 9, f"{kind}_attention") for kind in ("sliding", "full"))
    assert torch.equal(other[0], own[0])


@pytest.mark.parametrize(
    ("family", "changes", "found"),
    [
        ("llama", {}, ["default"]),
        ("gemma3_text", {"rope_parameters": GEMMA_ROPES}, ["default", "linear"]),
        ("opt", {}, []),
    ],
)
def test_parameters_are_rows(family, changes, found):
    rows = rotary.parameters(tiny.config_of(family, **changes))
    assert sorted(row["rope_type"] for row in rows) == found
