"""An ONNX graph in its file, and large weights in another beside it: mapped, never copied whole."""

from pathlib import Path

import numpy as np
import onnx_ir as ir

from owl_deploy.inference.registry import MODEL

_DATA = f"{MODEL}.data"
_PAGE = 4096  # external tensors start on a page, so that a runtime can map them
_INLINE_BYTES = 1024  # smaller tensors stay in the graph, where shape inference needs them


def read(tensor: ir.TensorProtocol) -> np.ndarray:
    """A tensor's values; those in a file are mapped for as long as somebody holds the array."""
    if not isinstance(tensor, ir.ExternalTensor):
        return tensor.numpy()
    shape = tuple(tensor.shape.numpy())
    return np.memmap(tensor.path, tensor.dtype.numpy(), "r", tensor.offset or 0, shape)


def save(model: ir.Model, folder: Path, *, external: bool = True) -> None:
    """Write the graph into `folder`; its weights beside it if `external`, in the order of use."""
    graph = model.graph
    used = [value for node in graph for value in node.inputs if value and value.is_initializer()]
    for value in dict.fromkeys(used):
        graph.initializers.add(graph.initializers.pop(str(value.name)))
    for value in ir.convenience.create_value_mapping(graph).values():
        if not value.is_graph_input() and not value.is_graph_output():
            value.type = value.shape = None  # runtimes infer them, and may do so at other sizes
    ir.save(
        model,
        folder / MODEL,
        external_data=_DATA if external else None,
        size_threshold_bytes=_INLINE_BYTES - 1,
        alignment=_PAGE,
        align_threshold=0,
    )
