"""Rewrite an onnxruntime-genai fp32 deployment into one that runs on this package's operators.

The source is what onnxruntime-genai's model builder writes. Each pass below recognises one pattern
of that graph, checks it, and replaces it with an operator of domain `ai.owl`; what no pass
recognises stays as it was, so a family with an unusual block still runs, only slower there. The
result opens in stock onnxruntime-genai: the operator library lies in the folder and
`genai_config.json` names it.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from owl_deploy.errors import BadInput
from owl_deploy.export import program
from owl_deploy.runtime import library_path, pack

Cache = Literal["fp16", "fp32"]
# How the head is stored: as int8 in planes, so that a token's likely successors get all 8 bits and
# the others 4, or whole, as the other weights are.
Head = Literal["screened", "whole"]

DOMAIN = "ai.owl"
DATA_FILE = "model.onnx.data"
# Above these shares of non-zeros a weight is stored whole: the mask would cost more than it saves.
MAX_DENSITY: dict[pack.Values, float] = {"fp32": 0.9, "bf16": 0.85, "int8": 0.8}
# So that the runtime maps every tensor straight from the file.
_FILE_ALIGNMENT = 4096
_MICROSOFT = "com.microsoft"
# Prompts are run in parts of so many tokens: onnxruntime-genai takes the logits of every token of a
# part, 400 MB for 2048 tokens of a vocabulary of 49152. The kernels' time is the same.
PROMPT_CHUNK = 128


@dataclass
class Rewriter:
    """The graph on its way from one form to the other, and what was packed so far."""

    model: onnx.ModelProto
    folder: Path
    precision: pack.Values
    cache: Cache
    head: Head = "whole"
    packed: dict[str, pack.Block] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def __post_init__(self) -> None:
        self.initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self.index()

    def index(self) -> None:
        """Find again who makes and who reads each value; called after each pass."""
        self.producer: dict[str, onnx.NodeProto] = {}
        self.readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self.model.graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in set(node.input):
                self.readers[name].append(node)
        self.outputs = {value.name for value in self.model.graph.output}

    def only_reader(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads `name`, if nothing else needs it."""
        readers = self.readers[name]
        return readers[0] if len(readers) == 1 and name not in self.outputs else None

    def nodes(self, *kinds: str) -> list[onnx.NodeProto]:
        """The nodes of these types, in graph order; safe to edit the graph meanwhile."""
        return [node for node in self.model.graph.node if node.op_type in kinds]

    def load(self, name: str) -> NDArray[np.float32] | None:
        """The fp32 initializer `name`, read from its file only now; None if it is not one."""
        tensor = self.initializers.get(name)
        if tensor is None or tensor.data_type != TensorProto.FLOAT:
            return None
        if tensor.data_location != TensorProto.EXTERNAL:
            return np.asarray(onnx.numpy_helper.to_array(tensor), dtype=np.float32)
        place = {entry.key: entry.value for entry in tensor.external_data}
        return np.memmap(
            self.folder / place["location"],
            dtype=np.float32,
            mode="r",
            offset=int(place.get("offset", 0)),
            shape=tuple(tensor.dims),
        )

    def add_packed(
        self,
        name: str,
        weight: NDArray[np.float32],
        *,
        may_be_sparse: bool = True,
        planes: bool = False,
    ) -> str:
        """Pack `weight` [outputs, inputs] once under `name`; sparse if that pays and may be.

        With `planes` as int8, whatever the precision of the others.
        """
        if name not in self.packed:
            density = int(np.count_nonzero(weight)) / weight.size
            sparse = may_be_sparse and density <= MAX_DENSITY[self.precision]
            precision = "int8" if planes else self.precision
            self.packed[name] = pack.pack(
                np.ascontiguousarray(weight), precision, sparse, planes=planes
            )
        return name

    def replace(self, old: list[onnx.NodeProto], new: onnx.NodeProto) -> None:
        """Put `new` where the last of `old` stood and drop the others."""
        nodes = self.model.graph.node
        at = max(i for i, node in enumerate(nodes) if any(node is gone for gone in old))
        nodes.insert(at + 1, new)
        for gone in old:
            nodes.remove(gone)


