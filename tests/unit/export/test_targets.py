"""What `export` refuses, and that it leaves nothing behind when it does."""

import contextlib
import json
import resource
import shutil
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest

from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed, is_full_disk
from owl_deploy.export import genai, onnx_file, parity, targets
from owl_deploy.export.targets import export
from owl_deploy.utils import artefact


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"target": "deepsparce"}, "Did you mean 'deepsparse'?"),
        (
            {"target": "deepsparse", "precision": "int8"},
            "The target 'deepsparse' has no precision 'int8'. "
            "It has: fp32; --target onnxruntime or owl has int8.",
        ),
        ({"target": "onnxruntime", "precision": "int2"}, "'int2'. It has: fp32, int8, int4."),
        (
            {"target": "onnxruntime", "precision": "bf16"},
            "'bf16'. It has: fp32, int8, int4; --target owl has bf16.",
        ),
        (
            {"target": "owl", "precision": "Q8_0"},
            "'Q8_0'. It has: bf16, int8, int4, int3, fp32; --target llama.cpp has Q8_0.",
        ),
        ({"target": "owl", "precision": "int8", "head": "hole"}, "Did you mean 'whole'?"),
        ({"target": "deepsparse", "head": "whole"}, "Only --target owl has a choice of heads."),
    ],
)
def test_refused_before_any_work(llama, tmp_path, options, complaint):
    with pytest.raises(BadInput) as refused:
        export(llama, tmp_path / "out", **options)
    assert complaint in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_target_has_a_precision_of_its_own():
    found = {target: targets.precision_of(target) for target in targets.TARGETS}
    assert found.pop("llama.cpp") == "Q8_0"
    assert found == {"deepsparse": "fp32", "onnxruntime": "fp32", "owl": "bf16"}
    assert targets.precision_of("owl", "int8") == "int8"


@pytest.mark.parametrize(
    ("target", "said", "found"),
    [("owl", "INT4", "int4"), ("llama.cpp", "q4_k_m", "Q4_K_M"), ("deepsparse", "FP32", "fp32")],
)
def test_a_precision_is_meant_however_it_is_spelled(target, said, found):
    assert targets.precision_of(target, said) == found
    with pytest.raises(BadInput, match=r"--target llama\.cpp has Q4_K_M"):
        targets.precision_of("owl", "q4_k_m")


def test_the_help_names_every_precision(owl):
    told = " ".join(owl("export", "--help")[1].split())
    for target, row in targets.TARGETS.items():
        *first, last = row.precisions
        choices = f"{', '.join(first)} or {last}" if first else last
        assert f"{choices} for {target}" in told


class Built(Exception):
    """The room was found enough, and the work began."""


@pytest.mark.parametrize(
    ("target", "precision", "bytes_a_weight"),
    [
        ("onnxruntime", "fp32", 4),
        ("onnxruntime", "int4", 0.9),
        ("owl", "bf16", 2),
        ("owl", "int8", 1.1),
        ("owl", "int4", 0.6),
        ("owl", "int3", 0.5),
        ("owl", "fp32", 4),
    ],
)
def test_the_room_that_is_asked_for(
    llama, tmp_path, monkeypatch, target, precision, bytes_a_weight
):
    def begin(*_):
        raise Built

    monkeypatch.setattr(genai, "build", begin)
    monkeypatch.setattr(targets, "library_path", lambda: None)
    source = targets.Source(llama)
    needed = bytes_a_weight * source.checkpoint.weights() + 4 * 320 * 64
    for free, outcome in ((needed - 1, BadInput), (needed + 1, Built)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with pytest.raises(outcome):
            export(llama, tmp_path / "out", target=target, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(BadInput, match="the disk has"):
        export(llama, tmp_path / "out", target="deepsparse")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def file_limit(size_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("external_bytes", [0, targets.EXTERNAL_BYTES])
def test_a_disk_that_becomes_full(llama, tmp_path, monkeypatch, external_bytes):
    monkeypatch.setattr(targets, "EXTERNAL_BYTES", external_bytes)
    with file_limit(100_000), pytest.raises(EnvironmentFailed, match="The disk became full"):
        export(llama, tmp_path / "out", target="deepsparse")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_becomes_full_of_packed_weights(tmp_path):
    block = ir.Tensor(np.ones(200_000, np.uint8), name="w")
    weight = ir.val("w", const_value=block)
    node = ir.node("Identity", [weight])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], name="g")
    with file_limit(100_000), pytest.raises(OSError, match="written") as full:
        onnx_file.save(ir.Model(graph, ir_version=10), tmp_path)
    assert is_full_disk(full.value)


def test_failed_parity_leaves_nothing(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(parity.inference, "is_installed", lambda _: False)
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
    manifest = export(llama, tmp_path / "out", target="onnxruntime").to_json()
    assert "does not know 'llama'" in manifest["note"]
    assert (manifest["opens_in_genai"], manifest["engine"]) == (False, None)
    assert manifest["graph"] == "traced"
    assert json.loads((tmp_path / "out" / artefact.MANIFEST).read_text()) == manifest
    with pytest.raises(BadInput, match="there is no int4 for it"):
        export(llama, tmp_path / "other", target="onnxruntime", precision="int4")


@pytest.mark.parametrize("target", ["onnxruntime", "owl"])
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("The dynamic RoPE style", "'dynamic' rotary scaling"),
        ("A head size of 24", "a head size of 24, which is no multiple of 16"),
    ],
)
def test_what_the_builder_lacks_is_named(llama, tmp_path, monkeypatch, target, said, told):
    def lacking(*_):
        words = f"NotImplementedError: {said} is not currently supported.\n"
        genai._check_result(1, words, tmp_path)

    monkeypatch.setattr(genai, "build", lacking)
    monkeypatch.setattr(targets, "library_path", lambda: None)
    known = f"does not know 'llama' with {told}, .* fp32"
    with pytest.raises(BadInput, match=known):
        export(llama, tmp_path / "out", target=target, precision="int8")


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        (
            "NotImplementedError: The x model is not currently supported.",
            genai.FamilyNotBuilt,
            "x model",
        ),
        ("OSError: [Errno 28] No space left on device", EnvironmentFailed, "disk is full"),
        ("ModuleNotFoundError: No module named 'onnx_ir'", EnvironmentFailed, "'onnx_ir'"),
        ("Reading\nKeyError: 'rope_type'\n", EngineFailed, "KeyError: 'rope_type'"),
        ("", EngineFailed, "no output"),
    ],
)
def test_what_a_failed_builder_means(tmp_path, words, error, complaint):
    with pytest.raises(error, match=complaint):
        genai._check_result(1, words, tmp_path)


def test_a_builder_that_was_killed_wanted_memory(tmp_path):
    with pytest.raises(EnvironmentFailed, match="was killed, as it happens where memory runs out"):
        genai._check_result(-9, "Progress: 100 %", tmp_path)
