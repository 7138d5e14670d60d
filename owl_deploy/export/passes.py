"""Small passes over a traced graph whose weights are still inputs, and the writing of it.

`simplify` runs them in order. Each does one thing, and leaves a graph that computes the same.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

Weights = dict[str, torch.Tensor]  # by graph input; a transposed view where the graph wants one
Inputs = Mapping[str, torch.Tensor]

_PAGE = 4096  # external tensors start on a page, so that a runtime can map them
_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference needs them


def simplify(model: onnx.ModelProto, weights: Weights, examples: Sequence[Inputs]) -> Weights:
    """Make the traced graph small and plain, in place; returns the weights that it now takes.

    `examples`: inputs of two different sizes in every dynamic axis; what differs between them is
    dynamic, and what does not is a constant.
    """
    inline_constants(model)
    weights = transpose_weights(model, weights)
    freeze_shapes(model, weights, examples)
    drop_empty_casts(model)
    remove_dead_nodes(model)
    return weights


def inline_constants(model: onnx.ModelProto) -> None:
    """Constant nodes become initializers, one for all that are equal."""
    graph = model.graph
    names: dict[bytes, str] = {}
    renamed: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "Constant"]:
        tensor = next((a.t for a in node.attribute if a.name == "value"), None)
        if tensor is None:
            continue
        array = numpy_helper.to_array(tensor)
        key = hashlib.sha256(f"{array.dtype}{array.shape}".encode() + array.tobytes()).digest()
        if key not in names:
            names[key] = f"constant_{len(names)}"
            graph.initializer.append(numpy_helper.from_array(array, names[key]))
        renamed[node.output[0]] = names[key]
        graph.node.remove(node)
    rename_inputs(model, renamed)


def rename_inputs(model: onnx.ModelProto, renamed: Mapping[str, str]) -> None:
    """Let every node that reads a key of `renamed` read its value instead."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]


def transpose_weights(model: onnx.ModelProto, weights: Weights) -> Weights:
    """A MatMul with a Transpose of a weight takes the weight the right way round.

    A weight that is read untransposed too (a tied embedding and head) is then there twice: engines
    want a head's weight as the constant of a MatMul, and an embedding's rows in one piece.
    """
    graph = model.graph
    kept = dict(weights)
    renamed: dict[str, str] = {}
    for node in [n for n in graph.node if n.op_type == "Transpose" and n.input[0] in weights]:
        source = node.input[0]
        permutation = next(list(a.ints) for a in node.attribute if a.name == "perm")
        name = f"{source}.transposed"
        kept[name] = weights[source].permute(permutation)
        renamed[node.output[0]] = name
        graph.node.remove(node)
    rename_inputs(model, renamed)
    read = {name for node in graph.node for name in node.input}
    for value in [value for value in graph.input if value.name in weights]:
        graph.input.remove(value)
    kept = {name: tensor for name, tensor in kept.items() if name in read}
    for name, tensor in kept.items():
        elem_type = helper.np_dtype_to_tensor_dtype(_array(tensor).dtype)
        graph.input.append(helper.make_tensor_value_info(name, elem_type, list(tensor.shape)))
    return kept


