import contextlib
import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.bench import machine
from owl_deploy.errors import EngineFailed
from owl_deploy.inference import EngineProcess, worker


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


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines answer in the test's own process: for tests of what is made of the answers.

    The real worker with the real driver of the fake engine; only what a process is for is missing,
    and its noise is the same each time.
    """
    random.seed(0)

    def start(self: EngineProcess) -> None:
        vars(self)["worker"] = worker.Worker(worker.load_driver(str(self.engine.driver)))

    def request(self: EngineProcess, op: str, **arguments: Any) -> dict[str, Any]:
        if op == "memory":
            return {"peak_bytes": 100_000_000}
        line = json.dumps({"op": op, **arguments})
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            answer = worker.answer(vars(self)["worker"], line)
        if not answer.pop("ok"):
            raise EngineFailed(f"The engine {self.engine.name!r} failed: {answer['error']}.")
        return answer

    monkeypatch.setattr(EngineProcess, "_start", start)
    monkeypatch.setattr(EngineProcess, "request", request)
