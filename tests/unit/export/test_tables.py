"""A graph whose rotary tables are not the model's fails, however late the difference shows."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from owl_deploy.export import rotary, tables
from owl_deploy.export.parity import ParityFailed
from tests import tiny

LENGTH = 4000
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def model_of(family="llama", **changes):
    config = tiny.config_of(family, **({"max_position_embeddings": LENGTH} | changes))
    return nn.ModuleDict({"rotary_emb": rotary.of_config(config)})


def arrays(model, length=LENGTH, layer_type=None):
    cosine, sine = rotary.halves(model["rotary_emb"], length, layer_type)
    return {"cos_cache": cosine.numpy().copy(), "sin_cache": sine.numpy().copy()}


def write(folder, initializers, branches=()):
    """A graph with these tables; those of `branches` are chosen by a condition, as Phi-3's are."""
    graph = helper.make_graph(
        [],
        "g",
        [helper.make_tensor_value_info("large", TensorProto.BOOL, [])],
        [],
        [numpy_helper.from_array(array, name) for name, array in initializers.items()],
    )
    if branches:
        sides = {
            side: helper.make_graph(
                [
                    helper.make_node(
                        "Constant", [], [name], value=numpy_helper.from_array(array, name)
                    )
                    for name, array in tensors.items()
                ],
                side,
                [],
                [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors],
            )
            for side, tensors in zip(("then_branch", "else_branch"), branches, strict=True)
        }
        graph.node.append(helper.make_node("If", ["large"], ["cos_cache", "sin_cache"], **sides))
    onnx.save(helper.make_model(graph), folder / "model.onnx")


def test_the_models_own_tables_pass(tmp_path):
    model = model_of(rope_parameters=LINEAR)
    write(tmp_path, arrays(model))
    tables.check(tmp_path, model)


def rounded(model):
    """As of frequencies that differ in their last places."""
    angles = torch.outer(torch.arange(LENGTH).float(), model["rotary_emb"].inv_freq * (1 + 2e-7))
    return {"cos_cache": angles.cos().numpy(), "sin_cache": angles.sin().numpy()}


def test_another_rounding_passes(tmp_path):
    model = model_of(rope_parameters=LINEAR)
    write(tmp_path, rounded(model))
    tables.check(tmp_path, model)


def change(name, index, by):
    def damage(own):
        own[name][index] *= by

    return damage


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change("sin_cache", LENGTH - 1, 1.5), "sin_cache is not the model's from position 3999"),
        (change("cos_cache", slice(None), 1.001), "cos_cache .* from position 0 on"),
        (change("cos_cache", (5, 3), np.nan), "cos_cache .* from position 5 on"),
        (lambda own: own.update(sin_cache=own["sin_cache"][:, :4]), "of another width"),
    ],
)
def test_other_tables_fail(tmp_path, damage, complaint):
    model = model_of(rope_parameters=LINEAR)
    own = arrays(model)
    damage(own)
    write(tmp_path, own)
    with pytest.raises(ParityFailed, match=complaint) as failed:
        tables.check(tmp_path, model)
    assert "\n" not in str(failed.value)


def test_a_scaling_that_was_ignored_fails(tmp_path):
    write(tmp_path, arrays(model_of(rope_parameters=PLAIN)))
    with pytest.raises(ParityFailed, match="from position 1 on"):
        tables.check(tmp_path, model_of(rope_parameters=LINEAR))


@pytest.mark.parametrize("scaled", ["full_attention", "sliding_attention"])
def test_each_type_of_layer_has_its_own(tmp_path, scaled):
    ropes = {"full_attention": PLAIN, "sliding_attention": PLAIN}
    plain = model_of("gemma3_text", rope_parameters=ropes)
    model = model_of("gemma3_text", rope_parameters=ropes | {scaled: LINEAR})
    parts = {"full_attention": "global", "sliding_attention": "local"}
    right, wrong = {}, {}
    for layer_type, part in parts.items():
        for kind, found in ((model, right), (plain, wrong)):
            own = arrays(kind, layer_type=layer_type)
            found |= {f"{name}_{part}": array for name, array in own.items()}
    write(tmp_path, right)
    tables.check(tmp_path, model)
    write(tmp_path, wrong)
    with pytest.raises(ParityFailed, match=f"cos_cache_{parts[scaled]} is not"):
        tables.check(tmp_path, model)


def test_tables_in_branches(tmp_path):
    model = model_of("phi3", original_max_position_embeddings=256, rope_parameters=tiny.LONG_ROPE)
    short, long = arrays(model, 256), arrays(model)
    assert np.abs(short["cos_cache"] - long["cos_cache"][:256]).max() > 0.1
    sides = [
        {f"{name}_{part}": array for name, array in own.items()}
        for part, own in (("large", long), ("small", short))
    ]
    write(tmp_path, {}, sides)
    tables.check(tmp_path, model)
    sides[1]["sin_cache_small"] = long["sin_cache"][:256]
    write(tmp_path, {}, sides)
    with pytest.raises(ParityFailed, match="sin_cache_small is not the model's from position 1 on"):
        tables.check(tmp_path, model)


def test_what_has_no_tables_is_not_judged(tmp_path):
    model = model_of()
    tables.check(tmp_path, model)  # a GGUF
    write(tmp_path, {"cosine": np.zeros((4, 4), np.float32)})
    tables.check(tmp_path, model)
    write(tmp_path, {"cos_cache": np.zeros((4, 4), np.float32)})
    tables.check(tmp_path, nn.ModuleDict())  # OPT
