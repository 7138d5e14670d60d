import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.bench import machine


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own: benchmarks keep their samples in it."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("OWL_CACHE", str(folder))
    return folder


@pytest.fixture(autouse=True)
def quick_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at the machine takes seconds, which most tests need not spend."""
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 30.0)


@pytest.fixture
def fake(tmp_path: Path) -> Callable[..., Path]:
    """Makes a deployment for the fake engine, of a name and a behaviour."""

    def make(name: str, **behaviour: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True, exist_ok=True)
        whole = {"decode_ms": 10, "prefill_ms": 50, "noise": 0.01, **behaviour}
        (folder / "fake.json").write_text(json.dumps(whole))
        return folder

    return make
