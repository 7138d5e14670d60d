import json
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.inference import loading, verify
from owl_deploy.runtime import LIBRARY_NAMES
from owl_deploy.utils.artefact import MANIFEST, sha256


def test_other_operators_are_told_by_verify_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an update every older deployment has them, and they are never loaded."""
    ours, folder = tmp_path / "ours.so", tmp_path / "deployment"
    ours.write_text("this build")
    folder.mkdir()
    name = sorted(LIBRARY_NAMES)[0]
    (folder / name).write_text("another build")
    options = {"custom_ops_library": name}
    settings = {"model": {"type": "llama", "decoder": {"session_options": options}}}
    (folder / loading.GENAI_CONFIG).write_text(json.dumps(settings))
    (folder / "model.onnx").write_bytes(b"")  # a graph of nothing
    files = {path.name: {"sha256": sha256(path)} for path in folder.iterdir()}
    (folder / MANIFEST).write_text(json.dumps({"kind": "deployment", "files": files}))
    for module in (loading, verify):
        monkeypatch.setattr(module, "library_path", lambda: ours)

    assert loading.Folder(folder).check() == ours
    assert capsys.readouterr() == ("", "")
    found = verify.verify(folder)
    assert (found.whole, found.operators) == (True, verify.REPLACED)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"search": []}, "is not a decoder's"),
        ({"search": ""}, "is not a decoder's"),
        ({"model": {"decoder": []}}, "is not a decoder's"),
        ({"search": {"q": json.loads("[" * 700 + "]" * 700)}}, "is not a decoder's"),
        (
            {"model": {"decoder": {"session_options": {"custom_ops_library": "\ud800"}}}},
            "is not a file of the folder",
        ),
    ],
)
def test_settings_that_are_none_are_said_in_a_sentence(
    tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    (tmp_path / loading.GENAI_CONFIG).write_text(json.dumps(settings))
    with pytest.raises(BadInput, match=words):
        _ = loading.Folder(tmp_path).library


@pytest.mark.parametrize("told", ["0", "-16", "1e999", "NaN", "[]", "null"])
def test_a_size_that_is_none_is_said_in_a_sentence(tmp_path: Path, told: str) -> None:
    (tmp_path / loading.GENAI_CONFIG).write_text(
        f'{{"model": {{"context_length": 8, "decoder": {{"head_size": {told}}}}}}}'
    )
    folder = loading.Folder(tmp_path)
    assert folder.number("context_length") == 8
    with pytest.raises(BadInput, match="does not say the model's head_size"):
        folder.number("head_size", "decoder")
