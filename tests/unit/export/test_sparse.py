"""What the rewritten graph's folder holds, and what is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.export import sparse
from owl_deploy.inference.loading import LAST_LOGITS
from owl_deploy.runtime import LIBRARY_NAME, pack


def graph(*kinds: str) -> ir.Model:
    """Of these nodes, one after the other."""
    weight = np.zeros((8, 20), np.float32)
    weight[:, ::3] = 1
    nodes = [
        helper.make_node(kind, [str(i), *["w"] * (kind == "MatMul")], [str(i + 1)])
        for i, kind in enumerate(kinds)
    ]
    x = helper.make_tensor_value_info("0", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info(str(len(kinds)), TensorProto.FLOAT, None)
    made = helper.make_graph(nodes, "test", [x], [y], [numpy_helper.from_array(weight, "w")])
    return ir.from_proto(helper.make_model(made))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What the builder writes, but for the graph."""
    config = {"model": {"decoder": {"session_options": {"log_id": "kept"}}}}
    path = tmp_path / "out"
    path.mkdir()
    (path / "genai_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "libowl_runtime.so"
    path.write_bytes(b"a library")
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", str(path))
    return path


def test_the_folder_is_whole(folder: Path, library: Path) -> None:
    found = sparse.sparsify(graph("MatMul", "Neg"), folder, "bf16")
    assert found["sparse_weights"] == 1
    assert found["elements"] == 160
    assert {path.name for path in folder.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        library.name,
    }
    config = json.loads((folder / "genai_config.json").read_text())
    options = config["model"]["decoder"]
    assert LAST_LOGITS not in options["session_options"]  # something follows the head
    assert options["session_options"]["custom_ops_library"] == library.name
    assert options["session_options"]["log_id"] == "kept"
    (packed,) = onnx.load(folder / "model.onnx").graph.initializer
    block = numpy_helper.to_array(packed, str(folder))
    assert pack.inspect(block).size_bytes == found["packed_bytes"]


def test_a_library_of_another_name_gets_the_one_that_owl_knows(
    folder: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = library.rename(library.with_name("my_owl.so"))
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", str(other))
    found = sparse.sparsify(graph("MatMul"), folder, "int8")
    assert (folder / LIBRARY_NAME).read_bytes() == b"a library"
    decoder = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]
    assert decoder["session_options"]["custom_ops_library"] == LIBRARY_NAME
    assert found["cache"] == "fp32"  # there is no attention whose cache would be made smaller


def test_a_graph_that_cannot_be_rewritten_is_refused(folder: Path, library: Path) -> None:
    with pytest.raises(BadInput, match="No linear layer"):
        sparse.sparsify(graph("Neg"), folder)
    library.unlink()
    with pytest.raises(EnvironmentFailed, match="is missing"):
        sparse.sparsify(graph("MatMul"), folder)
    assert [path.name for path in folder.iterdir()] == ["genai_config.json"]
