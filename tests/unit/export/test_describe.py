import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.export import describe


def save(path, nodes, tensors):
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    values = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, values)), path)


def test_counts_zeros_of_linear_weights(tmp_path):
    weight = np.array([[1, 0, 2], [0, 0, 3], [4, 5, 0], [0, 6, 0]], np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    save(tmp_path / "model.onnx", nodes, {"w": weight})
    found = describe.graph(tmp_path / "model.onnx")
    assert found["weights"] == {
        "w": {"kind": "linear", "shape": [4, 3], "values": 12, "nonzeros": 6}
    }
    assert (found["total"], found["nonzeros"], found["sparsity"]) == (12, 6, 0.5)
    assert found["nodes"] == {"MatMul": 1}
    assert found["quantization"] is None


@pytest.mark.parametrize("zero_points", [None, 3])
def test_counts_codes_that_stand_for_zero(tmp_path, zero_points):
    # Two rows of 16 int4 codes, low bits first: row 0 all at the middle, row 1 all threes.
    codes = np.array([[[0x88] * 8], [[0x33] * 8]], np.uint8)
    tensors = {"q": codes, "s": np.ones((2, 1), np.float32)}
    names = ["x", "q", "s"]
    if zero_points is not None:
        tensors["z"] = np.full((2, 1), zero_points, np.uint8)
        names.append("z")
    sizes = {"K": 16, "N": 2, "bits": 4, "block_size": 16, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", names, ["y"], domain="com.microsoft", **sizes)
    save(tmp_path / "model.onnx", [node], tensors)
    found = describe.graph(tmp_path / "model.onnx")
    assert found["nonzeros"] == 16
    assert found["weights"]["q"]["shape"] == [2, 16]
    expected = {"bits": 4, "block_size": 16, "accuracy_level": 4}
    assert found["quantization"] == expected | {"zero_points": int(zero_points is not None)}


def test_files_leave_out_the_manifest_and_folders_but_that_of_templates(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "owl.json").write_text("{}")
    for folder in ("additional_chat_templates", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "rag.jinja").write_text("{{ messages }}")
    found = describe.files(tmp_path)
    assert list(found) == ["a", "additional_chat_templates/rag.jinja"]
    assert found["a"]["bytes"] == 3
    assert found["a"]["sha256"].startswith("ba7816bf")
