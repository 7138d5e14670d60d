import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from owl_deploy import cli
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export import genai
from owl_deploy.inference import EngineProcess
from owl_deploy.runtime import library_path
from owl_deploy.runtime.native import Library
from owl_deploy.utils.cache import cache_path
from tests import fresh, tiny

# On models this small threads only wait for each other, and more so on a busy machine.
torch.set_num_threads(1)

# A shell's background job ignores Ctrl-C, and so would whatever a test starts and interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def exact_products() -> Iterator[None]:
    """Kernels of which a row says the same alone and among many; what tests others names them."""
    with pytest.MonkeyPatch.context() as patch:
        with contextlib.suppress(EnvironmentFailed):
            if "amx" in Library(library_path()).isas():
                patch.setenv("OWL_ISA", os.environ.get("OWL_ISA", "avx512"))
        yield


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder for this run: nothing that earlier code measured answers, nothing stays.

    Links lead from it to the environments, and to the demo's input where that is there.
    """
    folder = tmp_path_factory.mktemp("cache")
    real = cache_path().absolute()
    for name in ("engines", "test-environments"):
        with contextlib.suppress(OSError):  # a home that is read only
            (real / name).mkdir(parents=True, exist_ok=True)
    for there in (real / "engines", real / "test-environments", *real.glob("demo-input-*")):
        if there.is_dir():
            (folder / there.name).symlink_to(there)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWL_CACHE", str(folder))
        yield


@pytest.fixture(scope="session", autouse=True)
def warm_builder() -> Iterator[None]:
    """An export in this process has a builder that imported everything before."""
    of_genai = SimpleNamespace(
        Popen=fresh.Builder, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genai, "subprocess", of_genai)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; tests read it and never write into it."""
    return tiny.write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def sparse(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That checkpoint, 60 % of it pruned by magnitude; tests read it and never write into it."""
    from owl_deploy.compression.run import prune

    folder = tmp_path_factory.mktemp("sparse") / "sparse"
    settings = PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.6)
    prune(llama, folder, settings, None)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text long enough for a few windows of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text())
    return path


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that no other test has measured anything into."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("OWL_CACHE", str(folder))
    return folder


@pytest.fixture
def children():
    """Give the processes that this test has started and not ended; those before it left others."""
    fresh.ensure_running()  # it stays
    before = psutil.Process().children(recursive=True)
    return lambda: [one for one in psutil.Process().children(recursive=True) if one not in before]


@pytest.fixture
def loads(monkeypatch):
    """What every engine is asked to load from now on, and with what."""
    asked = []
    request = EngineProcess.request

    def note(self, op, **arguments):
        if op == "load":
            asked.append(arguments)
        return request(self, op, **arguments)

    monkeypatch.setattr(EngineProcess, "request", note)
    return asked


@pytest.fixture
def owl(capsys, monkeypatch):
    """Run a command line in this process; return its exit code, stdout and stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["owl", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return ended.value.code or 0, out, err

    return run