def sparsify_deployment(
    source: Path,
    destination: Path,
    precision: pack.Values = "bf16",
    cache: Cache | None = None,
    *,
    head: Head | None = None,
    join: bool = True,
) -> dict[str, object]:
    """Rewrite the builder's fp32 deployment `source` into the folder `destination`.

    `precision` is that of the weights, `cache` that of the KV cache: fp16 unless `precision` is
    fp32; `head` is screened for int8, else whole. Without `join` every operator stays a node of
    its own: slower, but the runtime's profile then shows each. Returns statistics.
    """
    model_file = source / "model.onnx"
    config_file = source / "genai_config.json"
    for file in (model_file, config_file):
        if not file.is_file():
            raise BadInput(
                f"{source} is not an onnxruntime-genai deployment: {file.name} is missing.",
                "Make it with onnxruntime-genai's model builder: precision fp32, provider cpu.",
            )
    library = library_path()
    model = onnx.load(model_file, load_external_data=False)
    cache = cache or ("fp32" if precision == "fp32" else "fp16")
    head = head or ("screened" if precision == "int8" else "whole")
    rewriter = Rewriter(model, source, precision, cache, head)
    for apply in PASSES if join else (*REPLACEMENTS, drop_unused):
        rewriter.counts[apply.__name__] = apply(rewriter)
        rewriter.index()
    if not rewriter.packed:
        raise BadInput(
            f"No linear layer in {model_file} could be replaced.",
            "Export it with precision fp32 first.",
        )
    destination.mkdir(parents=True, exist_ok=True)
    _write_model(rewriter, destination)
    _copy_rest(source, destination)
    shutil.copyfile(library, destination / library.name)
    _configure(config_file, destination, library.name)
    return _statistics(rewriter)


# ---- Passes: each takes the rewriter, edits the graph and returns how often it did -------------


def fuse_gated(rewriter: Rewriter) -> int:
    """activation(x W_gate) * (x W_up) -> one SparseMatMul over both weights."""
    count = 0
    for product in rewriter.nodes("Mul"):
        match = _match_gated(rewriter, product)
        if match is None:
            continue
        gate, up, epilogue, between = match
        gate_weight, up_weight = rewriter.load(gate.input[1]), rewriter.load(up.input[1])
        if gate_weight is None or up_weight is None or gate_weight.shape != up_weight.shape:
            continue
        both = pack.interleave_gate_up(gate_weight.T, up_weight.T)
        name = rewriter.add_packed(f"{gate.input[1]}+up.packed", both)
        node = helper.make_node(
            "SparseMatMul",
            [gate.input[0], name],
            [product.output[0]],
            name=product.name,
            domain=DOMAIN,
            epilogue=epilogue,
            columns=gate_weight.shape[1],
        )
        rewriter.replace([gate, up, *between, product], node)
        count += 1
    return count


def replace_matmuls(rewriter: Rewriter) -> int:
    """x W, and x W + bias, -> SparseMatMul."""
    count = 0
    for node in rewriter.nodes("MatMul"):
        weight = rewriter.load(node.input[1])
        if weight is None or weight.ndim != 2:
            continue
        is_head = node.output[0] in rewriter.outputs
        name = rewriter.add_packed(
            f"{node.input[1]}.packed",
            weight.T,
            may_be_sparse=not is_head,
            planes=is_head and rewriter.head == "screened",
        )
        old, bias, output = [node], "", node.output[0]
        add = rewriter.only_reader(node.output[0])
        if add is not None and add.op_type == "Add":
            other = next((i for i in add.input if i != node.output[0]), "")
            values = rewriter.load(other)
            if values is not None and values.shape == (weight.shape[1],):
                old, bias, output = [node, add], other, add.output[0]
        inputs = [node.input[0], name, *([bias] if bias else [])]
        rewriter.replace(
            old, helper.make_node("SparseMatMul", inputs, [output], name=node.name, domain=DOMAIN)
        )
        count += 1
    return count


