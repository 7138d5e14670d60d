import pytest
import torch

from owl_deploy.compression.sublayers import halves
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.models.families import FAMILIES, family_of
from tests import tiny
from tests.reference import reconstruct as reference


@pytest.fixture(scope="module")
def skeletons(tmp_path_factory):
    """The skeleton of a family's tiny model, and what enters its first block, made once."""
    made = {}

    def of(family, **changes):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            model = tiny.write_model(family, folder / "model", **changes)
            skeleton = Skeleton(open_checkpoint(str(model)), torch.float32, torch.device("cpu"))
            ids = torch.arange(96).view(2, 48)
            made[family] = skeleton, skeleton.embed(ids, 2, folder)
        return made[family]

    return of


def run(skeleton, states, half=None):
    with skeleton.loaded(skeleton.names[0]) as block, torch.no_grad():
        whole = block(states.hidden, **states.arguments[0])
        found = [states.hidden]
        for one in halves(skeleton.family):
            found.append(one.of(block)(found[-1], **states.arguments[0]))
        by_hand = half and half(block, states.hidden, states.arguments[0])
        again = block(states.hidden, **states.arguments[0])
    return whole, found[1:], again, by_hand


@pytest.mark.parametrize("family", FAMILIES)
def test_one_half_after_the_other_is_the_block(skeletons, family):
    skeleton, states = skeletons(family)
    whole, found, again, _ = run(skeleton, states)
    assert torch.equal(found[-1], whole)
    assert torch.equal(again, whole)  # the attention is there again
    assert len(found) == (1 if family == "gpt_neox" else 2)


@pytest.mark.parametrize("family", reference.HALVES)
def test_the_first_is_what_attention_adds(skeletons, family):
    skeleton, states = skeletons(family)
    _, found, _, by_hand = run(skeleton, states, reference.HALVES[family][0])
    assert torch.equal(found[0], by_hand)
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_is_in_one_half(skeletons, family):
    skeleton, _ = skeletons(family)
    for name in skeleton.linears(0):
        holding = [half.name for half in halves(skeleton.family) if half.holds(name)]
        assert len(holding) == 1
        attention = "attn" in name
        assert holding[0] in ("block", "attention" if attention else "mlp")


def test_an_opt_with_its_norms_at_the_end_is_not_divided():
    assert halves(family_of({"model_type": "opt"}))[0].name == "attention"
    asked = {"model_type": "opt", "do_layer_norm_before": False}
    family = family_of(asked)
    assert [half.name for half in halves(family)] == ["block"]
    assert not family.writers  # what they write is not added as it is


def test_gradients_reach_what_the_half_uses_and_nothing_else(skeletons):
    skeleton, states = skeletons("llama")
    with skeleton.loaded(skeleton.names[0]) as block:
        block.requires_grad_(True)
        for half in halves(skeleton.family):
            block.zero_grad()
            half.of(block)(states.hidden, **states.arguments[0]).square().sum().backward()
            reached = {name for name, p in block.named_parameters() if p.grad is not None}
            own = {f"{name}.weight" for name in skeleton.linears(0) if half.holds(name)}
            norm = "input" if half.name == "attention" else "post_attention"
            assert reached == own | {f"{norm}_layernorm.weight"}
