import json
from pathlib import Path

import pytest

from owl_deploy.bench import show
from owl_deploy.bench.gate import Verdict
from owl_deploy.bench.result import (
    SCHEMA,
    Sample,
    Subject,
    choose_baselines,
    comparisons,
    read_result,
)
from owl_deploy.bench.run import Outcome
from owl_deploy.bench.scenario import Scenario
from owl_deploy.errors import BadInput
from tests.unit.bench import made


def subject(name: str, engine: str, precision: str, ms: float, role: str = "baseline") -> Subject:
    return Subject.model_validate(
        {
            "name": name,
            "path": name,
            "role": role,
            "target": engine,
            "engine": engine,
            "precision": precision,
            "zeros": 0.0,
            "perplexity": None,
            "size_bytes": 1,
            "samples": (
                Sample(round=0, load_s=1, peak_bytes=1, latencies_ms={"decode@512": (ms,)}),
            ),
        }
    )


DENSE = [
    subject("ds", "deepsparse", "fp32", 21),
    subject("ort", "onnxruntime", "fp32", 41),
    subject("ort8", "onnxruntime", "int8", 18),
    subject("ort4", "onnxruntime", "int4", 14),
]


def chosen(candidate: Subject, baselines: list[Subject]) -> dict[str, tuple[str, ...]]:
    return {s.name: kinds for s, kinds in choose_baselines(candidate, baselines, "decode@512")}


def test_each_kind_of_baseline_is_named_once() -> None:
    assert chosen(subject("s", "deepsparse", "fp32", 15), DENSE) == {
        "ds": ("same engine", "best of the precision"),
        "ort4": ("best of all",),
    }


def test_bf16_promises_what_fp32_does() -> None:
    assert chosen(subject("s", "onnxruntime", "bf16", 15), DENSE) == {
        "ort": ("same engine",),
        "ds": ("best of the precision",),
        "ort4": ("best of all",),
    }


def test_another_precision_of_the_same_engine_will_do() -> None:
    assert chosen(subject("s", "onnxruntime", "int8", 15), DENSE[1:2]) == {
        "ort": ("same engine", "best of all"),
    }


def test_what_has_a_draft_is_compared_with_itself_without() -> None:
    """Another that is faster is no measure of what the draft gains."""
    alone = [subject("a", "owl", "int8", 50), subject("b", "owl", "int8", 36)]
    drafted = subject("a with d", "owl", "int8", 30, "candidate").model_copy(
        update={"path": "a", "draft": "d"}
    )
    assert chosen(drafted, alone) == {
        "a": ("same engine",),
        "b": ("best of the precision", "best of all"),
    }


def test_an_engine_without_a_dense_baseline() -> None:
    assert chosen(subject("s", "owl", "int8", 5), DENSE) == {
        "ort8": ("best of the precision",),
        "ort4": ("best of all",),
    }
    assert chosen(subject("s", "owl", "int8", 5), []) == {}


def test_those_that_no_round_timed_both_of_are_not_compared() -> None:
    scenarios = (Scenario(kind="decode", tokens=512, context=512),)
    now, then = subject("s", "owl", "int8", 5, "candidate"), subject("d", "owl", "int8", 9)
    assert [one.pairs for one in comparisons((now, then), scenarios, 0.95)] == [1]
    later = now.model_copy(update={"samples": (now.samples[0].model_copy(update={"round": 1}),)})
    assert comparisons((later, then), scenarios, 0.95) == ()


def test_an_earlier_result_is_read() -> None:
    result = read_result("tests/earlier/result.json")
    assert result == read_result(Path("tests/earlier"))
    assert [subject.name for subject in result.subjects] == ["onnx", "dense"]
    assert result.comparisons[0].baseline == "dense"


def test_a_later_result_is_refused_with_both_numbers(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(json.dumps({"schema_version": SCHEMA + 1}))
    with pytest.raises(BadInput, match=rf"has format {SCHEMA + 1}, .* up to {SCHEMA}\. Update"):
        read_result(tmp_path)


def test_a_headline_calls_only_a_dense_one_dense() -> None:
    found = made.result()
    assert all("the best dense." in line for line in show.headline(found))
    sparse = tuple(one.model_copy(update={"zeros": 0.5}) for one in found.subjects)
    for line in show.headline(found.model_copy(update={"subjects": sparse})):
        assert "the best baseline." in line
        assert "the baseline's" in line
    unlike = tuple(one.model_copy(update={"perplexity_on": one.role}) for one in found.subjects)
    told = show.headline(found.model_copy(update={"subjects": unlike}))
    assert told
    assert not any("perplexity" in line for line in told)


def test_what_json_printed_is_a_result_too(tmp_path: Path) -> None:
    found = made.result()
    outcome = Outcome(found, (Verdict("decode@512", "OK", "as before"),))
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps(outcome.to_json()))
    assert {"decision", "verdict", "verdicts"} <= json.loads(printed.read_text()).keys()
    assert read_result(printed) == found
    printed.write_text(json.dumps(outcome.to_json() | {"note": ""}))
    with pytest.raises(BadInput, match="is not a benchmark's result"):
        read_result(printed)