def fuse_norms(rewriter: Rewriter) -> int:
    """RMS norm (with its residual addition) -> into the only SparseMatMul that reads it."""
    count = 0
    for norm in rewriter.nodes("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"):
        matmul = rewriter.only_reader(norm.output[0])
        has_skip = norm.op_type.startswith("Skip")
        if matmul is None or matmul.op_type != "SparseMatMul" or matmul.input[0] != norm.output[0]:
            continue
        if len(norm.input) > (3 if has_skip else 2) and any(norm.input[3 if has_skip else 2 :]):
            continue  # a bias of the norm itself
        if any(norm.output[1:3]) or _attribute(norm, "axis", -1) not in (-1, 2):
            continue
        residual = norm.output[3] if len(norm.output) > 3 else ""
        bias = matmul.input[2] if len(matmul.input) > 2 else ""
        skip, gamma = (norm.input[1], norm.input[2]) if has_skip else ("", norm.input[1])
        fused = onnx.NodeProto()
        fused.CopyFrom(matmul)
        del fused.input[:]
        fused.input.extend([norm.input[0], matmul.input[1], bias, skip, gamma])
        if residual:
            fused.output.append(residual)
        fused.attribute.append(helper.make_attribute("epsilon", _attribute(norm, "epsilon", 1e-5)))
        rewriter.replace([norm, matmul], fused)
        count += 1
    return count


def replace_embedding(rewriter: Rewriter) -> int:
    """Gather of token rows -> PackedGather, from the head's weight where the two are tied."""
    count = 0
    for gather in rewriter.nodes("Gather"):
        if gather.input[1] != "input_ids" or _attribute(gather, "axis", 0) != 0:
            continue
        source = rewriter.producer.get(gather.input[0])
        if source is not None and source.op_type == "Transpose":
            tied = f"{source.input[0]}.packed"
            if tied not in rewriter.packed or pack.inspect(rewriter.packed[tied]).sparse:
                continue
            name = tied
        else:
            table = rewriter.load(gather.input[0])
            if table is None:
                continue
            name = rewriter.add_packed(f"{gather.input[0]}.packed", table, may_be_sparse=False)
        new = helper.make_node(
            "PackedGather",
            ["input_ids", name],
            list(gather.output),
            name=gather.name,
            domain=DOMAIN,
        )
        rewriter.replace([gather], new)
        count += 1
    return count


def replace_attention(rewriter: Rewriter) -> int:
    """GroupQueryAttention -> CachedAttention, all layers or none: they share the cache's type."""
    nodes = rewriter.nodes("GroupQueryAttention")
    if not nodes or not all(_attention_supported(rewriter, node) for node in nodes):
        return 0
    kept = (
        "num_heads",
        "kv_num_heads",
        "scale",
        "softcap",
        "local_window_size",
        "do_rotary",
        "rotary_interleaved",
    )
    for node in nodes:
        inputs = list(node.input[:9])
        mask = _mask_of(rewriter, node)
        if mask:
            inputs += [""] * (9 - len(inputs)) + [mask]
        new = helper.make_node(
            "CachedAttention",
            inputs,
            list(node.output),
            name=node.name,
            domain=DOMAIN,
        )
        new.attribute.extend(a for a in node.attribute if a.name in kept)
        rewriter.replace([node], new)
        for value in (*node.input[3:5], *node.output[1:3]):
            _set_cache_type(rewriter, value)
    return len(nodes)


def join_programs(rewriter: Rewriter) -> int:
    """SparseMatMul and CachedAttention nodes that follow one another -> one node."""

    def shape(name: str) -> tuple[int, int]:
        info = pack.read_header(rewriter.packed[name])
        return info.rows, info.cols

    graph = rewriter.model.graph
    return program.join_programs(graph, shape, _config_head_size(rewriter))


def drop_unused(rewriter: Rewriter) -> int:
    """Nodes whose results nobody reads any more, and initializers likewise."""
    graph = rewriter.model.graph
    before = len(graph.node)
    while True:
        used = {name for node in graph.node for name in node.input} | rewriter.outputs
        dead = [node for node in graph.node if not any(name in used for name in node.output)]
        if not dead:
            break
        for node in dead:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # shapes of values that may be gone; the runtime infers them anyway
    return before - len(graph.node)


REPLACEMENTS: tuple[Callable[[Rewriter], int], ...] = (
    fuse_gated,
    replace_matmuls,
    fuse_norms,
    replace_embedding,
    replace_attention,
)
PASSES = (*REPLACEMENTS, join_programs, drop_unused)


