"""Scripts of benchmarks/ that reach into owl's own steps run, on a tiny model; pages name them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import scaling

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("foretold.py", "TEXT --samples 2"),
        (
            "reconstruction.py",
            "TEXT TEXT --blocks 1 --samples 8 --length 48 --epochs 1 --windows 2 --window 64",
        ),
    ],
)
def test_a_script_runs(llama, text_file, tmp_path, script, options):
    given = [str(text_file) if one == "TEXT" else one for one in options.split()]
    command = [sys.executable, SCRIPTS / script, llama, *given, "-o", tmp_path / "out.json"]
    env = os.environ | {"OWL_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["rows"]


def test_the_work_on_a_block_is_measured(monkeypatch):
    monkeypatch.setattr(scaling, "WINDOW", 64)
    found = scaling.measure_block(scaling.Shape(1, 128, 256, 128), 1)
    assert found["seconds"]["solve"] > 0
    assert found["seconds"]["wanda"] > 0
