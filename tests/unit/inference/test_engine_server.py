import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed
from owl_deploy.inference import ENGINES, ServerProcess, environment
from owl_deploy.inference.environment import server_of
from owl_deploy.inference.registry import Server
from tests import by_hand

ROW = Server(
    options=(by_hand.__file__, "{deployment}", "{port}", "{rows}", "{context}", "{cache}"),
    trusting=("--trusted",),
    unset=("BY_HAND",),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A deployment of the fake engine, which has a server made by hand."""
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["fake"], server=ROW))
    (tmp_path / "server.json").write_text("{}")
    return tmp_path


def test_a_server_is_started_as_its_row_says_and_nothing_of_it_is_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BY_HAND_KEY", "secret")
    options = {"rows": 3, "context": 70, "threads": 2, "trust_library": True}
    with ServerProcess("fake", folder, **options) as server:
        with urllib.request.urlopen(server.url.removesuffix("/v1") + "/health") as answer:
            assert answer.status == 200
        started, _ = by_hand.asked(folder)
        assert started["arguments"] == ["3", "70", "210", "--trusted"]
        assert started["environment"] == []
        assert 1_000_000 < server.peak_bytes < 1_000_000_000
        assert server.loaded["seconds"] > 0
        assert (server.loaded["threads"], server.model) == (2, folder.name)
        assert psutil.pid_exists(started["pid"])
    assert not psutil.pid_exists(started["pid"])


@pytest.mark.parametrize(
    ("fails", "timeout_s", "message"),
    [
        ("end", 60, r"ended with code 1 in 'serve'.*no such model"),
        ("hang", 1, "not ready .* within 1 s"),
    ],
)
def test_a_server_that_does_not_come_is_said_in_a_sentence(
    folder: Path,
    fails: str,
    timeout_s: float,
    message: str,
    children: Callable[[], list[psutil.Process]],
) -> None:
    (folder / "server.json").write_text(json.dumps({"fails": fails}))
    with (
        pytest.raises(EngineFailed, match=message),
        ServerProcess("fake", folder, rows=1, context=8, timeout_s=timeout_s),
    ):
        pass
    assert children() == []


def test_a_server_ends_with_whoever_started_it(folder: Path) -> None:
    code = (
        "import sys, time; from dataclasses import replace; from pathlib import Path\n"
        "from owl_deploy.inference import ENGINES, ServerProcess\n"
        "from tests.unit.inference.test_engine_server import ROW\n"
        "ENGINES['fake'] = replace(ENGINES['fake'], server=ROW)\n"
        "with ServerProcess('fake', Path(sys.argv[1]), rows=1, context=8):\n"
        "    print('ready', flush=True); time.sleep(3600)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, folder], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        pid = by_hand.asked(folder)[0]["pid"]
        os.kill(parent.pid, signal.SIGKILL)
    ends = time.monotonic() + 60
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_an_engine_without_a_server_or_not_installed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInput, match=r"'deepsparse' has no server\. .*onnxruntime, owl, llama"):
        server_of("deepsparse")
    monkeypatch.setattr(environment, "is_installed", lambda name: False)
    with pytest.raises(EnvironmentFailed, match="'fake' is not installed"):
        ServerProcess("fake", folder, rows=1, context=8).__enter__()


def test_a_program_of_an_environments_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "lib" / "python3.12" / "site-packages"
    packages.mkdir(parents=True)
    monkeypatch.setattr(environment, "python_of", lambda name: tmp_path / "bin" / "python")
    assert server_of("llama.cpp") == [str(packages / "bin" / "llama-server")]


def test_nothing_is_imported_from_the_folder_that_a_benchmark_is_run_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which may be a stranger's deployment."""
    (tmp_path / "typer.py").write_text("raise SystemExit('a stranger ran')")
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(EngineFailed) as failed,
        ServerProcess("onnxruntime", Path(), rows=1, context=8),
    ):
        pass
    assert "a stranger ran" not in str(failed.value)
