import json
import os
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from owl_deploy.errors import BadInput
from owl_deploy.export import describe
from owl_deploy.inference import open_deployment
from owl_deploy.inference.deployment import told_numbers
from owl_deploy.inference.verify import verify
from owl_deploy.utils.artefact import MANIFEST, sha256


def graph(folder: Path, inputs: list[str], width: int | str = 11) -> Path:
    folder.mkdir(exist_ok=True)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in inputs]
    node = helper.make_node("Identity", [inputs[0]], ["logits"])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, "step", width])
    model = helper.make_model(helper.make_graph([node], "g", values, [logits]))
    onnx.save(model, folder / "model.onnx")
    return folder


DECODER = ["input_ids", "past_key_values.0.key"]


def test_a_path_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not UTF-8"):
        open_deployment(graph(tmp_path / os.fsdecode(b"d\xff"), DECODER))


@pytest.mark.parametrize(
    ("manifest", "inputs", "target"),
    [
        (None, DECODER, "onnxruntime"),
        (None, [*DECODER, "causal_mask"], "deepsparse"),
        ({"target": "owl", "precision": "int8", "sparsity": 0.5}, DECODER, "owl"),
        # As exports wrote it while `values` was a word of its own.
        ({"target": "owl", "precision": "fp32", "values": "int8", "sparsity": 0.5}, DECODER, "owl"),
    ],
)
def test_targets(
    tmp_path: Path, manifest: dict[str, object] | None, inputs: list[str], target: str
) -> None:
    graph(tmp_path, inputs)
    if manifest is not None:
        (tmp_path / "owl.json").write_text(json.dumps(manifest))
    deployment = open_deployment(tmp_path)
    assert deployment.target == target
    assert deployment.vocab == 11
    assert deployment.size_bytes == (tmp_path / "model.onnx").stat().st_size
    if manifest is not None:
        assert deployment.precision == "int8"
        assert deployment.zeros == 0.5


def test_the_sources_blocks_are_told_by_the_deployment_or_else_by_the_source(
    tmp_path: Path,
) -> None:
    block = {"name": "b", "achieved": 0.5, "sparsity": 0.5}
    source = {"kind": "checkpoint", "blocks": [block | {"weights": 4}]}
    folder = graph(tmp_path / "deployment", DECODER)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / MANIFEST).write_text(json.dumps(source))

    def shares(**source: object) -> list[float]:
        (folder / MANIFEST).write_text(json.dumps({"kind": "deployment", "source": source}))
        return [one.achieved for one in open_deployment(folder).blocks]

    assert shares(path=str(tmp_path / "source")) == [0.5]  # as earlier versions wrote it
    assert shares(path="/nowhere") == []
    assert shares(path="/nowhere", blocks=[block | {"achieved": 0.4}]) == [0.4]


def test_a_genai_folder_gives_its_vocabulary(tmp_path: Path) -> None:
    graph(tmp_path, [*DECODER, "causal_mask"], width="vocab")
    with pytest.raises(BadInput, match="vocab_size"):
        open_deployment(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {"vocab_size": 12}}')
    assert open_deployment(tmp_path).vocab == 12
    assert open_deployment(tmp_path).target == "onnxruntime"


def test_a_file_that_is_not_what_was_exported(tmp_path: Path) -> None:
    graph(tmp_path, DECODER)
    (tmp_path / "model.onnx.data").write_bytes(b"weights")
    (tmp_path / "genai_config.json").write_text("{}")
    files = {
        path.name: {"sha256": sha256(path)} for path in tmp_path.iterdir() if path.name != MANIFEST
    }
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    open_deployment(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"search": {}}')
    with pytest.raises(BadInput, match=r"genai_config\.json is damaged, or was changed"):
        open_deployment(tmp_path)
    (tmp_path / "genai_config.json").write_text("{}")
    (tmp_path / "model.onnx.data").write_bytes(b"weighty")
    with pytest.raises(BadInput, match=r"model\.onnx\.data is damaged, or was changed"):
        open_deployment(tmp_path)
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(BadInput, match=r"model\.onnx\.data is missing"):
        open_deployment(tmp_path)