# ---- Patterns ----------------------------------------------------------------------------------


def _match_gated(
    rewriter: Rewriter, product: onnx.NodeProto
) -> tuple[onnx.NodeProto, onnx.NodeProto, str, list[onnx.NodeProto]] | None:
    """(gate, up, epilogue, nodes between) of `product`, when nothing else reads them."""
    for active, plain in (tuple(product.input), tuple(reversed(product.input))):
        up = rewriter.producer.get(plain)
        activation = rewriter.producer.get(active)
        if up is None or up.op_type != "MatMul" or activation is None:
            continue
        inner = _activation_input(rewriter, activation)
        if inner is None:
            continue
        gate_output, epilogue, between = inner
        gate = rewriter.producer.get(gate_output)
        readers = {id(node) for node in rewriter.readers[gate_output]}
        if (
            gate is not None
            and gate.op_type == "MatMul"
            and gate.input[0] == up.input[0]
            and gate_output not in rewriter.outputs
            and rewriter.only_reader(plain) is product
            and rewriter.only_reader(active) is product
            and readers == {id(node) for node in between if gate_output in node.input}
        ):
            return gate, up, epilogue, between
    return None


def _activation_input(
    rewriter: Rewriter, node: onnx.NodeProto
) -> tuple[str, str, list[onnx.NodeProto]] | None:
    """(what goes in, epilogue, nodes) of g * sigmoid(g) or of a tanh GELU that ends in `node`."""
    if node.op_type == "FastGelu" or (
        node.op_type == "Gelu" and _attribute(node, "approximate", b"none") == b"tanh"
    ):
        return node.input[0], "gelu_mul", [node]
    if node.op_type != "Mul":
        return None
    for gate, other in (tuple(node.input), tuple(reversed(node.input))):
        sigmoid = rewriter.producer.get(other)
        if (
            sigmoid is not None
            and sigmoid.op_type == "Sigmoid"
            and sigmoid.input[0] == gate
            and rewriter.only_reader(other) is node
        ):
            return gate, "silu_mul", [sigmoid, node]
    return None


def _attention_supported(rewriter: Rewriter, node: onnx.NodeProto) -> bool:
    """Whether CachedAttention computes what this GroupQueryAttention does."""
    known = {
        "num_heads",
        "kv_num_heads",
        "scale",
        "softcap",
        "local_window_size",
        "do_rotary",
        "rotary_interleaved",
    }
    odd = [a.name for a in node.attribute if a.name not in known and (a.i or a.f or a.s)]
    cache = next(
        (value for value in rewriter.model.graph.input if value.name == node.input[3]), None
    )
    if odd or any(node.input[9:]) or any(node.output[3:]) or cache is None:
        return False
    kind = cache.type.tensor_type
    size = kind.shape.dim[3].dim_value if len(kind.shape.dim) == 4 else 0
    heads, kv_heads = _attribute(node, "num_heads", 0), _attribute(node, "kv_num_heads", 0)
    size = size or _config_head_size(rewriter)
    rotary = bool(_attribute(node, "do_rotary", 0))
    tables = len(node.input) > 8 and all(
        rewriter.load(name) is not None for name in node.input[7:9]
    )
    return (
        kind.elem_type == TensorProto.FLOAT
        and size % 16 == 0
        and 0 < size <= 256
        and heads % kv_heads == 0
        and (tables or not rotary)
    )


def _mask_of(rewriter: Rewriter, attention: onnx.NodeProto) -> str:
    """The attention mask that both of an attention's lengths are made of; "" if none is.

    From the lengths alone padding on the left of a prompt looks like padding on its right.
    """
    sources = {
        _source_of(rewriter, attention.input[5], ("Cast", "Sub", "ReduceSum")),
        _source_of(rewriter, attention.input[6], ("Cast", "Gather", "Squeeze", "Shape")),
    }
    source = sources.pop()
    masks = (value.name for value in rewriter.model.graph.input if _is_mask(value))
    return source if not sources and source in masks else ""


