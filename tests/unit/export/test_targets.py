"""What `export` refuses, and that it leaves nothing behind when it does."""

import errno
import shutil
from types import SimpleNamespace

import pytest

from owl_deploy import artefact
from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed
from owl_deploy.export import genai, parity, targets
from owl_deploy.export.targets import export


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target": "deepsparce"}, "Did you mean 'deepsparse'?"),
        ({"target": "deepsparse", "precision": "int8"}, "has no precision 'int8'. It has: fp32."),
        ({"target": "onnxruntime", "precision": "int2"}, "It has: fp32, int8, int4."),
        ({"target": "onnxruntime", "values": "bf16"}, "no value type 'bf16'. --values is for owl."),
        ({"target": "onnxruntime", "values": "int8"}, "Use --precision int8, or --target owl."),
        ({"target": "owl", "precision": "int8"}, "no precision 'int8'. Use --values int8."),
        ({"target": "owl", "values": "int8", "head": "hole"}, "Did you mean 'whole'?"),
        ({"target": "deepsparse", "head": "whole"}, "Only --target owl has a choice of heads."),
    ],
)
def test_refused_before_any_work(llama, tmp_path, options, complaint):
    with pytest.raises(BadInput) as refused:
        export(llama, tmp_path / "out", **options)
    assert complaint in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match="the disk has"):
        export(llama, tmp_path / "out", target="deepsparse")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full(llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(targets.traced.passes, "save", full)
    with pytest.raises(BadInput, match="The disk became full"):
        export(llama, tmp_path / "out", target="deepsparse")
    assert list(tmp_path.iterdir()) == []


def test_failed_parity_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(parity.engines, "is_installed", lambda _: False)
    honest = targets.traced._MASKED
    monkeypatch.setattr(targets.traced, "_MASKED", 0.0)
    with pytest.raises(parity.ParityFailed) as failed:
        export(llama, tmp_path / "out", target="deepsparse")
    assert failed.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(targets.traced, "_MASKED", honest)
    export(llama, tmp_path / "out", target="deepsparse")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_family_that_the_builder_lacks_is_traced(llama, tmp_path, monkeypatch):
    def lacking(*_):
        raise genai.FamilyNotBuilt

    monkeypatch.setattr(genai, "build", lacking)
    manifest = export(llama, tmp_path / "out", target="onnxruntime")
    assert "does not know 'llama'" in manifest["note"]
    assert (manifest["opens_in_genai"], manifest["engine"]) == (False, None)
    assert manifest["graph"] == "traced"
    assert artefact.read_manifest(tmp_path / "out") == manifest
    with pytest.raises(BadInput, match="there is no int4 for it"):
        export(llama, tmp_path / "other", target="onnxruntime", precision="int4")


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        (
            "NotImplementedError: The x model is not currently supported.",
            genai.FamilyNotBuilt,
            "x model",
        ),
        ("OSError: [Errno 28] No space left on device", BadInput, "disk is full"),
        ("ModuleNotFoundError: No module named 'onnx_ir'", EnvironmentFailed, "'onnx_ir'"),
        ("Reading\nKeyError: 'rope_type'\n", EngineFailed, "KeyError: 'rope_type'"),
        ("", EngineFailed, "no output"),
    ],
)
def test_what_a_failed_builder_means(tmp_path, words, error, complaint):
    with pytest.raises(error, match=complaint):
        genai._check_result(1, words, tmp_path)
