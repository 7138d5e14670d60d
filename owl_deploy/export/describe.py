"""What is in a deployment: its weights' non-zeros, its operators, its files."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from owl_deploy.export import onnx_file
from owl_deploy.inference.loading import contents
from owl_deploy.models.digests import digest
from owl_deploy.runtime import pack

_PACKED = ("SparseMatMul", "ProgramFp16", "ProgramFp32")  # this package's operators
_READS_WEIGHT = ("MatMul", "Gemm", "Gather")
_QUANTIZATION = ("bits", "block_size", "accuracy_level")
_SIZES = ("N", "K", "bits", "block_size")


def files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file but the manifest, by its path within the folder."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
        for name in contents(folder)
    }


def graph(path: Path) -> dict[str, Any]:
    """Operators, weights and quantization of the model at `path`, read from the file as it is.

    `weights`: for each weight of two axes or more, its shape, values and non-zeros; a quantized one
    counts its codes that stand for zero. `total`, `nonzeros` and `sparsity` (None where nothing was
    counted) are over the weights of the linear layers, the head among them, not the embedding. A
    deployment that is no ONNX graph has none of all this. `quantization`: that of the products with
    the fewest bits; others may have more, as their weights say.
    """
    nodes = list(ir.load(path).graph) if path.is_file() else []
    weights: dict[str, dict[str, Any]] = {}
    for node in nodes:
        for value, row in _weights_of(node):
            weights.setdefault(str(value.name), row)
    linear = [row for row in weights.values() if row["kind"] == "linear"]
    values = sum(row["values"] for row in linear)
    nonzeros = sum(row["nonzeros"] for row in linear)
    return {
        "nodes": dict(sorted(Counter(node.op_type for node in nodes).items())),
        "weights": weights,
        "total": values,
        "nonzeros": nonzeros,
        "sparsity": 1 - nonzeros / values if values else None,
        "quantization": min(
            filter(None, map(_quantization, nodes)), key=lambda found: found["bits"], default=None
        ),
    }


def _quantization(node: ir.Node) -> dict[str, int] | None:
    """The settings of a quantized matrix product; None for another node.

    `accuracy_level` 4 means that the activations are rounded to int8 as well.
    """
    if node.op_type != "MatMulNBits":
        return None
    settings = {name: node.attributes.get_int(name, 0) for name in _QUANTIZATION}
    return {**settings, "zero_points": int(any(node.inputs[3:4]))}


def _weights_of(node: ir.Node) -> Iterator[tuple[ir.Value, dict[str, Any]]]:
    """The weights that a matrix product or a look-up reads."""
    constants = [value for value in node.inputs if value is not None and value.is_initializer()]
    if node.op_type in _PACKED:
        for value in constants:
            if value.dtype == ir.DataType.UINT8:
                info = pack.inspect(_read(value))
                yield value, _row("linear", (info.rows, info.cols), info.nonzeros)
    elif node.op_type == "MatMulNBits":
        if node.inputs[1] in constants:
            yield node.inputs[1], _quantized(node)
    elif node.op_type in _READS_WEIGHT:
        for value in constants:
            if value in node.inputs[:2] and value.dtype == ir.DataType.FLOAT:
                array = _read(value)
                if array.ndim >= 2:
                    kind = "embedding" if node.op_type == "Gather" else "linear"
                    yield value, _row(kind, array.shape, int(np.count_nonzero(array)))


def _row(kind: str, shape: Sequence[int], nonzeros: int) -> dict[str, Any]:
    values = math.prod(shape)
    return {"kind": kind, "shape": list(shape), "values": values, "nonzeros": nonzeros}


def _quantized(node: ir.Node) -> dict[str, Any]:
    """A MatMulNBits weight: codes [out, blocks, bytes], zero points [out, blocks] or the middle."""
    rows, columns, bits, block = (node.attributes.get_int(n, 0) for n in _SIZES)
    _, codes, _, *rest = node.inputs
    unpacked = _unpack(_read(codes).reshape(rows, -1), bits)
    zeros: Any = 1 << (bits - 1)
    if rest and rest[0] is not None:
        packed = _read(rest[0]).reshape(rows, -1)
        zeros = np.repeat(_unpack(packed, bits), block, axis=1)[:, : unpacked.shape[1]]
    nonzeros = int(np.count_nonzero((unpacked != zeros)[:, :columns]))
    return {**_row("linear", (rows, columns), nonzeros), "bits": bits}


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, bytes] to one code each, low bits first, [rows, bytes * 8 / bits]."""
    if bits == 8:
        return packed
    mask = np.uint8((1 << bits) - 1)
    parts = [(packed >> np.uint8(shift)) & mask for shift in range(0, 8, bits)]
    return np.stack(parts, axis=-1).reshape(packed.shape[0], -1)


def _read(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return onnx_file.read(value.const_value)
