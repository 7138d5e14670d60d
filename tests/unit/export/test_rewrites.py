"""Each rewrite on a small graph made by hand: what it rewrites, and what it must leave alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.export import rewrites
from owl_deploy.export.grid import Grid
from owl_deploy.export.rewriter import Head, Rewriter
from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import Values

RNG = np.random.default_rng(0)
GATED = [("MatMul", "x g", "a"), ("MatMul", "x u", "b"), ("Sigmoid", "a", "s")]
SILU = [*GATED, ("Mul", "a s", "c"), ("Mul", "c b", "y")]


def weight(*shape: int, density: float = 0.3) -> np.ndarray:
    """Random, mostly zeros."""
    values = RNG.standard_normal(shape).astype(np.float32)
    return np.where(RNG.random(shape) < density, values, np.float32(0))


def node(kind: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """`_` is an input or output that is left out."""
    names = [[n.strip("_") for n in text.split()] for text in (inputs, outputs)]
    return helper.make_node(kind, *names, name=f"{kind} of {outputs}", **attributes)


def rewriter(
    nodes: Sequence[onnx.NodeProto | tuple[str, str, str]],
    weights: dict[str, np.ndarray],
    outputs: str = "y",
    inputs: Sequence[onnx.ValueInfoProto] = (),
) -> Rewriter:
    made = [n if isinstance(n, onnx.NodeProto) else node(*n) for n in nodes]
    graph = helper.make_graph(
        made,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8]), *inputs],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs.split()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return Rewriter(ir.from_proto(helper.make_model(graph)), "fp32", "fp32")


def names(values: Sequence[ir.Value | None]) -> list[str | None]:
    return [value.name if value else "" for value in values]


def unpacked(rewriter: Rewriter, name: str | None) -> np.ndarray:
    tensor = rewriter.model.graph.initializers[str(name)].const_value
    assert tensor is not None
    return pack.unpack(tensor.numpy())


def kinds(rewriter: Rewriter) -> list[str]:
    return [n.op_type for n in rewriter.model.graph]


def attributes(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


# ---- fuse_gated --------------------------------------------------------------------------------


@pytest.mark.parametrize("swapped", [False, True])
def test_silu_gate_and_up_become_one(swapped: bool) -> None:
    last = [("Mul", "s a", "c"), ("Mul", "b c", "y")] if swapped else SILU[3:]
    weights = {"g": weight(8, 20), "u": weight(8, 20)}
    graph = rewriter([*GATED, *last], weights)
    assert rewrites.fuse_gated(graph) == 1
    (fused,) = graph.model.graph
    assert (fused.op_type, fused.domain, names(fused.outputs)) == ("SparseMatMul", "ai.owl", ["y"])
    assert attributes(fused) == {"epilogue": "silu_mul", "columns": 20}
    both = unpacked(graph, fused.inputs[1].name)
    np.testing.assert_array_equal(both, pack.interleave_gate_up(weights["g"].T, weights["u"].T))


@pytest.mark.parametrize(
    ("gelu", "fused"),
    [
        (node("FastGelu", "a", "c", domain="com.microsoft"), 1),
        (node("FastGelu", "a k", "c", domain="com.microsoft"), 0),  # it adds a bias first
        (node("Gelu", "a", "c", approximate="tanh"), 1),
        (node("Gelu", "a", "c"), 0),  # the exact one is another function
    ],
)
def test_only_the_tanh_gelu_is_fused(gelu: onnx.NodeProto, fused: int) -> None:
    nodes = [*GATED[:2], gelu, ("Mul", "c b", "y")]
    graph = rewriter(nodes, {"g": weight(8, 20), "u": weight(8, 20), "k": weight(20)})
    assert rewrites.fuse_gated(graph) == fused
    assert (attributes(graph.model.graph[0]).get("epilogue") == "gelu_mul") == bool(fused)


@pytest.mark.parametrize(
    ("nodes", "weights", "outputs"),
    [
        (SILU, {"g": (8, 20), "u": (8, 24)}, "y"),  # would not multiply anyway
        (SILU, {"g": (8, 20)}, "y"),  # up is no constant
        (SILU, {"g": (8, 20), "u": (8, 20)}, "y b"),  # up is also an output
        (SILU, {"g": (8, 20), "u": (8, 20)}, "y s"),
        (SILU, {"g": (8, 20), "u": (8, 20)}, "y a"),
        ([*SILU, ("Neg", "a", "z")], {"g": (8, 20), "u": (8, 20)}, "y z"),  # gate is read again
        ([*GATED, ("Mul", "b s", "y")], {"g": (8, 20), "u": (8, 20)}, "y"),  # no silu
        (
            [("MatMul", "x g", "a"), ("MatMul", "z u", "b"), *SILU[2:]],
            {"g": (8, 20), "u": (8, 20)},
            "y",
        ),  # of two inputs
    ],
)
def test_other_products_are_left_alone(
    nodes: list[tuple[str, str, str]], weights: dict[str, tuple[int, int]], outputs: str
) -> None:
    graph = rewriter(nodes, {name: weight(*shape) for name, shape in weights.items()}, outputs)
    before = kinds(graph)
    assert rewrites.fuse_gated(graph) == 0
    assert kinds(graph) == before
    assert not graph.packed


# ---- replace_matmuls ---------------------------------------------------------------------------


def test_matmuls_with_and_without_bias() -> None:
    nodes = [("MatMul", "x w", "a"), ("Add", "bias a", "b"), ("MatMul", "b v", "y")]
    weights = {"w": weight(8, 20), "v": weight(20, 4), "bias": weight(20)}
    graph = rewriter(nodes, weights)
    assert rewrites.replace_matmuls(graph) == 2
    first, last = graph.model.graph
    assert names(first.inputs) == ["x", "w.packed", "bias"]
    assert names(first.outputs) == ["b"]
    assert names(last.inputs) == ["b", "v.packed"]
    np.testing.assert_array_equal(unpacked(graph, "w.packed"), weights["w"].T)
    assert graph.packed["w.packed"].sparse
    assert not graph.packed["v.packed"].sparse  # the head, tied to an embedding


@pytest.mark.parametrize(
    ("added", "shape"),
    [("a r", None), ("a bias", (4, 20)), ("a bias", (1,)), ("a a", None)],
)
def test_what_is_no_bias_stays_an_addition(added: str, shape: tuple[int, ...] | None) -> None:
    nodes = [("MatMul", "x w", "a"), ("Add", added, "y")]
    weights = {"w": weight(8, 20)} | ({} if shape is None else {"bias": weight(*shape)})
    graph = rewriter(nodes, weights)
    assert rewrites.replace_matmuls(graph) == 1
    assert kinds(graph) == ["SparseMatMul", "Add"]


def test_a_bias_whose_product_others_read_stays() -> None:
    nodes = [("MatMul", "x w", "a"), ("Add", "a bias", "y"), ("Neg", "a", "z")]
    graph = rewriter(nodes, {"w": weight(8, 20), "bias": weight(20)}, "y z")
    assert rewrites.replace_matmuls(graph) == 1
    assert kinds(graph) == ["SparseMatMul", "Add", "Neg"]


@pytest.mark.parametrize("array", [weight(2, 8, 4), weight(8, 4).astype(np.float16)])
def test_weights_of_other_kinds_are_left_alone(array: np.ndarray) -> None:
    graph = rewriter([("MatMul", "x w", "y")], {"w": array})
    assert rewrites.replace_matmuls(graph) == 0
    assert kinds(graph) == ["MatMul"]


def test_products_of_two_activations_are_left_alone() -> None:
    graph = rewriter([("MatMul", "x x", "y")], {})
    assert rewrites.replace_matmuls(graph) == 0


@pytest.mark.parametrize(("density", "is_sparse"), [(0.3, True), (1.0, False)])
def test_dense_weights_are_stored_whole(density: float, is_sparse: bool) -> None:
    nodes = [("MatMul", "x w", "a"), ("Neg", "a", "y")]
    graph = rewriter(nodes, {"w": weight(8, 20, density=density)})
    rewrites.replace_matmuls(graph)
    assert graph.packed["w.packed"].sparse is is_sparse


@pytest.mark.parametrize("head", ["screened", "whole"])
@pytest.mark.parametrize("precision", ["int8", "bf16", "fp32"])
def test_a_screened_head_is_int8(precision: Values, head: Head) -> None:
    nodes = [("MatMul", "x w", "a"), ("MatMul", "a v", "y")]
    graph = rewriter(nodes, {"w": weight(8, 20), "v": weight(20, 40)})
    graph.precision, graph.head = precision, head
    rewrites.replace_matmuls(graph)
    body, last = (graph.packed[f"{name}.packed"] for name in "wv")
    assert (body.sparse, body.planes) == (True, False)
    assert (last.sparse, last.planes) == (False, head == "screened")
    assert (body.values, last.values) == (precision, "int8" if head == "screened" else precision)


# ---- fuse_norms --------------------------------------------------------------------------------

SKIP = "SkipSimplifiedLayerNormalization"


def after_matmuls(nodes: list[Any], outputs: str = "y") -> Rewriter:
    weights = {"w": weight(8, 20), "v": weight(8, 20), "gamma": weight(8)}
    graph = rewriter(nodes, weights, outputs)
    rewrites.replace_matmuls(graph)
    return graph


def test_a_norm_goes_into_its_only_reader() -> None:
    norm = node("SimplifiedLayerNormalization", "x gamma", "n", epsilon=1e-6, axis=-1)
    graph = after_matmuls([norm, ("MatMul", "n w", "y")])
    assert rewrites.fuse_norms(graph) == 1
    (fused,) = graph.model.graph
    assert names(fused.inputs) == ["x", "w.packed", "", "", "gamma"]
    assert attributes(fused)["epsilon"] == pytest.approx(1e-6)
    assert names(fused.outputs) == ["y"]


def test_a_residual_sum_comes_out_of_the_fused_norm() -> None:
    norm = node(SKIP, "x skip gamma", "n _ _ sum", epsilon=1e-5)
    graph = after_matmuls([norm, ("MatMul", "n w", "y"), ("Neg", "sum", "z")], "y z")
    assert rewrites.fuse_norms(graph) == 1
    fused = next(n for n in graph.model.graph if n.op_type == "SparseMatMul")
    assert names(fused.inputs) == ["x", "w.packed", "", "skip", "gamma"]
    assert names(fused.outputs) == ["y", "sum"]
    order = kinds(graph)
    assert order.index("SparseMatMul") < order.index("Neg")


def test_each_of_several_readers_norms_for_itself() -> None:
    norm = node("SimplifiedLayerNormalization", "x gamma", "n", epsilon=1e-6)
    graph = after_matmuls([norm, ("MatMul", "n w", "y"), ("MatMul", "n v", "z")], "y z")
    assert rewrites.fuse_norms(graph) == 1
    assert [names(fused.inputs) for fused in graph.model.graph] == [
        ["x", f"{name}.packed", "", "", "gamma"] for name in "wv"
    ]
    assert [attributes(n)["epsilon"] for n in graph.model.graph] == pytest.approx([1e-6, 1e-6])


def test_only_the_first_of_several_readers_adds() -> None:
    norm = node(SKIP, "x skip gamma", "n _ _ sum", epsilon=1e-5)
    readers = [("MatMul", "n w", "y"), ("MatMul", "n v", "z"), ("Neg", "sum", "s")]
    graph = after_matmuls([norm, *readers], "y z s")
    assert rewrites.fuse_norms(graph) == 1
    first, second = (n for n in graph.model.graph if n.op_type == "SparseMatMul")
    assert names(first.inputs) == ["x", "w.packed", "", "skip", "gamma"]
    assert names(first.outputs) == ["y", "sum"]
    assert names(second.inputs) == ["sum", "v.packed", "", "", "gamma"]
    assert names(second.outputs) == ["z"]


@pytest.mark.parametrize(
    ("norm", "more", "outputs"),
    [
        (
            node("SimplifiedLayerNormalization", "x gamma", "n"),
            [("Neg", "n", "z")],
            "y z",
        ),  # read by another operator
        (node(SKIP, "x skip gamma", "n"), [("MatMul", "n v", "z")], "y z"),  # two, and no sum
        (node("SimplifiedLayerNormalization", "x gamma", "n"), [], "y n"),  # is an output
        (node("SimplifiedLayerNormalization", "x gamma", "n", axis=1), [], "y"),
        (node(SKIP, "x skip gamma beta", "n"), [], "y"),  # with a bias
        (node(SKIP, "x skip gamma", "n mean"), [("Neg", "mean", "z")], "y z"),
    ],
)
def test_other_norms_are_left_alone(
    norm: onnx.NodeProto, more: list[tuple[str, str, str]], outputs: str
) -> None:
    graph = after_matmuls([norm, ("MatMul", "n w", "y"), *more], outputs)
    before = kinds(graph)
    assert rewrites.fuse_norms(graph) == 0
    assert kinds(graph) == before


# ---- replace_embedding -------------------------------------------------------------------------


def test_a_tied_embedding_reads_the_heads_weight() -> None:
    nodes = [
        ("Transpose", "w", "table"),
        ("Gather", "table input_ids", "e"),
        ("MatMul", "e w", "y"),
    ]
    graph = rewriter(nodes, {"w": weight(8, 20)})
    rewrites.replace_matmuls(graph)
    assert rewrites.replace_embedding(graph) == 1
    gather = next(n for n in graph.model.graph if n.op_type == "PackedGather")
    assert names(gather.inputs) == ["input_ids", "w.packed"]
    assert len(graph.packed) == 1
    assert rewrites.drop_unused(graph) == 1  # the Transpose
    assert list(graph.model.graph.initializers) == ["w.packed"]


@pytest.mark.parametrize(
    ("precision", "of_table"),
    [("bf16", "bf16"), ("int8", "int8"), ("int4", "int4"), ("int3", "int4")],
)
def test_an_embedding_of_its_own_is_packed_whole(precision: Values, of_table: str) -> None:
    graph = rewriter([("Gather", "table input_ids", "y")], {"table": weight(20, 8)})
    graph.precision = precision
    assert rewrites.replace_embedding(graph) == 1
    assert not graph.packed["table.packed"].sparse
    assert graph.packed["table.packed"].values == of_table


@pytest.mark.parametrize(
    ("gather", "kind"),
    [
        (node("Gather", "table other", "y"), np.float32),
        (node("Gather", "table input_ids", "y", axis=1), np.float32),
        (node("Gather", "table input_ids", "y"), np.float16),
    ],
)
def test_other_gathers_are_left_alone(gather: onnx.NodeProto, kind: type) -> None:
    graph = rewriter([gather], {"table": weight(20, 8).astype(kind)})
    assert rewrites.replace_embedding(graph) == 0
    assert kinds(graph) == ["Gather"]


# ---- split_attention ---------------------------------------------------------------------------


def joined_attention(
    bits: str, dense: str = "qkv", *, bias: bool = False, apart: bool = False
) -> Rewriter:
    """q [64], k and v [32 each] of 8 inputs, of so many bits each, or none ("_"); those not
    `dense` are sparse. `apart`: a Split takes them apart, as where q and k have norms.
    """
    parts = {
        name: 4.0 * (weight(8, rows, density=1.0 if name in dense else 0.3) != 0)
        for name, rows in {"q": 64, "k": 32, "v": 32}.items()
    }
    whole = np.concatenate([parts[name] for name in "qkv"], axis=1).astype(np.float32)
    name = "model.layers.0.attn.qkv_proj.MatMul.weight"
    made = [("MatMul", f"x {name}", "p"), ("Add", "p b", "q")]
    made = made if bias else [("MatMul", f"x {name}", "q")]
    entering = GROUPED.replace("q _ _", "qn kn v") if apart else GROUPED
    grouped = node("GroupQueryAttention", entering, "y k1 v1", domain="com.microsoft", **USUAL)
    if apart:
        norms = [("Identity", "qs", "qn"), ("Identity", "ks", "kn")]
        made += [node("Split", "q sizes", "qs ks v", axis=-1), *norms]
    values = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 2, "p", 16]) for n in ("k0", "v0")
    ]
    weights = {name: whole, "b": np.arange(128, dtype=np.float32), "sizes": np.array([64, 32, 32])}
    graph = rewriter([*made, grouped], weights, "y k1 v1", inputs=values)
    linears = [f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]
    scales = [np.ones((rows, 1), np.float32) for rows in (64, 32, 32)]
    known = {linear: int(n) for linear, n in zip(linears, bits, strict=True) if n != "_"}
    kept = {linear: scale for linear, scale in zip(linears, scales, strict=True) if linear in known}
    graph.precision, graph.grid = "int4", Grid(known, 32, kept, chosen=len({*bits}) > 1)
    return graph


@pytest.mark.parametrize(("bias", "apart"), [(False, False), (True, False), (True, True)])
def test_q_k_and_v_of_different_bits_are_stored_each_in_its_own(bias: bool, apart: bool) -> None:
    graph = joined_attention("448", bias=bias, apart=apart)
    whole = graph.model.graph.initializers["model.layers.0.attn.qkv_proj.MatMul.weight"]
    dense = whole.const_value.numpy()  # type: ignore[union-attr]
    assert rewrites.split_attention(graph) == 1
    made = graph.nodes("SparseMatMul")
    norms, grouped = graph.nodes("Identity"), graph.nodes("GroupQueryAttention")[0]
    assert len(graph.model.graph) == 3 + len(norms) + 1
    entering = [one.inputs[0] for one in norms] + list(grouped.inputs[len(norms) : 3])
    assert [n.outputs[0] for n in made] == entering
    start = 0
    for matmul, bits in zip(made, (4, 4, 8), strict=True):
        info = graph.packed[str(matmul.inputs[1].name)]
        part = slice(start, start := start + info.rows)
        assert info.values == f"int{bits}"
        np.testing.assert_array_equal(unpacked(graph, matmul.inputs[1].name), dense[:, part].T)
        if bias:
            kept = matmul.inputs[2].const_value.numpy()
            np.testing.assert_array_equal(kept, np.arange(128)[part])
    assert graph.on_grid == 3


@pytest.mark.parametrize(
    ("bits", "dense", "split"),
    [
        *[("444", "qkv", 0), ("888", "qkv", 0), ("444", "", 0), ("444", "v", 1), ("484", "qkv", 1)],
        ("44_", "qkv", 1),  # v has no grid, and is rounded by itself
    ],
)
def test_only_what_differs_is_split(bits: str, dense: str, split: int) -> None:
    graph = joined_attention(bits, dense)
    assert rewrites.split_attention(graph) == split
    assert graph.on_grid == (3 - bits.count("_") if split else 0)
    assert rewrites.replace_matmuls(graph) == 1 - split
    sparse = [info.sparse for info in graph.packed.values()]
    assert sparse == ([name not in dense for name in "qkv"] if split else [dense == ""])


# ---- replace_attention -------------------------------------------------------------------------

GROUPED = "q _ _ k0 v0 lengths total cos sin"
USUAL = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "do_rotary": 1, "local_window_size": -1}


def attention(
    inputs: str = GROUPED,
    outputs: str = "y k1 v1",
    cache: int = TensorProto.FLOAT,
    size: int = 16,
    cosines: bool = True,
    **changes: Any,
) -> Rewriter:
    values = [
        helper.make_tensor_value_info(name, cache, ["b", 2, "p", size]) for name in ("k0", "v0")
    ]
    tables = {"cos": weight(32, 8), "sin": weight(32, 8)} if cosines else {}
    grouped = node(
        "GroupQueryAttention", inputs, outputs, domain="com.microsoft", **USUAL | changes
    )
    graph = rewriter([grouped], tables, "y k1 v1", inputs=values)
    graph.cache = "fp16"
    return graph


def test_attention_is_replaced_and_its_cache_is_halved() -> None:
    graph = attention(softcap=5.0)
    assert rewrites.replace_attention(graph) == 1
    (new,) = graph.model.graph
    assert (new.op_type, new.domain) == ("CachedAttention", "ai.owl")
    assert attributes(new)["softcap"] == 5.0
    inner = graph.model.graph
    types = {value.name: value.dtype for value in (*inner.inputs, *inner.outputs)}
    assert {types[n] for n in ("k0", "v0", "k1", "v1")} == {ir.DataType.FLOAT16}
    assert types["x"] == types["y"] == ir.DataType.FLOAT


@pytest.mark.parametrize(
    "changes",
    [
        {"smooth_softmax": 1},
        {"sliding_window_cache": 1},
        {"kv_num_heads": 3},
        {"size": 24},
        {"size": 512},
        {"cache": TensorProto.FLOAT16},
        {"cosines": False},  # tables that the graph computes
        {"inputs": f"{GROUPED} position_ids"},
        {"outputs": "y k1 v1 scores"},
    ],
    ids=str,
)
def test_other_attention_is_left_to_onnxruntime(changes: dict[str, Any]) -> None:
    graph = attention(**changes)
    assert rewrites.replace_attention(graph) == 0
    assert kinds(graph) == ["GroupQueryAttention"]


def test_all_layers_or_none() -> None:
    graph = attention()
    (usual,) = graph.model.graph
    odd = ir.node(
        "GroupQueryAttention",
        usual.inputs,
        {**usual.attributes, "smooth_softmax": 1},
        domain="com.microsoft",
        num_outputs=3,
    )
    graph.model.graph.append(odd)
    assert rewrites.replace_attention(graph) == 0
