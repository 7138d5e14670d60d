"""What can be counted in a deployment, the same on every machine: bytes, nodes, non-zeros."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from owl_deploy.engines import Deployment

_SMALLEST = 1024  # values; biases, norms and shapes say nothing about pruning


def count(deployment: Deployment) -> dict[str, Any]:
    """The model's `bytes`, its `nodes` by operator, and the `nonzeros` of each large tensor.

    Read from the files as they are, whatever the manifest says. Packed weights (the target `owl`)
    are counted as stored: their bytes that are not zero.
    """
    counters: dict[str, Any] = {"bytes": deployment.size_bytes, "nodes": {}, "nonzeros": {}}
    path = deployment.path / "model.onnx"
    if not path.is_file():  # the fake engine has no model
        return counters
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    counters["nodes"] = dict(sorted(Counter(node.op_type for node in graph.node).items()))
    for tensor in graph.initializer:
        if math.prod(tensor.dims) >= _SMALLEST:
            counters["nonzeros"][tensor.name] = _nonzeros(tensor, path.parent)
    return counters


def _nonzeros(tensor: Any, folder: Path) -> int:  # noqa: ANN401 - onnx is imported when used
    """The values of a tensor that are not zero; its bytes where numpy has no such type."""
    from onnx import TensorProto, external_data_helper, helper, numpy_helper

    if tensor.data_location != TensorProto.EXTERNAL:
        return int(np.count_nonzero(numpy_helper.to_array(tensor)))
    about = external_data_helper.ExternalDataInfo(tensor)
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    wanted = about.length or math.prod(tensor.dims) * kind.itemsize
    data = np.memmap(folder / about.location, np.uint8, "r", about.offset or 0, (wanted,))
    packed = wanted != math.prod(tensor.dims) * kind.itemsize  # 4-bit types, two a byte
    return int(np.count_nonzero(data if packed else data.view(kind)))
