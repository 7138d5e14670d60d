"""The check can fail: on a wrong weight, on a lost mask, on NaN; and it tells who is at fault."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from owl_deploy.errors import EngineFailed
from owl_deploy.export import parity
from owl_deploy.export.source import Reference


def change_weight(folder, change):
    path = folder / "model.onnx"
    model = onnx.load(path)
    node = next(n for n in model.graph.node if "layers.1/mlp/up_proj/MatMul" in n.name)
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    array = numpy_helper.to_array(tensor).copy()
    change(array)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)


def check(folder, source, tolerance=1e-3, engine=None):
    return parity.check(folder, source.reference, tolerance=tolerance, engine=engine)


def test_a_right_graph_passes(source, build):
    figures = check(build(source), source)
    assert set(figures["runs"]) == {f"onnxruntime {n}" for n in ("uncached", "cached", "padded")}
    assert figures["relative_difference"] < 1e-5
    assert figures["equal_greedy_tokens"] == 1.0
    assert figures["equal_generated_tokens"] is None
    assert (figures["prompt_tokens"], figures["greedy_tokens"]) == (64, 32)


def test_a_wrong_weight_fails(source, build):
    folder = build(source)
    change_weight(folder, lambda array: array.__setitem__((slice(None), 3), 9.0))
    with pytest.raises(parity.ParityFailed, match="of the largest logit in ONNX Runtime"):
        check(folder, source)
    reported = check(folder, source, tolerance=None)
    assert reported["relative_difference"] > 1e-3


def test_nan_fails_whatever_is_allowed(source, build):
    folder = build(source)
    change_weight(folder, lambda array: array.fill(np.nan))
    with pytest.raises(parity.ParityFailed, match="not finite"):
        check(folder, source, tolerance=None)


def test_a_graph_that_sees_the_padding_fails(source, build):
    folder = build(source)
    model = onnx.load(folder / "model.onnx")
    scale = next(
        t for t in model.graph.initializer if not t.dims and numpy_helper.to_array(t) > 1e30
    )
    scale.CopyFrom(numpy_helper.from_array(np.array(0.0, np.float32), scale.name))
    onnx.save(model, folder / "model.onnx")
    with pytest.raises(parity.ParityFailed):
        check(folder, source)


def test_padded_places_do_not_count(source, build):
    session = parity.Session(build(source))
    tokens = source.prompt()
    plain = session.step(tokens)
    session.start(padding=8)
    np.testing.assert_allclose(session.step(tokens), plain, atol=1e-4)


def test_an_engine_that_differs_is_at_fault_itself(source, build, monkeypatch):
    reference = source.reference
    monkeypatch.setattr(parity.inference, "is_installed", lambda name: True)
    wrong = {"largest_difference": 5.0, "relative_difference": 0.5, "equal_generated_tokens": 0.0}
    monkeypatch.setattr(parity, "_in_engine", lambda *_: wrong)
    folder = build(source)
    with pytest.raises(EngineFailed, match="in deepsparse, though ONNX Runtime agrees"):
        parity.check(folder, reference, tolerance=1e-3, engine="deepsparse")
    reported = parity.check(folder, reference, tolerance=None, engine="deepsparse")
    assert reported["equal_generated_tokens"] == 0.0


def test_a_graph_that_does_not_run(source, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineFailed, match="cannot run the exported graph"):
        check(tmp_path, source)


def test_generated_tokens_are_compared_up_to_the_first_other_one():
    logits = np.zeros((6, 4), np.float32)
    logits[2:, 0] = 2.0  # rows 2 to 5 belong to the four greedy tokens
    reference = Reference(prompt=[1, 2, 3], greedy=[0, 0, 0, 0], logits=logits)
    engine = logits[2:].copy()
    engine[1, 1] = 2.5  # the second token differs, and what follows is about another text
    engine[2:] = 100.0
    figure = parity.compare_greedy([0, 1, 3, 3], engine, reference)
    assert figure["compared_steps"] == 2
    assert figure["largest_difference"] == 2.5
    assert figure["relative_difference"] == 1.25
    assert figure["equal_generated_tokens"] == 0.25


def test_greedy_shares_are_counted_where_the_reference_chose():
    logits = np.eye(5, dtype=np.float32)
    reference = Reference(prompt=[0, 0], greedy=[1, 2, 3, 0], logits=logits)
    assert parity.compare(logits, reference)["equal_greedy_tokens"] == 0.75
