"""The operators in stock ONNX Runtime: right results, clear errors for hostile weights."""

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.runtime import pack, register

from .conftest import Kernels
from .test_pack import sparse_weight


def session(block: NDArray[np.uint8], cols: int) -> onnxruntime.InferenceSession:
    """x [n, cols] -> SparseMatMul."""
    node = helper.make_node("SparseMatMul", ["x", "w"], ["y"], domain="ai.owl")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
        [numpy_helper.from_array(block, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, check_custom_domain=False)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    register(options)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 5])
def test_runs_in_onnxruntime(rows: int) -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "fp32")
    x = np.random.default_rng(0).standard_normal((rows, 96)).astype(np.float32)
    y = session(block, 96).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ pack.unpack(block).T, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_hostile_weight_is_refused_when_the_session_opens() -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "int8").copy()
    block[pack.inspect(block).mask_offset] ^= 1
    with pytest.raises(Exception, match=r"ai\.owl: packed weight"):
        session(block, 96)


def test_wrong_width_is_refused(kernels: Kernels) -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "bf16")
    with pytest.raises(Exception, match="last dimension"):
        session(block, 95).run(None, {"x": np.zeros((1, 95), dtype=np.float32)})
