"""The traced graph holds DeepSparse's contract, and tracing leaves the model as it was."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
import transformers

from owl_deploy.export import describe, traced
from owl_deploy.export.parity import Session
from owl_deploy.export.source import Source
from tests.unit.export.conftest import ALL_EXTERNAL, ALL_INLINE

INT64, FLOAT = onnx.TensorProto.INT64, onnx.TensorProto.FLOAT


def axes(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.fixture
def graph(source, build):
    return onnx.load(build(source) / "model.onnx").graph


def test_inputs_and_outputs(graph):
    plain = {
        "input_ids": ["batch", "tokens"],
        "attention_mask": ["batch", "total"],
        "positions": ["batch", "tokens"],
        "causal_mask": ["batch", 1, "tokens", "total"],
    }
    cache = [f"{layer}.{kind}" for layer in (0, 1) for kind in ("key", "value")]
    inputs = {value.name: value for value in graph.input}
    assert list(inputs) == [*plain, *(f"past_key_values.{name}" for name in cache)]
    for name, value in inputs.items():
        assert axes(value) == plain.get(name, ["batch", 4, "past", 16])
        assert value.type.tensor_type.elem_type == (INT64 if name in plain else FLOAT)
    assert [value.name for value in graph.output] == ["logits", *(f"present.{n}" for n in cache)]
    assert axes(graph.output[0]) == ["batch", "tokens", 320]
    assert all(axes(value) == ["batch", 4, "total", 16] for value in graph.output[1:])


def test_every_input_takes_part(graph):
    read = {name for node in graph.node for name in node.input}
    assert {value.name for value in graph.input} <= read


def test_versions_that_deepsparse_reads(source, build):
    model = onnx.load(build(source) / "model.onnx")
    assert model.ir_version <= 9
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 14)]
    onnx.checker.check_model(model)


def test_cache_is_one_concat_behind_the_repeated_heads(graph):
    made = {output: node for node in graph.node for output in node.output}
    for value in graph.output[1:]:
        concat = made[value.name]
        past = value.name.replace("present", "past_key_values")
        assert concat.op_type == "Concat"
        assert concat.input[0] == past
        assert [a.i for a in concat.attribute if a.name == "axis"] == [2]
        chain, name = [], concat.input[1]
        for _ in range(3):
            chain.append(made[name].op_type)
            name = made[name].input[0]
        assert chain == ["Reshape", "Expand", "Unsqueeze"]
        readers = {node.op_type for node in graph.node if value.name in node.input}
        assert readers <= {"MatMul", "Transpose"}
        assert readers


def test_rotary_is_a_table_at_positions(graph):
    counted = Counter(node.op_type for node in graph.node)
    assert not {"Cos", "Sin", "Range", "Shape", "Constant", "Einsum"} & set(counted)
    gathers = {node.input[0] for node in graph.node if "positions" in node.input}
    tables = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    assert [tables[name] for name in sorted(gathers)] == [[512, 16], [512, 16]]


def test_weights_are_constants_of_matrix_products(graph, source):
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    constant = [n for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors]
    assert len(constant) == 2 * 7 + 1
    state = source.model.state_dict()
    embedding = state["model.embed_tokens.weight"].numpy()
    head = onnx.numpy_helper.to_array(tensors[constant[-1].input[1]])
    np.testing.assert_array_equal(head, embedding.T)
    gather = next(node for node in graph.node if "input_ids" in node.input)
    rows = onnx.numpy_helper.to_array(tensors[gather.input[0]])
    np.testing.assert_array_equal(rows, embedding)


def test_an_untied_head_is_its_own(untied, build):
    source = Source(untied)
    weights = describe.graph(build(source) / "model.onnx")["weights"]
    shapes = [row["shape"] for row in weights.values() if 320 in row["shape"]]
    assert sorted(shapes) == [[64, 320], [320, 64]]
    head = source.model.lm_head.weight
    assert int(head.count_nonzero()) in [row["nonzeros"] for row in weights.values()]


def test_external_data_computes_the_same(source, build, tmp_path):
    folder = build(source, ALL_EXTERNAL)
    tokens = source.prompt()
    inline = tmp_path / "inline"
    inline.mkdir()
    traced.build(source, inline, ALL_INLINE)
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert (folder / "model.onnx").stat().st_size < (inline / "model.onnx").stat().st_size / 2
    places = [
        {entry.key: entry.value for entry in tensor.external_data}
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert {place["location"] for place in places} == {"model.onnx.data"}
    assert all(int(place["offset"]) % 4096 == 0 for place in places)
    np.testing.assert_array_equal(Session(folder).step(tokens), Session(inline).step(tokens))


def test_batches_of_any_size(source, build):
    folder = build(source)
    heads = traced.Heads.of(source.model.config)
    session = Session(folder)._session
    one = traced.example(heads, 1, 5, 2)
    three = {name: value.repeat_interleave(3, 0) for name, value in one.items()}
    first, repeated = (
        session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0]
        for inputs in (one, three)
    )
    assert repeated.shape == (3, 5, 320)
    np.testing.assert_allclose(repeated, np.repeat(first, 3, axis=0), atol=1e-4)


def test_tracing_leaves_the_model_as_it_was(llama, build):
    source = Source(llama)
    rotary = source.model.model.rotary_emb
    tokens = torch.tensor([source.prompt()])
    with torch.inference_mode():
        before = source.model(input_ids=tokens).logits
    build(source)
    assert source.model.model.rotary_emb is rotary
    assert source.model.config._attn_implementation == "sdpa"
    assert not any(module.training for module in source.model.modules())
    with torch.inference_mode():
        assert torch.equal(source.model(input_ids=tokens).logits, before)


def test_a_window_counts_what_may_be_seen():
    # One padded place, then five tokens; two queries at the end, a window of three.
    allowed = torch.tensor([[[[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1.0]]]])
    seen = (traced._within(allowed, 3) * allowed)[0, 0]
    assert seen.tolist() == [[0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, 4096),
        ({"rope_type": "llama3", "original_max_position_embeddings": 1024}, 4096),
        ({"rope_type": "longrope", "original_max_position_embeddings": 1024}, 1024),
        ({"local": {"rope_type": "default"}, "far": {"rope_type": "linear"}, "none": None}, 4096),
        (None, 4096),
    ],
)
def test_context_for_which_a_rotary_table_is_exact(rope, expected):
    config = SimpleNamespace(max_position_embeddings=4096, rope_parameters=rope)
    assert traced.max_context(config) == expected


def other_families():
    sizes = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    full = {key: value for key, value in sizes.items() if key != "num_key_value_heads"}
    opt = {key: value for key, value in full.items() if key != "intermediate_size"}
    return {
        "llama3": transformers.LlamaConfig(
            **sizes, rope_parameters=scaled | {"original_max_position_embeddings": 64}
        ),
        "mistral": transformers.MistralConfig(**sizes, sliding_window=24),
        "qwen2": transformers.Qwen2Config(**sizes),
        "qwen3": transformers.Qwen3Config(**sizes, head_dim=32),
        "gemma3": transformers.Gemma3TextConfig(
            **sizes, head_dim=32, sliding_window=24, layer_types=kinds, query_pre_attn_scalar=32
        ),
        "phi3": transformers.Phi3Config(**sizes),
        "opt": transformers.OPTConfig(**opt, ffn_dim=96, word_embed_proj_dim=64),
        "gpt_neox": transformers.GPTNeoXConfig(**full, rotary_pct=0.25),
    }


@pytest.mark.parametrize("name", other_families())
def test_no_family_needs_code_of_its_own(name, build):
    """The families that are to come trace as they are; their windows are exact."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(other_families()[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(5)
    tokens = [(7 + 13 * i) % 320 for i in range(60)]
    with torch.inference_mode():
        wanted = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    session = Session(build(SimpleNamespace(model=model, config={"model_type": name}, folder=".")))
    for padding in (0, 5):
        session.start(padding)
        got = np.concatenate([session.step(tokens[:40]), session.step(tokens[40:])])
        assert np.abs(got - wanted).max() < 1e-4 * np.abs(wanted).max()
