"""What can be counted in a deployment, the same on every machine: bytes, nodes, non-zeros."""

from collections import Counter
from typing import Any

import numpy as np

from owl_deploy.inference import Deployment

_SMALLEST = 1024  # values; biases, norms and shapes say nothing about pruning


def count(deployment: Deployment) -> dict[str, Any]:
    """The model's `bytes`, its `nodes` by operator, and the `nonzeros` of each large tensor.

    Read from the files as they are, whatever the manifest says. Packed weights (the target `owl`)
    are counted as stored: their bytes that are not zero.
    """
    counters: dict[str, Any] = {"bytes": deployment.size_bytes, "nodes": {}, "nonzeros": {}}
    if deployment.folder.engine is not None:  # its model is no graph
        return counters
    import onnx_ir as ir

    graph = ir.from_proto(deployment.folder.graph)
    ir.external_data.set_base_dir(graph, deployment.path)
    counters["nodes"] = dict(sorted(Counter(node.op_type for node in graph).items()))
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.size >= _SMALLEST:
            counters["nonzeros"][name] = int(np.count_nonzero(tensor.numpy()))
    return counters
