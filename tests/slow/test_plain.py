"""A deployment runs where `onnxruntime-genai` is and nothing of ours: in Python and in C++."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.inference.generate import generate
from owl_deploy.inference.rows import Speed
from owl_deploy.inference.sampling import Sampling
from owl_deploy.runtime import library_path
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

PROMPT = "The river ran past the mill"
EXAMPLES = Path("examples").resolve()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """site-packages of a fresh environment with onnxruntime-genai, as this one has it."""
    folder = tmp_path_factory.mktemp("plain") / "environment"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    lock = Path("requirements/dev.lock").resolve()
    subprocess.run([*pip, "-c", lock, "onnxruntime-genai"], check=True, cwd=folder)
    (found,) = folder.glob("lib/python*/site-packages")
    return found


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An int8 deployment, moved away from where it was made."""
    try:
        library_path()
    except EnvironmentFailed as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("deployment")
    model = tiny.write_llama(folder / "model", eos_token_id=319)  # no early end
    export(model, folder / "made", target="owl", precision="int8")
    shutil.rmtree(model)
    return Path(shutil.move(folder / "made", folder / "moved"))


@pytest.fixture(scope="module")
def expected(deployment: Path) -> str:
    return "".join(generate(deployment, PROMPT, Sampling(max_new_tokens=24), Speed()))


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """stdout of a command that knows nothing of this environment."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_in_python(site: Path, deployment: Path, expected: str, tmp_path: Path) -> None:
    python = site.parents[2] / "bin" / "python"
    listed = run(python, "-m", "pip", "list", cwd=tmp_path)
    assert "onnxruntime-genai" in listed
    assert not any(name in listed for name in ("owl", "torch", "transformers"))
    said = run(python, EXAMPLES / "generate.py", deployment, PROMPT, cwd=tmp_path)
    assert said.startswith(PROMPT + expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_in_cpp(site: Path, deployment: Path, expected: str, tmp_path: Path) -> None:
    genai = site / "onnxruntime_genai"
    # As the head of the example says.
    run(
        *("g++", "-std=c++17", EXAMPLES / "generate.cpp", "-o", "generate"),
        *(genai / "libonnxruntime-genai.so", f"-Wl,-rpath,{genai}"),
        cwd=tmp_path,
    )
    (runtime,) = (site / "onnxruntime" / "capi").glob("libonnxruntime.so.1.*")
    (tmp_path / "libonnxruntime.so").symlink_to(runtime)
    command = (tmp_path / "generate", deployment, PROMPT)
    said = run(*command, cwd=tmp_path, LD_LIBRARY_PATH=str(tmp_path))
    assert said.startswith(PROMPT + expected)
