"""Small passes over a traced graph whose weights are still inputs, with their values.

`simplify` runs them in order. Each does one thing, and leaves a graph that computes the same.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from onnx_ir.passes import common
from onnx_ir.tensor_adapters import TorchTensor

Inputs = Mapping[str, torch.Tensor]


def simplify(model: ir.Model, examples: Sequence[Inputs]) -> None:
    """Make the traced graph small and plain, in place.

    `examples`: inputs of two different sizes in every dynamic axis; what differs between them is
    dynamic, and what does not is a constant.
    """
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.DeduplicateInitializersPass()(model)
    transpose_weights(model.graph)
    freeze_shapes(model, examples)
    drop_empty_casts(model)
    common.RemoveUnusedNodesPass()(model)


def transpose_weights(graph: ir.Graph) -> None:
    """A MatMul with a Transpose of a weight takes the weight the right way round.

    A weight that is read untransposed too (a tied embedding and head) is then there twice: engines
    want a head's weight as the constant of a MatMul, and an embedding's rows in one piece.
    """
    turned: dict[str, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "Transpose"]:
        source = node.inputs[0]
        if source is None or not isinstance(source.const_value, TorchTensor):
            continue
        name = f"{source.name}.transposed"
        if name not in turned:
            tensor = source.const_value.raw.permute(*node.attributes.get_ints("perm", ()))
            turned[name] = ir.val(name, const_value=TorchTensor(tensor, name))
            graph.inputs.append(turned[name])
        node.outputs[0].replace_all_uses_with(turned[name])
        graph.remove(node, safe=True)
    for value in list(graph.inputs):
        if value.const_value is not None and not value.uses():
            graph.inputs.remove(value)


def freeze_shapes(model: ir.Model, examples: Sequence[Inputs]) -> None:
    """What is computed from shapes alone, and is the same at every size, becomes a constant.

    The target of a Reshape that does differ is written with 0 (as the input's) and one -1.
    Both are found by running the graph at two sizes: no rule a pattern that an exporter may change.
    """
    found = _shape_values(model.graph)
    probed = _probe(model, examples, [str(value.name) for value in found])
    for value in found:
        first, second = (probe[str(value.name)] for probe in probed)
        if first.shape == second.shape and np.array_equal(first, second):
            value.replace_all_uses_with(_constant(model.graph, f"{value.name}.frozen", first))
        else:
            for node in value.consumers():
                if node.op_type == "Reshape":
                    _freeze_reshape(model.graph, node, probed)


def _shape_values(graph: ir.Graph) -> list[ir.Value]:
    """The tensors made from shapes and constants alone that some other node reads."""
    made: set[ir.Value] = set()
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        plain = all(value in made or value.is_initializer() for value in inputs)
        if node.op_type == "Shape" or (plain and inputs):
            made.update(node.outputs)
    return [
        value
        for value in sorted(made, key=lambda value: str(value.name))
        if any(made.isdisjoint(node.outputs) for node in value.consumers())
    ]


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer `name`, made once."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]


def _probe(
    model: ir.Model, examples: Sequence[Inputs], names: Sequence[str]
) -> list[dict[str, np.ndarray]]:
    """The values of `names`, and the shapes of all that Reshape nodes read, for each example."""
    probe = ir.to_proto(model)
    reshaped = {node.input[0] for node in probe.graph.node if node.op_type == "Reshape"}
    shapes = {name: f"{name}.shape" for name in sorted(reshaped)}
    probe.graph.node.extend(helper.make_node("Shape", [x], [y]) for x, y in shapes.items())
    wanted = [*names, *shapes.values()]
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        probe.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    inputs = model.graph.inputs
    weights = {value.name: value.const_value.numpy() for value in inputs if value.const_value}
    weights = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    taken = {value.name for value in inputs}
    results = []
    for example in examples:
        feeds = {name: tensor.numpy() for name, tensor in example.items() if name in taken}
        results.append(dict(zip(wanted, session.run(wanted, weights | feeds), strict=True)))
    return results


def _freeze_reshape(
    graph: ir.Graph, node: ir.Node, probed: Sequence[Mapping[str, np.ndarray]]
) -> None:
    source, target = (str(value.name) for value in node.inputs if value is not None)
    targets = [probe[target] for probe in probed]
    sources = [probe[f"{source}.shape"] for probe in probed]
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
    node.replace_input_with(1, _constant(graph, name, np.array(plan, dtype=np.int64)))


def drop_empty_casts(model: ir.Model) -> None:
    """Casts of a tensor to the type that it has, which transformers' fp32 upcasts become."""
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(model)
    for node in [node for node in model.graph if node.op_type == "Cast"]:
        source, output = node.inputs[0], node.outputs[0]
        if source is None or output.is_graph_output():
            continue
        if source.dtype == node.attributes.get_int("to"):
            output.replace_all_uses_with(source)
            model.graph.remove(node, safe=True)


def take_weights(model: ir.Model) -> int:
    """The inputs that are weights become initializers, named as in the checkpoint; their bytes.

    `.transposed` only tells two uses of one weight apart.
    """
    weights = [value for value in model.graph.inputs if value.const_value is not None]
    for value in weights:
        value.name = str(value.name).removeprefix("decoder.")
        model.graph.register_initializer(value)
    common.RemoveInitializersFromInputsPass()(model)
    return sum(value.const_value.nbytes for value in weights if value.const_value)