def _is_mask(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return kind.elem_type == TensorProto.INT64 and len(kind.shape.dim) == 2


def _source_of(rewriter: Rewriter, name: str, kinds: tuple[str, ...]) -> str:
    """What `name` is made of through nodes of these kinds alone."""
    while (node := rewriter.producer.get(name)) is not None and node.op_type in kinds:
        name = node.input[0]
    return name


def _config_head_size(rewriter: Rewriter) -> int:
    config = json.loads((rewriter.folder / "genai_config.json").read_text())
    return int(config["model"]["decoder"].get("head_size", 0))


def _set_cache_type(rewriter: Rewriter, name: str) -> None:
    kind = TensorProto.FLOAT16 if rewriter.cache == "fp16" else TensorProto.FLOAT
    for value in (*rewriter.model.graph.input, *rewriter.model.graph.output):
        if value.name == name:
            value.type.tensor_type.elem_type = kind


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:  # noqa: ANN401 - as in ONNX
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default


# ---- Files -------------------------------------------------------------------------------------


def _write_model(rewriter: Rewriter, destination: Path) -> None:
    """model.onnx, and all large initializers in one data file."""
    model, graph = rewriter.model, rewriter.model.graph
    position = 0
    with (destination / DATA_FILE).open("wb") as file:
        for name, data in _large_tensors(rewriter):
            file.write(bytes(-position % _FILE_ALIGNMENT))
            position += -position % _FILE_ALIGNMENT
            file.write(data.data)
            tensor = _tensor_entry(rewriter, name, data)
            tensor.data_location = TensorProto.EXTERNAL
            del tensor.external_data[:]
            for key, value in (
                ("location", DATA_FILE),
                ("offset", position),
                ("length", data.nbytes),
            ):
                tensor.external_data.add(key=key, value=str(value))
            position += data.nbytes
    if all(opset.domain != DOMAIN for opset in model.opset_import):
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    del graph.value_info[:]
    onnx.save(model, destination / "model.onnx")


def _large_tensors(rewriter: Rewriter) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Packed weights, in the order in which a token meets them, then what stayed as it was."""
    order: dict[str, None] = {}
    for node in rewriter.model.graph.node:
        order.update((name, None) for name in node.input if name in rewriter.packed)
    for name in order:
        yield name, rewriter.packed[name]
    for tensor in list(rewriter.model.graph.initializer):
        if tensor.data_location == TensorProto.EXTERNAL and tensor.name not in rewriter.packed:
            data = rewriter.load(tensor.name)
            if data is None:
                raise BadInput(
                    f"{tensor.name} in {rewriter.folder} is not fp32.",
                    "Export with precision fp32 first.",
                )
            yield tensor.name, np.ascontiguousarray(data)


def _tensor_entry(rewriter: Rewriter, name: str, data: NDArray[np.generic]) -> TensorProto:
    for tensor in rewriter.model.graph.initializer:
        if tensor.name == name:
            return tensor
    return rewriter.model.graph.initializer.add(
        name=name, data_type=TensorProto.UINT8, dims=[data.size]
    )


def _copy_rest(source: Path, destination: Path) -> None:
    """Tokenizer, chat template and whatever else lies beside the graph."""
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model.onnx"):
            shutil.copyfile(file, destination / file.name)


def _configure(config_file: Path, destination: Path, library: str) -> None:
    config = json.loads(config_file.read_text())
    options = config["model"]["decoder"].setdefault("session_options", {})
    options["custom_ops_library"] = library
    config.setdefault("search", {})["chunk_size"] = PROMPT_CHUNK
    (destination / "genai_config.json").write_text(json.dumps(config, indent=4) + "\n")


def _statistics(rewriter: Rewriter) -> dict[str, object]:
    """What was replaced, how many weights and bytes there are now."""
    infos = [pack.inspect(block) for block in rewriter.packed.values()]
    return {
        "cache": rewriter.cache,
        "screened_head": any(info.planes for info in infos),
        "replaced": dict(rewriter.counts),
        "sparse_weights": sum(info.sparse for info in infos),
        "dense_weights": sum(not info.sparse for info in infos),
        "elements": sum(info.rows * info.cols for info in infos),
        "nonzeros": sum(info.nonzeros for info in infos),
        "packed_bytes": sum(info.size_bytes for info in infos),
    }
