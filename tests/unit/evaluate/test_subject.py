from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.subject import check_subject, keep
from owl_deploy.models.digests import state_of
from owl_deploy.models.measurements import measurement, measurement_file
from owl_deploy.utils.artefact import write_json


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    write_json(tmp_path / "owl.json", {"kind": "checkpoint"})
    return tmp_path


def loss(text: str, windows: int, window: int, digest: str) -> dict[str, Any]:
    return {
        "value": 12.345678,
        "text": text,
        "windows": windows,
        "window": window,
        "token_ids_sha256": digest,
    }


LONG = loss("held-out.txt", 141, 2048, "a")


@pytest.mark.parametrize(
    ("now", "remark"),
    [
        (
            loss("held-out.txt", 2, 2048, "b"),
            "perplexity over 2 windows of 2048 tokens replaces what was kept, 12.35 over 141 "
            "windows of 2048 tokens.",
        ),
        (
            loss("other.txt", 200, 2048, "c"),
            "perplexity over 200 windows of 2048 tokens replaces what was kept, 12.35 over 141 "
            "windows of 2048 tokens of other text.",
        ),
        (
            loss("held-out.txt", 564, 512, "a"),  # the same tokens
            "perplexity over 564 windows of 512 tokens replaces what was kept, 12.35 over 141 "
            "windows of 2048 tokens.",
        ),
        (loss("held-out.txt", 141, 2048, "d"), "replaces what was kept, 12.35 over 141"),
        (loss("./held-out.txt", 141, 2048, "a"), ""),  # the same by another name
        (loss("held-out.txt", 282, 2048, "e"), ""),  # more of it
    ],
)
def test_what_a_perplexity_replaces_is_said(
    ours: Path, capsys: pytest.CaptureFixture[str], now: dict[str, Any], remark: str
) -> None:
    keep(ours, "perplexity", LONG)
    assert capsys.readouterr().err == ""  # nothing was there
    keep(ours, "perplexity", now)
    err = " ".join(capsys.readouterr().err.split())
    assert (remark in err) if remark else (err == "")
    assert measurement(ours, "perplexity") == now


def test_an_earlier_perplexity_that_says_little_is_replaced(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep(ours, "perplexity", {"value": 5.0, "windows": "\x1b[2J", "text": "\x1b[2J"})
    keep(ours, "perplexity", LONG)
    told = " ".join(capsys.readouterr().err.split())
    assert "kept, 5 over 0 windows of 0 tokens of other text." in told
    assert "\x1b" not in told
    measurement_file(ours, "perplexity").write_text("{")  # damaged
    keep(ours, "perplexity", LONG)
    assert measurement(ours, "perplexity") == LONG


@pytest.mark.parametrize(
    ("now", "remark"),
    [
        ({"documents": 2}, "humaneval on 2 documents replaces what was kept, on 164 documents."),
        (
            {"documents": 41, "every": 4},
            "humaneval on 41 documents, one of 4 replaces what was kept, on 164 documents.",
        ),
        (
            {"documents": 164, "every": 2},
            "humaneval on 164 documents, one of 2 replaces what was kept, on 164 documents.",
        ),
        ({"documents": 164}, ""),
        ({"documents": 165}, ""),
    ],
)
def test_what_a_task_replaces_is_said(
    ours: Path, capsys: pytest.CaptureFixture[str], now: dict[str, Any], remark: str
) -> None:
    keep(ours, "tasks", {"humaneval": {"documents": 164, "every": 1}, "rte": {"documents": 9}})
    keep(ours, "tasks", {"humaneval": now, "boolq": {"documents": 1}}, add=True)
    err = " ".join(capsys.readouterr().err.split())
    assert (remark in err) if remark else (err == "")
    assert (measurement(ours, "tasks") or {}).keys() == {"humaneval", "rte", "boolq"}


def test_nothing_is_said_of_what_stays(
    ours: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only")

    keep(ours, "perplexity", LONG)
    monkeypatch.setattr("owl_deploy.evaluate.subject.keep_measurement", refuse)
    keep(ours, "perplexity", loss("held-out.txt", 2, 2048, "b"))
    err = " ".join(capsys.readouterr().err.split())
    assert "does not keep the result" in err
    assert "replaces" not in err


def test_what_replaced_the_measured_one_does_not_keep_its_result(
    ours: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state_of(ours)
    keep(ours, "perplexity", LONG, measured=before)
    assert measurement(ours, "perplexity") == LONG
    write_json(ours / "owl.json", {"kind": "checkpoint", "other": True})
    keep(ours, "perplexity", LONG | {"value": 99.0}, measured=before)
    assert measurement(ours, "perplexity") == LONG
    assert "was replaced meanwhile" in " ".join(capsys.readouterr().err.split())


def test_what_could_not_be_evaluated_is_refused(llama: Path, tmp_path: Path) -> None:
    """For this the second model does not wait for the first, which may take hours."""
    asked = EvaluationSettings(text="text.txt", window=512)
    check_subject(llama, asked)
    with pytest.raises(BadInput, match=r"takes 512 tokens, not 513\. Give a smaller --window"):
        check_subject(llama, replace(asked, window=513))
    check_subject(llama, EvaluationSettings(tasks="lambada", window=513))  # which tasks are cut to
    with pytest.raises(BadInput, match=r"has no adapter_config\.json"):
        check_subject(llama, replace(asked, adapter=tmp_path))
