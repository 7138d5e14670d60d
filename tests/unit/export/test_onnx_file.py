"""Weights beside a graph: in the order of their use, on pages, mapped when they are read."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from owl_deploy.export import onnx_file

ARRAYS = {
    "second": np.arange(1000, dtype=np.float32),
    "unread": np.arange(10, dtype=np.float32),
    "small": np.arange(255, dtype=np.float32),  # 1020 bytes
    "first": np.arange(256, dtype=np.float32),
}


@pytest.fixture
def model() -> ir.Model:
    """x + first + small + second."""
    weights = {
        name: ir.val(name, const_value=ir.tensor(array, name=name))
        for name, array in ARRAYS.items()
    }
    x = ir.val("x", ir.DataType.FLOAT, [1])
    nodes: list[ir.Node] = []
    for name in ("first", "small", "second"):
        before = nodes[-1].outputs[0] if nodes else x
        nodes.append(ir.node("Add", [before, weights[name]], name=name))
    nodes[-1].outputs[0].name = "y"
    nodes[0].outputs[0].shape = ir.Shape([256])
    graph = ir.Graph(
        [x], nodes[-1].outputs, nodes=nodes, initializers=list(weights.values()), name="g"
    )
    return ir.Model(graph, ir_version=10)


def places(folder: Path) -> dict[str, int | None]:
    tensors = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    return {
        tensor.name: next((int(e.value) for e in tensor.external_data if e.key == "offset"), None)
        for tensor in tensors
    }


def test_large_weights_lie_on_pages_in_the_order_of_their_use(
    model: ir.Model, tmp_path: Path
) -> None:
    onnx_file.save(model, tmp_path)
    found = places(tmp_path)
    assert found == {"unread": None, "first": 0, "small": None, "second": 4096}
    assert [name for name in found if name != "unread"] == ["first", "small", "second"]
    loaded = ir.load(tmp_path / "model.onnx").graph
    assert not any(value.shape for value in loaded[0].outputs)
    for name, array in ARRAYS.items():
        tensor = loaded.initializers[name].const_value
        assert tensor is not None
        values = onnx_file.read(tensor)
        assert isinstance(values, np.memmap) == (found[name] is not None)
        np.testing.assert_array_equal(values, array)


def test_all_in_one_file(model: ir.Model, tmp_path: Path) -> None:
    onnx_file.save(model, tmp_path, external=False)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert set(places(tmp_path).values()) == {None}
