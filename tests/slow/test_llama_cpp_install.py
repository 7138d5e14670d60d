"""The engine llama.cpp, compiled from its pinned source into an environment of this test's own."""

import subprocess
import sys
from pathlib import Path

import pytest

from owl_deploy import inference
from owl_deploy.export.targets import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_it_is_built_and_what_it_exports_is_checked(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    said: list[str] = []
    folder = inference.install("llama.cpp", said.append)
    assert sum(line.startswith("compiling: ") for line in said) > 100
    assert folder.is_relative_to(tmp_path)
    about = export(llama, tmp_path / "out", target="llama.cpp", precision="Q4_K_M").to_json()
    assert about["parity"]["runs"]["llama.cpp reading"]["relative_difference"] < 1
    bench = [sys.executable, "-m", "owl_deploy", "bench", tmp_path / "out", "--pairs", "1"]
    small = ["--context", "64", "--prompt", "16", "--new-tokens", "8", "--clients", "2"]
    small += ["--scenario", "decode", "--scenario", "requests"]
    subprocess.run([*bench, *small], check=True)
