"""The rewrites of a model builder's graph into operators of this package, in their order.

Each recognises one pattern, checks it, replaces it with an operator of domain `ai.owl`, and returns
how often it did; what none recognises stays as it was, so a family with an unusual block still
runs, only slower there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass

from owl_deploy.export import program
from owl_deploy.export.grid import QKV, Rounded, joined
from owl_deploy.export.rewriter import DOMAIN, Rewriter, are_closed, constant, maker
from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import TRAITS, Values

_Floats = NDArray[np.float32]

# What CachedAttention takes of GroupQueryAttention.
_ATTENTION = {
    *("num_heads", "kv_num_heads", "scale", "softcap", "local_window_size"),
    *("do_rotary", "rotary_interleaved"),
}


def fuse_gated(rewriter: Rewriter) -> int:
    """activation(x W_gate) * (x W_up) -> one SparseMatMul over both weights."""
    count = 0
    for product in rewriter.nodes("Mul"):
        match = _match_gated(product)
        if match is None:
            continue
        nodes, epilogue = match
        gate, up = nodes[:2]
        gate_weight, up_weight = constant(gate.inputs[1]), constant(up.inputs[1])
        if gate_weight is None or up_weight is None or gate_weight.shape != up_weight.shape:
            continue
        both = pack.interleave_gate_up(gate_weight.T, up_weight.T)
        parts = [rewriter.rounded(matmul.inputs[1]) for matmul in (gate, up)]
        if len({rewriter.keeps(part) for part in parts}) > 1:
            continue  # as one weight neither would lie on a grid
        rounded = joined(parts, lambda scales: pack.interleave_gate_up(*scales))
        packed = rewriter.pack(f"{_name(gate.inputs[1])}+up.packed", both, rounded=rounded)
        attributes = {"epilogue": epilogue, "columns": gate_weight.shape[1]}
        rewriter.replace(nodes, "SparseMatMul", [gate.inputs[0], packed], attributes)
        count += 1
    return count


def _match_gated(product: ir.Node) -> tuple[list[ir.Node], str] | None:
    """Gate, up, the activation's nodes and `product`, when nothing else reads them; epilogue."""
    for active, plain in (product.inputs, product.inputs[::-1]):
        up, activation = maker(plain, "MatMul"), _match_activation(active)
        if up is None or activation is None:
            continue
        inner, between, epilogue = activation
        gate = maker(inner, "MatMul")
        if gate is not None and gate is not up and gate.inputs[0] is up.inputs[0]:
            nodes = [gate, up, *between, product]
            if are_closed(nodes):
                return nodes, epilogue
    return None


def _match_activation(value: ir.Value | None) -> tuple[ir.Value | None, list[ir.Node], str] | None:
    """What goes in, nodes and epilogue of g * sigmoid(g), or of a tanh GELU, that makes `value`."""
    gelu = maker(value, "FastGelu", "Gelu")
    if gelu is not None:
        if any(more is not None for more in gelu.inputs[1:]):
            return None  # FastGelu's bias, which the epilogue does not add
        kind = "tanh" if gelu.op_type == "FastGelu" else gelu.attributes.get_string("approximate")
        return (gelu.inputs[0], [gelu], "gelu_mul") if kind == "tanh" else None
    product = maker(value, "Mul")
    if product is None:
        return None
    for gate, other in (product.inputs, product.inputs[::-1]):
        sigmoid = maker(other, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] is gate:
            return gate, [sigmoid, product], "silu_mul"
    return None


def split_attention(rewriter: Rewriter) -> int:
    """The one product that makes q, k and v -> one for each, where their formats differ."""
    count = 0
    for matmul in rewriter.nodes("MatMul"):
        parts = rewriter.parts(matmul.inputs[1])
        weight = constant(matmul.inputs[1]) if parts else None
        if weight is None:
            continue
        nodes, bias = _match_bias(matmul, weight.shape[1])
        reader, widths = _match_taken_apart(nodes[-1].outputs[0], weight.shape[1])
        if reader is None:
            continue
        ends = np.cumsum(widths)[:-1]
        weights = [part.T for part in np.split(weight, ends, axis=1)]
        if len({rewriter.format_of(*one) for one in zip(weights, parts, strict=True)}) == 1:
            continue
        added = constant(bias[0]) if bias else None
        biases = [None] * len(QKV) if added is None else [*np.split(added, ends)]
        made = [
            _product(rewriter, nodes, reader, _Part(*one))
            for one in zip(QKV, weights, parts, biases, strict=True)
        ]
        if reader.op_type == "Split":
            for before, value in zip(reader.outputs, made, strict=True):
                before.replace_all_uses_with(value)
            nodes = [*nodes, reader]
        else:
            for place, value in enumerate(made):
                reader.replace_input_with(place, value)
        rewriter.model.graph.remove(nodes[::-1], safe=True)
        count += 1
    return count


