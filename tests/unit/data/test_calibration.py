import json
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.data.calibration import Calibration, as_calibration
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import open_checkpoint


def test_a_text_may_be_a_path_and_is_kept_as_its_name() -> None:
    text = Calibration(Path("text.txt"), 8, 64)
    assert text == Calibration("text.txt", samples=8, sequence_length=64)
    assert json.loads(json.dumps(vars(text)))["source"] == "text.txt"
    assert Calibration("text.txt") == Calibration("text.txt", 128, 2048, seed=0)


@pytest.mark.parametrize("source", [None, ["text.txt"]])
def test_a_text_that_names_nothing_is_refused(source: Any) -> None:
    with pytest.raises(BadInput, match=r"which names none\. Give a file"):
        Calibration(source)


@pytest.mark.parametrize("kind", [str, Path])
def test_the_text_may_come_alone(kind: type) -> None:
    assert as_calibration(kind("text.txt")) == Calibration("text.txt")
    assert as_calibration(None) is None


def test_windows_are_drawn_and_told_apart(llama: Path, text_file: Path) -> None:
    checkpoint = open_checkpoint(llama)
    text = Calibration(text_file, samples=3, sequence_length=16)
    windows = text.windows(checkpoint, held_out=2)
    assert windows.shape == (5, 16)
    assert (windows[:3] == text.windows(checkpoint)).all()
    other = Calibration(text_file, 3, 16, seed=1).windows(checkpoint)
    told = text.describe(windows)
    assert (told["source"], told["samples"], told["seed"]) == (str(text_file), 3, 0)
    assert told["token_ids_sha256"] != text.describe(other)["token_ids_sha256"]
    with pytest.raises(BadInput, match="not 9999"):
        Calibration(text_file, 9999, 16).windows(checkpoint)
    with pytest.raises(BadInput, match="--sequence-length"):
        Calibration(text_file, 1, 100_000).windows(checkpoint)