def test_templates_in_a_folder_are_a_tokenizers_files(tmp_path: Path) -> None:
    """Transformers reads them from there, and one called "default" goes before all others."""
    graph(tmp_path, DECODER)
    templates = tmp_path / "additional_chat_templates"
    templates.mkdir()
    (templates / "rag.jinja").write_text("{{ messages }}")
    files = describe.files(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    before = verify(tmp_path)
    assert before.whole
    assert [row.name for row in before.rows] == [*files]
    (templates / "default.jinja").write_text("evil")
    (templates / "note.txt").write_text("nobody reads it")
    (templates / "rag.jinja").write_text("evil")
    found = verify(tmp_path)
    changed = {row.name: row.state for row in found.rows if not row.as_exported}
    assert changed == {
        "additional_chat_templates/default.jinja": "added",
        "additional_chat_templates/rag.jinja": "edited",
    }
    assert not found.whole
    assert found.fingerprint != before.fingerprint
    open_deployment(tmp_path)  # as with other files of a tokenizer
    (templates / "rag.jinja").unlink()
    with pytest.raises(BadInput, match=r"rag\.jinja is missing"):
        open_deployment(tmp_path)


@pytest.mark.parametrize("name", ["../x", "additional_chat_templates/../x", "other/x.jinja"])
def test_a_manifest_that_names_a_file_elsewhere(tmp_path: Path, name: str) -> None:
    graph(tmp_path, DECODER)
    (tmp_path / MANIFEST).write_text(json.dumps({"files": {name: {"sha256": ""}}}))
    with pytest.raises(BadInput, match="a file elsewhere"):
        open_deployment(tmp_path)


def test_each_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph(tmp_path, DECODER, width="vocab")
    model = {"vocab_size": 12, "context_length": 34}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    files = {
        path.name: {"sha256": sha256(path)} for path in tmp_path.iterdir() if path.name != MANIFEST
    }
    (tmp_path / MANIFEST).write_text(json.dumps({"files": files}))
    read: list[str] = []
    load, text = onnx.load, Path.read_text
    monkeypatch.setattr(onnx, "load", lambda file, **_: read.append(Path(file).name) or load(file))
    monkeypatch.setattr(Path, "read_text", lambda s, **_: read.append(s.name) or text(s))
    deployment = open_deployment(tmp_path)
    assert (deployment.vocab, deployment.max_context) == (12, 34)
    assert sorted(read) == ["genai_config.json", "model.onnx", "owl.json"]


def test_recorded_perplexity(tmp_path: Path) -> None:
    graph(tmp_path, DECODER)
    assert open_deployment(tmp_path).perplexity is None
    (tmp_path / "owl.json").write_text('{"perplexity": {"text": "t", "value": 13.5}}')
    assert open_deployment(tmp_path).perplexity == 13.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "is a file"),
        (lambda p: p.mkdir(), "no model.onnx"),
        (lambda p: graph(p, ["image"]), "not a decoder .* the inputs image"),
        (lambda p: (p.mkdir(), (p / "model.onnx").write_bytes(b"\xffnothing")), "not an ONNX file"),
    ],
)
def test_what_is_no_deployment_gets_one_sentence(
    tmp_path: Path, make: object, message: str
) -> None:
    assert callable(make)
    make(tmp_path / "d")
    with pytest.raises(BadInput, match=message):
        open_deployment(tmp_path / "d")


def test_an_unknown_target_is_named(tmp_path: Path) -> None:
    graph(tmp_path, DECODER)
    (tmp_path / "owl.json").write_text('{"target": "onnxruntim"}')
    with pytest.raises(BadInput, match="Did you mean 'onnxruntime'"):
        open_deployment(tmp_path)


def held_elsewhere() -> TensorProto:
    """Eight bytes of a file beside the folder."""
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret.bin")
    return tensor


def in_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(held_elsewhere())


def in_sparse_initializer(model: onnx.ModelProto) -> None:
    model.graph.sparse_initializer.add(dims=[2]).values.CopyFrom(held_elsewhere())


def in_sparse_constant(model: onnx.ModelProto) -> None:
    sparse = onnx.SparseTensorProto(dims=[2], values=held_elsewhere())
    model.graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))


def in_branch(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "inner", [], [], [held_elsewhere()])
    model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner))


def in_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value=held_elsewhere())
    model.functions.add(name="f", domain="d", output=["c"]).node.append(node)


@pytest.mark.parametrize(
    "place", [in_initializer, in_sparse_initializer, in_sparse_constant, in_branch, in_function]
)
def test_weights_elsewhere_are_refused_wherever_they_are_named(tmp_path: Path, place) -> None:
    folder = graph(tmp_path / "deployment", DECODER)
    (tmp_path / "secret.bin").write_bytes(bytes(8))
    model = onnx.load(folder / "model.onnx")
    place(model)
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(BadInput, match=r"names weights in '\.\./secret\.bin', elsewhere"):
        open_deployment(folder)


@pytest.mark.parametrize("told", ["x", 1.5, [1, [2]], {"a": 1}, True])
def test_a_number_that_is_none(tmp_path: Path, told: object) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"vocab_size": told}))
    with pytest.raises(BadInput, match=r"config\.json has .* for a number"):
        told_numbers(file, "vocab_size")


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    deployment = open_deployment(graph(tmp_path, DECODER))
    deployment.check_tokens([0, 10])
    deployment.check_tokens([])
    with pytest.raises(BadInput, match="gives the token 11, and the model has 11"):
        deployment.check_tokens([3, 11])


@pytest.mark.parametrize("file", ["genai_config.json", "config.json"])
def test_a_text_is_ended_by_tokens_that_the_model_has(tmp_path: Path, file: str) -> None:
    """Others are no places in its logits: one beyond them, and -1 is the last."""
    folder = graph(tmp_path, DECODER)
    told: dict[str, Any] = {"eos_token_id": [3, -1, 10, 11, 1_000_000], "vocab_size": 11}
    (folder / file).write_text(json.dumps({"model": told} if "genai" in file else told))
    assert open_deployment(folder).ends == [3, 10]


@pytest.mark.parametrize("content", ["{", "[1]", "\0"])
def test_a_config_that_tells_nothing_is_refused(tmp_path: Path, content: str) -> None:
    graph(tmp_path, DECODER)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BadInput, match=r"config\.json"):
        open_deployment(tmp_path)
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BadInput, match=r"config\.json is no file"):
        open_deployment(tmp_path)
