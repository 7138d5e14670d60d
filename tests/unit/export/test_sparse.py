"""What the rewritten folder holds, and which folders are refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.export import sparse
from owl_deploy.runtime import pack


def deployment(folder: Path, *kinds: str) -> Path:
    """Of a graph of these nodes, one after the other."""
    folder.mkdir()
    weight = np.zeros((8, 20), np.float32)
    weight[:, ::3] = 1
    nodes = [
        helper.make_node(kind, [str(i), *["w"] * (kind == "MatMul")], [str(i + 1)])
        for i, kind in enumerate(kinds)
    ]
    x = helper.make_tensor_value_info("0", TensorProto.FLOAT, ["n", 8])
    y = helper.make_tensor_value_info(str(len(kinds)), TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "test", [x], [y], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph), folder / "model.onnx")
    config = {"model": {"decoder": {"session_options": {"log_id": "kept"}}}}
    (folder / "genai_config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "libowl_runtime.so"
    path.write_bytes(b"a library")
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", str(path))
    return path


def test_the_folder_is_whole(tmp_path: Path, library: Path) -> None:
    source = deployment(tmp_path / "dense", "MatMul", "Neg")
    found = sparse.sparsify_deployment(source, tmp_path / "out", "bf16")
    assert found["sparse_weights"] == 1
    assert found["elements"] == 160
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "model.onnx",
        "model.onnx.data",
        "genai_config.json",
        "tokenizer.json",
        library.name,
    }
    config = json.loads((out / "genai_config.json").read_text())
    assert config["search"]["chunk_size"] == sparse.PROMPT_CHUNK
    options = config["model"]["decoder"]
    assert options["session_options"]["custom_ops_library"] == library.name
    assert options["session_options"]["log_id"] == "kept"
    (packed,) = onnx.load(out / "model.onnx").graph.initializer
    block = numpy_helper.to_array(packed, str(out))
    assert pack.inspect(block).size_bytes == found["packed_bytes"]


def test_a_folder_that_cannot_be_rewritten_is_refused(tmp_path: Path, library: Path) -> None:
    with pytest.raises(BadInput, match=r"model\.onnx is missing"):
        sparse.sparsify_deployment(tmp_path, tmp_path / "out")
    source = deployment(tmp_path / "dense", "Neg")
    with pytest.raises(BadInput, match="No linear layer"):
        sparse.sparsify_deployment(source, tmp_path / "out")
    library.unlink()
    with pytest.raises(EnvironmentFailed, match="is missing"):
        sparse.sparsify_deployment(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