def _match_taken_apart(value: ir.Value, width: int) -> tuple[ir.Node | None, list[int]]:
    """What alone reads q, k and v as the one `value`, a Split or the attention, and how wide each
    is; None where nothing does.
    """
    readers = value.consumers()
    if len(readers) != 1 or value.is_graph_output():
        return None, []
    (reader,) = readers
    if reader.op_type == "Split" and reader.attributes.get_int("axis", 0) in (-1, 2):
        told = reader.inputs[1] if reader.inputs[1:] else None
        sizes = None if told is None else ir.convenience.get_const_tensor(told)
        widths = [] if sizes is None else [int(size) for size in sizes.numpy()]
        return (reader, widths) if len(widths) == len(QKV) else (None, [])
    if reader.op_type == "GroupQueryAttention" and not any(reader.inputs[1:3]):
        heads = [reader.attributes.get_int(name, 1) for name in ("num_heads", "kv_num_heads")]
        size = width // (heads[0] + 2 * heads[1])
        return reader, [heads[0] * size, heads[1] * size, heads[1] * size]
    return None, []


class _Part(NamedTuple):
    """One of q, k and v: its weight [outputs, inputs], what that was rounded to, and its bias."""

    name: str
    weight: _Floats
    rounded: Rounded | None
    bias: _Floats | None


def _product(
    rewriter: Rewriter, nodes: Sequence[ir.Node], before: ir.Node, part: _Part
) -> ir.Value:
    """A `part` of the product that `nodes` make, by a node of its own `before` their reader."""
    place = _name(nodes[0].inputs[1]).replace("qkv_proj.MatMul.weight", part.name)
    packed = rewriter.pack(f"{place}.packed", part.weight, rounded=part.rounded)
    inputs = [nodes[0].inputs[0], packed]
    if part.bias is not None:
        inputs.append(rewriter.keep(f"{place}.bias", part.bias))
    made = ir.node("SparseMatMul", inputs, domain=DOMAIN, name=f"{nodes[0].name}/{part.name}")
    made.outputs[0].name = f"{_name(nodes[-1].outputs[0])}/{part.name}"
    made.outputs[0].dtype = ir.DataType.FLOAT
    rewriter.model.graph.insert_before(before, made)
    return made.outputs[0]


def replace_matmuls(rewriter: Rewriter) -> int:
    """x W, and x W + bias, -> SparseMatMul."""
    count = 0
    for node in rewriter.nodes("MatMul"):
        weight = constant(node.inputs[1])
        if weight is None or weight.ndim != 2:
            continue
        is_head = node.outputs[0].is_graph_output()
        packed = rewriter.pack(
            f"{_name(node.inputs[1])}.packed",
            weight.T,
            may_be_sparse=not is_head,
            planes=is_head and rewriter.head == "screened",
            rounded=rewriter.rounded(node.inputs[1]),
        )
        nodes, bias = _match_bias(node, weight.shape[1])
        rewriter.replace(nodes, "SparseMatMul", [node.inputs[0], packed, *bias], {})
        count += 1
    return count


def _match_bias(node: ir.Node, width: int) -> tuple[list[ir.Node], list[ir.Value]]:
    """A MatMul with the addition that alone reads it, if that is of a bias, and the bias."""
    for add in node.outputs[0].consumers():
        for bias in add.inputs if add.op_type == "Add" and are_closed([node, add]) else ():
            values = constant(bias)
            if bias is not None and values is not None and values.shape == (width,):
                return [node, add], [bias]
    return [node], []