def _array(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().numpy()
    return array


def freeze_shapes(model: onnx.ModelProto, weights: Weights, examples: Sequence[Inputs]) -> None:
    """What is computed from shapes alone, and is the same at every size, becomes a constant.

    The target of a Reshape that does differ is written with 0 (as the input's) and one -1.
    Both are found by running the graph at two sizes: no rule a pattern that an exporter may change.
    """
    found = _shape_values(model)
    probed = _probe(model, weights, examples, found)
    constants: dict[str, np.ndarray] = {}
    for name in found:
        first, second = (probe[name] for probe in probed)
        if first.shape == second.shape and np.array_equal(first, second):
            constants[name] = first
    frozen = {name: f"{name}.frozen" for name in constants}
    model.graph.initializer.extend(
        numpy_helper.from_array(array, frozen[name]) for name, array in constants.items()
    )
    rename_inputs(model, frozen)
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in found:
            _freeze_reshape(model, node, probed)


def _shape_values(model: onnx.ModelProto) -> list[str]:
    """The tensors made from shapes and constants alone that some other node reads."""
    constant = {tensor.name for tensor in model.graph.initializer}
    made: set[str] = set()
    for node in model.graph.node:
        plain = all(name in constant or name in made for name in node.input if name)
        if node.op_type == "Shape" or (plain and node.input):
            made.update(node.output)
    return sorted(
        {
            name
            for node in model.graph.node
            if not made.intersection(node.output)
            for name in node.input
            if name in made
        }
    )


def _probe(
    model: onnx.ModelProto, weights: Weights, examples: Sequence[Inputs], names: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """The values of `names`, and the shapes of all that Reshape nodes read, for each example."""
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    shapes: dict[str, str] = {}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[0] not in shapes:
            shapes[node.input[0]] = f"{node.input[0]}.shape"
            probe.graph.node.append(
                helper.make_node("Shape", [node.input[0]], [shapes[node.input[0]]])
            )
    del probe.graph.output[:]
    wanted = [*names, *shapes.values()]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    taken = {value.name for value in session.get_inputs()}
    feeds = {name: np.ascontiguousarray(_array(tensor)) for name, tensor in weights.items()}
    results = []
    for inputs in examples:
        feeds.update({name: _array(tensor) for name, tensor in inputs.items()})
        values = session.run(wanted, {name: feeds[name] for name in feeds if name in taken})
        results.append(dict(zip(wanted, values, strict=True)))
    return results


def _freeze_reshape(
    model: onnx.ModelProto, node: onnx.NodeProto, probed: Sequence[Mapping[str, np.ndarray]]
) -> None:
    targets = [probe[node.input[1]] for probe in probed]
    sources = [probe[f"{node.input[0]}.shape"] for probe in probed]
    plan: list[int] = []
    for axis in range(len(targets[0])):
        sizes = [int(target[axis]) for target in targets]
        copied = [int(source[axis]) if axis < len(source) else None for source in sources]
        if sizes[0] == sizes[1]:
            plan.append(sizes[0])
        else:
            plan.append(0 if sizes == copied else -1)
    if plan.count(-1) > 1:
        return  # not expressible; the shape stays computed
    name = "reshape_" + "_".join(map(str, plan)).replace("-", "m")
    if name not in {tensor.name for tensor in model.graph.initializer}:
        value = numpy_helper.from_array(np.array(plan, dtype=np.int64), name)
        model.graph.initializer.append(value)
    node.input[1] = name


def drop_empty_casts(model: onnx.ModelProto) -> None:
    """Casts of a tensor to the type that it has, which transformers' fp32 upcasts become."""
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    types |= {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    outputs = {value.name for value in model.graph.output}
    renamed: dict[str, str] = {}
    for node in [node for node in model.graph.node if node.op_type == "Cast"]:
        source = renamed.get(node.input[0], node.input[0])
        to = next(a.i for a in node.attribute if a.name == "to")
        if types.get(source) == to and node.output[0] not in outputs:
            renamed[node.output[0]] = source
            model.graph.node.remove(node)
    rename_inputs(model, renamed)


def remove_dead_nodes(model: onnx.ModelProto) -> None:
    """Nodes and constants whose result nobody reads."""
    needed = {value.name for value in model.graph.output}
    for node in reversed(list(model.graph.node)):
        if needed.intersection(node.output):
            needed.update(node.input)
        else:
            model.graph.node.remove(node)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name not in needed]:
        model.graph.initializer.remove(tensor)
    del model.graph.value_info[:]


def save(model: onnx.ModelProto, weights: Weights, path: Path, external_bytes: int) -> None:
    """Write the graph with `weights` as its initializers.

    They lie in `model.onnx.data` beside it if they take more than `external_bytes` (a graph file
    ends at 2 GB), one after the other, never in memory all at once.
    """
    taken = {value.name: value for value in model.graph.input if value.name in weights}
    for value in taken.values():
        model.graph.input.remove(value)
    names = {name: _plain_name(name) for name in taken}
    rename_inputs(model, names)
    external = sum(weights[name].nbytes for name in taken) > external_bytes
    if not external:
        model.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(_array(weights[name])), names[name])
            for name in taken
        )
    else:
        with path.with_name(f"{path.name}.data").open("wb") as data:
            for name in taken:
                array = np.ascontiguousarray(_array(weights[name]))
                model.graph.initializer.append(_external(array, names[name], data))
    path.write_bytes(model.SerializeToString())


def _plain_name(name: str) -> str:
    """A weight's name in the checkpoint; `.transposed` only tells two uses of one weight apart."""
    return name.removeprefix("decoder.")


def _external(array: np.ndarray, name: str, data: io.BufferedWriter) -> TensorProto:
    if array.nbytes < _INLINE_BYTES:
        return numpy_helper.from_array(array, name)
    offset = -(-data.tell() // _PAGE) * _PAGE
    data.seek(offset)
    data.write(array.data)  # not tofile(), whose error does not say that the disk is full
    tensor = TensorProto(
        name=name,
        data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
        dims=array.shape,
        data_location=TensorProto.EXTERNAL,
    )
    place = {"location": Path(data.name).name, "offset": offset, "length": array.nbytes}
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
