"""Whether the rotary tables that a graph holds are the model's.

The logits (`parity.py`) are compared over some hundred tokens, which do not see late positions, and
integers have no bound to what they may differ by. The tables are fp32 at every precision.
"""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from owl_deploy.export import onnx_file, rotary
from owl_deploy.export.parity import ParityFailed
from owl_deploy.inference.registry import MODEL

# Of a rotary angle in fp32, for each position: a frequency is right to a few units in its last
# place. A wrong scaling changes some frequency by a percent or more.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)
_POSITIONS = 1024
# Which layers read a table, by what follows "cos_cache" in its name, where not all share one.
_LAYERS = {"_global": "full_attention", "_local": "sliding_attention"}


def check(deployment: Path, model: Any) -> None:  # noqa: ANN401 - transformers has no types
    """Compare the rotary tables of a builder's graph, if it has them, with those of `model`.

    `model` is the checkpoint's; its rotary module suffices. Raises `ParityFailed` where a table
    differs by more than an angle's rounding to fp32, which grows with the position.
    """
    modules = list(rotary.modules(model).values())
    if len(modules) != 1 or not (deployment / MODEL).is_file():
        return
    known = rotary.layer_types(modules[0])
    for name, table in _tables(deployment).items():
        function, part = name.split("_cache")
        layer_type = _LAYERS.get(part) if known != [None] else None
        if layer_type in known:
            _compare(name, table, modules[0], function == "cos", layer_type)


def _tables(deployment: Path) -> dict[str, np.ndarray]:
    """The tables [positions, D / 2] of a graph by their names, those in its branches too."""
    graph = ir.load(deployment / MODEL).graph
    tensors = {name: value.const_value for name, value in graph.initializers.items()}
    for node in graph.all_nodes():
        if node.op_type == "Constant" and "value" in node.attributes:
            tensors[str(node.outputs[0].name)] = node.attributes["value"].as_tensor()
    return {
        name: onnx_file.read(tensor)
        for name, tensor in tensors.items()
        if name.startswith(("cos_cache", "sin_cache")) and tensor is not None
    }


def _compare(
    name: str, table: np.ndarray, module: nn.Module, is_cosine: bool, layer_type: str | None
) -> None:
    length = len(table)
    # Not all: tables are long, and a wrong frequency is wrong nearly everywhere.
    spread = np.linspace(0, length - 1, _POSITIONS).astype(np.int64)
    positions = np.union1d(np.arange(min(length, _POSITIONS)), spread)
    cosine, sine = rotary.tables(module, torch.from_numpy(positions), layer_type)
    wanted = (cosine if is_cosine else sine)[:, : cosine.shape[1] // 2].numpy()
    found = table[positions]
    if found.shape == wanted.shape:
        allowed = _ROUNDING * (1 + positions[:, None]) * max(1.0, float(cosine.abs().max()))
        wrong = ~(np.abs(found - wanted) <= allowed).all(axis=1)
        if not wrong.any():
            return
        where = f" from position {positions[wrong.argmax()]} on"
    else:
        where = ": it is of another width"
    raise ParityFailed(
        f"The graph's rotary table {name} is not the model's{where}.",
        "It was not written. Please report the model's config.json.",
    )