def fuse_norms(rewriter: Rewriter) -> int:
    """RMS norm (with its residual addition) -> into the SparseMatMul nodes that read it."""
    count = 0
    for norm in rewriter.nodes("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
        normed, *others = norm.outputs
        readers = normed.consumers()
        x, *skip, gamma = norm.inputs[: 3 if norm.op_type.startswith("Skip") else 2]
        total = x if not skip else others[2] if len(others) > 2 else None
        if (
            not readers
            or normed.is_graph_output()
            or any(one.op_type != "SparseMatMul" or one.inputs[0] is not normed for one in readers)
            or (len(readers) > 1 and not (total and total.name))
            or any(norm.inputs[2 + len(skip) :])  # a bias of the norm itself
            or any(other.name for other in others[:2])
            or norm.attributes.get_int("axis", -1) not in (-1, 2)
        ):
            continue
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        first, *more = [node for node in rewriter.nodes("SparseMatMul") if node in readers]
        for matmul in more:  # the first one adds, and these norm its sum again
            _fuse_norm(rewriter, [matmul], [total, None, gamma], epsilon)
        _fuse_norm(rewriter, [norm, first], [x, *(skip or [None]), gamma], epsilon, others[2:])
        count += 1
    return count


def _fuse_norm(
    rewriter: Rewriter,
    old: Sequence[ir.Node],
    entering: Sequence[ir.Value | None],
    epsilon: float,
    sums: Sequence[ir.Value] = (),
) -> None:
    """The last of `old`, a SparseMatMul, with the norm of what is `entering`: x, skip and gamma."""
    matmul, (x, skip, gamma) = old[-1], entering
    _, packed, *bias = matmul.inputs
    rewriter.replace(
        old,
        "SparseMatMul",
        [x, packed, *(bias or [None]), skip, gamma],
        {**matmul.attributes, "epsilon": epsilon},
        [*matmul.outputs, *sums],
    )


def replace_embedding(rewriter: Rewriter) -> int:
    """Gather of token rows -> PackedGather, from the head's weight where the two are tied.

    A table of its own takes no time, whatever its width, but much of a file: beside weights of
    fewer than 8 bits it has 4, which lose a tenth of what those do, or less
    (docs/benchmarks/bits.md).
    """
    count = 0
    for gather in rewriter.nodes("Gather"):
        table, ids = gather.inputs
        if _name(ids) != "input_ids" or gather.attributes.get_int("axis", 0) != 0:
            continue
        transpose = maker(table, "Transpose")
        name = f"{_name(table if transpose is None else transpose.inputs[0])}.packed"
        if transpose is None:
            weight = constant(table)
            if weight is None:
                continue
            few = TRAITS[rewriter.precision].stored_bits < 8
            precision: Values | None = "int4" if few else None
            rewriter.pack(name, weight, may_be_sparse=False, precision=precision)
        elif name not in rewriter.packed or rewriter.packed[name].sparse:
            continue
        packed = rewriter.model.graph.initializers[name]
        rewriter.replace([gather], "PackedGather", [ids, packed], {})
        count += 1
    return count


def replace_attention(rewriter: Rewriter) -> int:
    """GroupQueryAttention -> CachedAttention, all layers or none: they share the cache's type."""
    nodes = rewriter.nodes("GroupQueryAttention")
    if not all(_is_supported(node, rewriter.head_size) for node in nodes):
        return 0
    kind = ir.DataType.FLOAT16 if rewriter.cache == "fp16" else ir.DataType.FLOAT
    for node in nodes:
        inputs = [*node.inputs[:9], *[None] * (9 - len(node.inputs))]
        attributes = {name: value for name, value in node.attributes.items() if name in _ATTENTION}
        for value in (*node.inputs[3:5], *node.outputs[1:3]):
            if value is not None:
                value.dtype = kind
        rewriter.replace([node], "CachedAttention", [*inputs, _mask_of(node)], attributes)
    return len(nodes)


def _is_supported(node: ir.Node, head_size: int) -> bool:
    """Whether CachedAttention computes what this GroupQueryAttention does."""
    cache, attributes = node.inputs[3], node.attributes
    odd = [a for name, a in attributes.items() if name not in _ATTENTION and a.value]
    if odd or any(node.inputs[9:]) or any(value.name for value in node.outputs[3:]):
        return False
    if cache is None or not cache.is_graph_input() or cache.shape is None:
        return False
    known = cache.shape[3] if len(cache.shape) == 4 else 0
    size = known if isinstance(known, int) else head_size
    tables = [constant(value) is not None for value in node.inputs[7:9]]
    return (
        cache.dtype == ir.DataType.FLOAT
        and size % 16 == 0
        and 0 < size <= 256
        and attributes.get_int("num_heads", 0) % attributes.get_int("kv_num_heads", 1) == 0
        and (tables == [True, True] or not attributes.get_int("do_rotary", 0))
    )


def _mask_of(attention: ir.Node) -> ir.Value | None:
    """The attention mask that both of an attention's lengths are made of; None if none is.

    From the lengths alone padding on the left of a prompt looks like padding on its right.
    """
    source = _source_of(attention.inputs[5], "Cast", "Sub", "ReduceSum")
    other = _source_of(attention.inputs[6], "Cast", "Gather", "Squeeze", "Shape")
    if source is None or source is not other or not source.is_graph_input():
        return None
    is_mask = source.dtype == ir.DataType.INT64 and len(source.shape or ()) == 2
    return source if is_mask else None


def _source_of(value: ir.Value | None, *kinds: str) -> ir.Value | None:
    """What `value` is made of through nodes of these types alone."""
    while (node := maker(value, *kinds)) is not None:
        value = node.inputs[0]
    return value


def join_programs(rewriter: Rewriter) -> int:
    """SparseMatMul and CachedAttention nodes that follow one another -> one node."""
    shapes = {name: (info.rows, info.cols) for name, info in rewriter.packed.items()}
    return program.join_programs(rewriter.model.graph, shapes, rewriter.head_size)


def drop_unused(rewriter: Rewriter) -> int:
    """Nodes whose results nobody reads any more, and initializers likewise."""
    before = len(rewriter.model.graph)
    RemoveUnusedNodesPass()(rewriter.model)
    return before - len(rewriter.model.graph)


def _name(value: ir.Value | None) -> str:
    return (value.name if value is not None else None) or ""


# By themselves, operators stay nodes: slower, but the runtime's profile then shows each.
REPLACEMENTS: tuple[Callable[[Rewriter], int], ...] = (
    fuse_gated,
    split_attention,
    replace_matmuls,
    fuse_norms,
    replace_embedding,
    replace_attention,
)
REWRITES = (*REPLACEMENTS, join_programs, drop_unused)
