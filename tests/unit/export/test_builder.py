"""What the builder is told of a model's rotary tables, and whose tables it takes."""

import pytest
import torch

from owl_deploy.export import builder, rotary
from tests import tiny

THETA = {"rope_theta": 10000.0}
LINEAR = {"rope_type": "linear", "factor": 4.0} | THETA


class Model:
    """What is of interest of the builder's."""

    def __init__(self, length):
        self.rope_attrs = {"cache_length": length}


@pytest.fixture
def model_class():
    return type("Model", (Model,), {})


def taken(model_class, *lengths):
    return [model_class(n).make_rotary_embedding_caches_from_scratch() for n in lengths]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "ropes",
    [
        THETA | {"rope_type": "default"},
        LINEAR,
        THETA | {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
    ],
    ids=lambda ropes: ropes["rope_type"],
)
def test_the_models_own_tables(model_class, family, ropes):
    wanted = rotary.halves(
        rotary.of_config(tiny.config_of(family, rope_parameters=ropes)), 512, None
    )
    config = builder.adapted(tiny.config_of(family, rope_parameters=ropes), model_class)
    assert config.rope_parameters == THETA | {"rope_type": "default"}
    ((cosine, sine),) = taken(model_class, 512)
    assert torch.equal(cosine, wanted[0])
    assert torch.equal(sine, wanted[1])


def test_gemmas_tables_in_the_builders_order(model_class):
    ropes = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"} | THETA}
    config = builder.adapted(tiny.config_of("gemma3_text", rope_parameters=ropes), model_class)
    assert config.rope_local_base_freq == 10000.0
    assert config.rope_parameters == THETA | {"rope_type": "default"}
    (whole, _), (local, _) = taken(model_class, 64, 64)
    assert torch.allclose(whole[4 * 9], local[9])
    assert not torch.allclose(whole[9], local[9])


def test_phi3s_two_tables(model_class):
    changes = {"rope_parameters": tiny.LONG_ROPE | {"attention_factor": 1.25}}
    given = tiny.config_of("phi3", original_max_position_embeddings=256, **changes)
    config = builder.adapted(given, model_class)
    assert config.rope_parameters["type"] == "longrope"
    assert config.original_max_position_embeddings == 256
    (long, _), (short, _) = taken(model_class, 512, 256)
    assert long[0, 0] == short[0, 0] == 1.25
    assert torch.allclose(long[3 * 9], short[2 * 9], atol=1e-5)


def test_a_phi3_without_longrope_has_one_table(model_class):
    given = tiny.config_of("phi3", original_max_position_embeddings=256)
    config = builder.adapted(given, model_class)
    assert config.original_max_position_embeddings == config.max_position_embeddings == 512


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_longrope_is_phi3s_alone(model_class, family):
    config = tiny.config_of(family, rope_parameters=tiny.LONG_ROPE)
    with pytest.raises(NotImplementedError, match="The longrope RoPE style is not currently"):
        builder.adapted(config, model_class)


def test_what_depends_on_the_length_is_left_to_the_builder(model_class):
    ropes = {"rope_type": "dynamic", "factor": 4.0} | THETA
    config = builder.adapted(tiny.config_of("llama", rope_parameters=ropes), model_class)
    assert config.rope_parameters == ropes
    assert not hasattr(model_class, "make_rotary_embedding_caches_from_scratch")


def test_a_model_without_any(model_class):
    builder.adapted(tiny.config_of("opt"), model_class)
    assert not hasattr(model_class, "make_rotary_embedding_caches_from_scratch")


@pytest.mark.parametrize(
    ("family", "factor"), [("llama", 1.0), ("qwen3", 1.0), ("gemma3_text", 1.0), ("phi3", 0.5)]
)
def test_a_part_of_the_head_rotates_where_the_model_has_it(model_class, family, factor):
    given = tiny.config_of(family, partial_rotary_factor=0.5)
    config = builder.adapted(given, model_class)
    told = [vars(config), *rotary.parameters(config)]
    found = {row["partial_rotary_factor"] for row in told if "partial_rotary_factor" in row}
    assert found == {factor}


@pytest.mark.parametrize(
    ("kind", "size"), [("GroupQueryAttention", 16), ("MultiHeadAttention", 24)]
)
def test_heads_that_runtimes_take(kind, size):
    model = heads(kind, size)
    model.make_attention_init(None)
    assert model.has_begun


@pytest.mark.parametrize("size", [8, 20, 24, 72])
def test_heads_that_grouped_attention_refuses(size):
    with pytest.raises(NotImplementedError, match=f"head size of {size} is not currently support"):
        heads("GroupQueryAttention", size).make_attention_init(None)


def heads(kind, size):
    """A model of the builder's with attention of a `kind`."""

    class Attention:
        attention_attrs, head_size, has_begun = {"op_type": kind}, size, False

        def make_attention_init(self, config):
            self.has_begun = True

    builder.refuse_heads(Attention)
    return Attention()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_layers_named_for_a_window_that_is_not_there(model_class, family):
    kinds = ["sliding_attention", "full_attention"]
    given = tiny.config_of(family, sliding_window=None, layer_types=kinds)
    config = builder.adapted(given, model_class)
    assert config.sliding_window is None
    assert config.layer_types == 2 * ["full_attention"]


@pytest.mark.parametrize(
    ("family", "changes", "kinds"),
    [
        ("llama", {}, None),
        ("mistral", {}, 2 * ["sliding_attention"]),
        (
            "phi3",
            {"layer_types": ["sliding_attention", "full_attention"]},
            2 * ["sliding_attention"],
        ),
        ("gemma3_text", {}, ["sliding_attention", "full_attention"]),
    ],
)
def test_the_windows_that_the_model_has(model_class, family, changes, kinds):
    config = builder.adapted(tiny.config_of(family, sliding_window=24, **changes), model_class)
    assert config.sliding_window == (24 if kinds else None)
    assert getattr(config, "layer_types", None) == kinds


@pytest.mark.parametrize(
    ("family", "final"), [("llama", None), ("qwen3", None), ("gemma3_text", 2)]
)
def test_what_the_model_does_not_read(model_class, family, final):
    given = tiny.config_of(
        family,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=2.0,
        hidden_activation="relu",
        seq_length=9999,
    )
    config = builder.adapted(given, model_class)
    assert config.hidden_activation == ("relu" if final else None)
    assert config.attn_logit_softcapping is None
    assert config.final_logit_softcapping == final
    assert not hasattr(config, "seq_length")
