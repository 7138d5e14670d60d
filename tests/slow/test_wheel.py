"""The wheel and the sdist as a user gets them, in an environment without the source tree."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.runtime import build
from tests import tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

LIBRARY = "owl_deploy/runtime/libowl_runtime.so"
DOTTED = {".clang-format", ".clang-tidy", ".gitignore", ".pre-commit-config.yaml"}
# What `owl engines` imports: enough where only the library is missing.
LIGHT = ("typer", "rich", "pydantic", "pyyaml", "platformdirs", "psutil", "numpy", "packaging")


def run(*command: str | Path, **options) -> str:
    """Its output; a failure is shown whole."""
    done = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        **options,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def build_from(source: Path, out: Path, *options: str, path: str | None = None) -> tuple[Path, str]:
    """The one file that `python -m build` leaves in `out`, and what it said."""
    environment = {**os.environ, "PATH": path or os.environ["PATH"], "NO_COLOR": "1"}
    for name in ("CXX", "CC"):
        environment.pop(name, None)
    said = run(
        *(sys.executable, "-m", "build", "--no-isolation", *options, "-o", out, source),
        env=environment,
    )
    (file,) = out.iterdir()
    return file, said


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_from(Path.cwd(), tmp_path_factory.mktemp("sdist"), "--sdist")[0]


@pytest.fixture(scope="module")
def unpacked(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as pip does where there is no wheel."""
    try:
        build.build(tmp_path_factory.mktemp("library") / "libowl_runtime.so")
    except EnvironmentFailed as error:
        pytest.skip(str(error))
    return build_from(unpacked, tmp_path_factory.mktemp("wheel"), "--wheel")[0]


@pytest.fixture(scope="module")
def wheel_without_compiler(
    unpacked: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    tools = tmp_path_factory.mktemp("bin")
    for name in ("cmake", "ninja"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    (unpacked / LIBRARY).touch()  # an older build's, which must not get in
    made = build_from(unpacked, tmp_path_factory.mktemp("plain"), "--wheel", path=str(tools))
    (unpacked / LIBRARY).unlink()
    return made


def installed(wheel: Path, folder: Path, *instead: str) -> Path:
    """The `owl` command of a fresh environment with that wheel, and with what it depends on.

    `instead`: packages to install in place of those.
    """
    run(sys.executable, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    run(*pip, "-c", Path("requirements/dev.lock").resolve(), *(instead or [wheel]), cwd=folder)
    run(*pip, "--no-deps", wheel, cwd=folder)
    return folder / "bin" / "owl"


def elsewhere(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Where nothing leads back to the checkout."""
    monkeypatch.chdir(folder)
    for name in ("PYTHONPATH", "OWL_RUNTIME_LIBRARY"):
        monkeypatch.delenv(name, raising=False)


def test_the_sdist_has_the_sources_and_no_results(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"CMakeLists.txt", "pyproject.toml", "LICENSE"} < names
    for folder in ("owl_deploy/runtime/csrc", "recipes"):
        assert {str(path) for path in Path(folder).iterdir()} < names
    assert not any(name.endswith(".so") or "results/" in name for name in names)
    # What works in a checkout alone.
    assert not names & {"Makefile", "mkdocs.yml"}
    assert not any(name.startswith(("tests/", "docs/", ".")) for name in names - DOTTED)


def test_the_wheel_carries_the_library(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert LIBRARY in names
    assert "owl_deploy/recipes/owl-wanda-70.yaml" in names
    assert {f"owl_deploy/bench/report.{kind}" for kind in ("html.j2", "css")} < names
    assert not any("csrc" in name for name in names)

    owl = installed(wheel, tmp_path / "environment")
    elsewhere(monkeypatch, tmp_path)
    path = Path(run(owl, "engines", "path", "owl").strip())
    assert path.is_relative_to(tmp_path / "environment")
    ask = f"import ctypes; l = ctypes.CDLL({str(path)!r}); print(l.owl_isa_supported(b'portable'))"
    assert run(sys.executable, "-c", ask).strip() == "1"
    assert "missing" not in run(owl, "engines", "ls")
    assert "owl-wanda-70" in run(owl, "recipes", "ls")


@pytest.fixture(scope="module")
def deployments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint `model` and its deployments `sparse` and `dense`."""
    folder = tmp_path_factory.mktemp("made")
    model = tiny.write_llama(folder / "model", eos_token_id=319)  # no early end
    export(model, folder / "sparse", target="owl", precision="int8")
    export(model, folder / "dense", target="onnxruntime", precision="int8")
    (folder / "text.txt").write_text(tiny.text())
    return folder


def test_a_gate_needs_no_torch_and_what_does_says_so(
    wheel: Path, deployments: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owl = installed(wheel, tmp_path / "environment")
    elsewhere(monkeypatch, deployments)
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    listed = run(owl.with_name("python"), "-m", "pip", "list")
    assert "onnxruntime-genai" in listed
    assert not any(name in listed for name in ("torch", "transformers", "datasets", "peft"))

    bench = (owl, "bench", "sparse", "--baseline", "dense", "--context", "64", "--prompt", "32")
    run(*bench, "--save-baseline", "baseline.json", "--output", "result")
    gate = subprocess.run([*bench, "--check", "baseline.json"], capture_output=True, text=True)
    assert gate.returncode in (0, 3), gate.stderr  # a busy machine leaves it undecided
    assert "Overall: " in gate.stdout
    run(owl, "report", "result")
    assert "would load what was exported" in run(owl, "verify", "sparse")
    assert run(owl, "generate", "sparse", "The river", "-n", "5").strip()

    for verb in (
        ("prune", "model", "-o", "pruned", "-c", "text.txt"),
        ("export", "model", "-o", "exported"),
        ("finetune", "model", "-o", "tuned", "--text", "text.txt"),
        ("eval", "model", "--perplexity", "text.txt"),
        ("eval", "model", "--tasks", "boolq"),
        (
            *("sweep", "model", "-o", "swept", "-c", "text.txt", "-p", "text.txt"),
            *("--sequence-length", "64", "--window", "64"),
        ),
        ("bench", "sparse", "--dense", "model"),
    ):
        done = subprocess.run([owl, *verb], capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        assert "Traceback" not in done.stderr
        assert "pip install 'owl-deploy[model]'" in done.stderr.splitlines()[-1]


def test_without_a_compiler_the_rest_works_and_says_so(
    wheel_without_compiler: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel, said = wheel_without_compiler
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "WITHOUT its sparse engine" in said
    with zipfile.ZipFile(wheel) as archive:
        assert LIBRARY not in archive.namelist()

    owl = installed(wheel, tmp_path / "environment", *LIGHT)
    elsewhere(monkeypatch, tmp_path)
    assert "owl-wanda-70" in run(owl, "recipes", "ls")
    assert "`owl engines path owl` says what is missing" in run(owl, "engines", "ls")
    done = subprocess.run([owl, "engines", "path", "owl"], capture_output=True, text=True)
    assert done.returncode == 4
    assert "apt install g++ cmake libonnxruntime-dev" in done.stderr
    assert "install owl-deploy again" in done.stderr
