"""What is in a deployment: its weights' non-zeros, its operators, its files."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from owl_deploy.artefact import MANIFEST, sha256
from owl_deploy.runtime import pack

_PACKED = ("SparseMatMul", "ProgramFp16", "ProgramFp32")  # this package's operators
_READS_WEIGHT = ("MatMul", "Gemm", "MatMulNBits", "Gather", "GatherBlockQuantized", *_PACKED)
_QUANTIZATION = ("bits", "block_size", "accuracy_level")


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest, by name."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    }


def graph(path: Path) -> dict[str, Any]:
    """Operators, weights and quantization of the model at `path`, read from the file as it is.

    `weights`: for each weight of two axes or more, its shape, values and non-zeros; a quantized one
    counts its codes that stand for zero. `total`, `nonzeros` and `sparsity`
    are over the weights of the linear layers, the head among them, not the embedding.
    """
    model = onnx.load_model(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    weights: dict[str, dict[str, Any]] = {}
    for node in model.graph.node:
        if node.op_type in _READS_WEIGHT:
            for name, row in _weights_of(node, tensors, path.parent):
                weights.setdefault(name, row)
    linear = [row for row in weights.values() if row["kind"] == "linear"]
    values = sum(row["values"] for row in linear)
    nonzeros = sum(row["nonzeros"] for row in linear)
    return {
        "nodes": dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        "weights": weights,
        "total": values,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / values if values else 0.0,
        "quantization": _quantization(model),
    }


def _quantization(model: onnx.ModelProto) -> dict[str, int] | None:
    """The settings of the quantized matrix products; None when there are none.

    `accuracy_level` 4 means that the activations are rounded to int8 as well.
    """
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            attributes = {attribute.name: attribute.i for attribute in node.attribute}
            settings = {name: attributes.get(name, 0) for name in _QUANTIZATION}
            return {**settings, "zero_points": int(len(node.input) > 3 and bool(node.input[3]))}
    return None


def _weights_of(
    node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], folder: Path
) -> list[tuple[str, dict[str, Any]]]:
    if node.op_type in _PACKED:
        return _packed(node, tensors, folder)
    kind = "embedding" if node.op_type.startswith("Gather") else "linear"
    attributes = {a.name: a for a in node.attribute}
    if "bits" in attributes:
        tensor = tensors.get(node.input[1] if kind == "linear" else node.input[0])
        if tensor is None:
            return []
        zero_points = next((tensors[n] for n in node.input[3:4] if n in tensors), None)
        if kind == "embedding":
            return []  # its codes have another layout, and it takes part in no matrix product
        return [(tensor.name, _quantized(tensor, zero_points, attributes, folder))]
    found = []
    for name in node.input[:2]:
        tensor = tensors.get(name)
        if tensor is not None and len(tensor.dims) >= 2 and tensor.data_type == 1:
            array = read(tensor, folder)
            row = {
                "kind": kind,
                "shape": list(array.shape),
                "values": int(array.size),
                "nonzeros": int(np.count_nonzero(array)),
            }
            found.append((name, row))
    return found


def _packed(
    node: onnx.NodeProto, tensors: dict[str, onnx.TensorProto], folder: Path
) -> list[tuple[str, dict[str, Any]]]:
    """The weight of one of this package's operators, packed [out, in]."""
    found = []
    for name in node.input:
        tensor = tensors.get(name)
        if tensor is not None and tensor.data_type == onnx.TensorProto.UINT8:
            info = pack.inspect(read(tensor, folder))
            row = {
                "kind": "linear",
                "shape": [info.rows, info.cols],
                "values": info.rows * info.cols,
                "nonzeros": info.nonzeros,
            }
            found.append((name, row))
    return found


def _quantized(
    tensor: onnx.TensorProto,
    zero_points: onnx.TensorProto | None,
    attributes: dict[str, onnx.AttributeProto],
    folder: Path,
) -> dict[str, Any]:
    """A MatMulNBits weight: codes [out, blocks, bytes], zero points [out, blocks] or the middle."""
    bits = attributes["bits"].i
    rows, columns = attributes["N"].i, attributes["K"].i
    codes = _unpack(read(tensor, folder).reshape(rows, -1), bits)
    block = attributes["block_size"].i
    zeros: Any = 1 << (bits - 1)
    if zero_points is not None:
        packed = read(zero_points, folder).reshape(rows, -1)
        zeros = np.repeat(_unpack(packed, bits), block, axis=1)[:, : codes.shape[1]]
    nonzeros = np.count_nonzero((codes != zeros)[:, :columns])
    return {
        "kind": "linear",
        "shape": [rows, columns],
        "values": rows * columns,
        "nonzeros": int(nonzeros),
        "bits": bits,
    }


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes] to one code each, low bits first, [rows, bytes * 8 / bits]."""
    if bits == 8:
        return packed
    mask = np.uint8((1 << bits) - 1)
    parts = [(packed >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(packed.shape[0], -1)


def read(tensor: onnx.TensorProto, folder: Path) -> np.ndarray:
    """A tensor's values; external ones are mapped, not loaded."""
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    return np.memmap(
        folder / place["location"],
        dtype=onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type),
        mode="r",
        offset=int(place.get("offset", 0)),
        shape=tuple(tensor.dims),
    )
