import json
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.inference import environment, registry
from owl_deploy.inference.show import show

THIS = f"{sys.version_info[0]}.{sys.version_info[1]}"


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> registry.Engine:
    """An engine that needs an environment with nothing in it but pip itself."""
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    lock = tmp_path / "lock.txt"
    lock.write_text("")
    row = replace(
        registry.ENGINES["deepsparse"], name="own", package="pip", lock=lock, pythons=(THIS,)
    )
    monkeypatch.setitem(registry.ENGINES, "own", row)
    return row


@pytest.mark.parametrize("verb", ["install", "path", "remove"])
@pytest.mark.parametrize("name", ["nope", "fake"])
def test_no_list_for_people_names_the_engine_of_tests(owl: Any, verb: str, name: str) -> None:
    code, _, err = owl("engines", verb, name)
    known = "Known: deepsparse, onnxruntime, owl, llama.cpp."
    assert (code, err) == (2, f"owl: Unknown engine {name!r}. {known}\n")


def test_install_is_whole_or_not_there(engine: registry.Engine) -> None:
    with pytest.raises(EnvironmentFailed, match="owl engines install own"):
        environment.python_of("own")
    folder = environment.install("own")
    python = environment.python_of("own")
    assert python.is_relative_to(folder)
    said: list[str] = []
    assert environment.install("own", said.append) == folder
    assert "installed already" in said[0]
    (folder / environment.MARKER).unlink()  # as after a kill: the marker is written last
    assert not environment.is_installed("own")


def test_another_lock_file_means_not_installed(engine: registry.Engine) -> None:
    folder = environment.environment_folder(engine)
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").touch()
    marker = {"lock": "0" * 64, "version": "1"}
    (folder / environment.MARKER).write_text(json.dumps(marker))
    assert environment.installed_version("own") is None
    for broken in ("half a mark", "[]", "{}"):
        (folder / environment.MARKER).write_text(broken)
        assert environment.installed_version("own") is None


def test_a_failing_pip_gives_its_last_words(engine: registry.Engine) -> None:
    assert engine.lock is not None
    engine.lock.write_text("./there-is-no-such-package\n")
    with pytest.raises(EnvironmentFailed, match=r"in pip: .*there-is-no-such-package") as caught:
        environment.install("own")
    assert caught.value.exit_code == 4
    assert not environment.is_installed("own")


def test_no_fitting_python_says_how_to_get_one(
    engine: registry.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    wanting = replace(engine, pythons=("3.4", "3.3"))
    with pytest.raises(EnvironmentFailed, match=r"needs Python 3\.3 to 3\.4.*uv python install"):
        environment.find_python(wanting)


def test_a_compilers_error_is_told_and_not_what_called_it(engine: registry.Engine) -> None:
    words = "a.c:1:2: error: no such thing\nninja: build stopped\nbuilding failed\nERROR: wheel\n"
    command = [sys.executable, "-c", f"print({words!r}); raise SystemExit(1)"]
    with pytest.raises(EnvironmentFailed, match=r"in pip: a\.c:1:2: error: no such thing Fix"):
        environment._run(command, "pip", lambda _: None)


# A source distribution that builds without any network or compiler: its backend is within.
BACKEND = """
import os, pathlib, zipfile

def prepare_metadata_for_build_wheel(folder, settings=None):
    info = pathlib.Path(folder, "own_engine-1.5.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: own-engine\\nVersion: 1.5\\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
    return info.name

def build_wheel(folder, settings=None, metadata=None):
    print("[1/2] cc -O3 a.c")
    name = "own_engine-1.5-py3-none-any.whl"
    made = pathlib.Path(folder, "made")
    info = made / prepare_metadata_for_build_wheel(made.mkdir() or made)
    (info / "RECORD").touch()
    (made / "own.py").write_text("options = " + repr(os.environ["CMAKE_ARGS"]))
    with zipfile.ZipFile(pathlib.Path(folder, name), "w") as wheel:
        for file in (made / "own.py", *info.iterdir()):
            wheel.write(file, file.relative_to(made))
    return name
"""


@pytest.fixture
def compiled(engine: registry.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The engine is one that is built from source now; returns the lock of that."""
    top = tmp_path / "own_engine-1.5"
    (top / "vendor" / "tools").mkdir(parents=True)
    (top / "vendor" / "tools" / "convert.py").touch()
    (top / "vendor" / "other.py").touch()
    (top / "backend.py").write_text(BACKEND)
    (top / "pyproject.toml").write_text(
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
        "[project]\nname = 'own-engine'\nversion = '1.5'\n"
    )
    with tarfile.open(tmp_path / "own_engine-1.5.tar.gz", "w:gz") as archive:
        archive.add(top, top.name)
    lock = tmp_path / "source.txt"
    lock.write_text(f"{tmp_path}/own_engine-1.5.tar.gz\n")
    (tmp_path / "other.txt").write_text("in its place")
    build = registry.Build(
        lock,
        module="own",
        options=("-DA=B",),
        replaced=(("vendor/other.py", tmp_path / "other.txt"),),
        kept=("vendor/tools", "vendor/other.py"),
    )
    row = replace(engine, package="own-engine", build=build)
    monkeypatch.setitem(registry.ENGINES, "own", row)
    return lock


def test_what_is_compiled_is_installed_and_its_tools_kept(compiled: Path) -> None:
    said: list[str] = []
    folder = environment.install("own", said.append)
    assert "compiling: 1 of 2" in said
    assert environment.installed_version("own") == "1.5"
    ask = [environment.python_of("own"), "-c", "import own; print(own.options)"]
    assert subprocess.check_output(ask, text=True).split() == ["-DA=B"]
    kept = {path.name: path for path in (folder / "source").rglob("*") if path.is_file()}
    assert kept.keys() == {"convert.py", "other.py"}
    assert kept["other.py"].read_text() == "in its place"


def mark(row: registry.Engine) -> None:
    """Say in its environment that it was made for `row`, whole."""
    marker = {"lock": environment._pinned(row), "version": "1.5"}
    (environment.environment_folder(row) / environment.MARKER).write_text(json.dumps(marker))


def stand_in(row: registry.Engine) -> Path:
    """An environment for `row` with what is looked at, made with this Python."""
    folder = environment.environment_folder(row)
    for name in ("bin", f"lib/python{THIS}"):
        (folder / name).mkdir(parents=True)
    (folder / "bin" / "python").touch()
    mark(row)
    assert environment.is_installed("own")
    return folder


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("changed", ["source.txt", "other.txt", "options"])
def test_what_is_to_be_compiled_otherwise_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    row = registry.ENGINES["own"]
    assert row.build is not None
    stand_in(row)
    if changed == "options":
        build = replace(row.build, options=("-DA=C",))
        monkeypatch.setitem(registry.ENGINES, "own", replace(row, build=build))
    else:
        file = tmp_path / changed
        file.write_text(file.read_text() + "# another\n")
    assert not environment.is_installed("own")


@pytest.mark.usefixtures("compiled")
def test_packages_of_another_python_are_none_for_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    row = registry.ENGINES["own"]
    folder = stand_in(row)
    (folder / "lib" / f"python{THIS}").rename(folder / "lib" / "python3.4")
    assert not environment.is_installed("own")
    assert row.build is not None
    alone = replace(row, build=replace(row.build, kept=()))  # nothing of it runs in this Python
    monkeypatch.setitem(registry.ENGINES, "own", alone)
    mark(alone)
    assert environment.is_installed("own")
    with pytest.raises(EnvironmentFailed, match="needs Python"):
        environment.find_python(replace(row, pythons=("3.4",)))


def test_without_a_compiler_nothing_begins(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFailed, match="no C compiler") as caught:
        environment.install("own")
    assert "apt install g++" in str(caught.value.hint)
    monkeypatch.setenv("CC", f"{sys.executable} -x")
    with pytest.raises(EnvironmentFailed, match=r"no C\+\+ compiler"):
        environment.install("own")
    assert not environment.environment_folder(registry.ENGINES["own"]).exists()


STARTS = """
import os, signal, subprocess
from owl_deploy.inference.environment import ending_with_us
print(subprocess.Popen(ending_with_us(["/bin/sleep", "600"])).pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_what_is_started_ends_with_who_started_it() -> None:
    done = subprocess.run([sys.executable, "-c", STARTS], stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    status = Path("/proc") / done.stdout.decode().strip() / "stat"
    for _ in range(600):
        # Nobody may be there to hear of its end: a zombie then.
        if not status.exists() or " Z " in status.read_text():
            return
        time.sleep(0.1)
    pytest.fail("it is still at work")


def test_remove(engine: registry.Engine) -> None:
    assert not environment.remove("own")
    folder = environment.environment_folder(engine)
    (folder / "bin").mkdir(parents=True)
    assert environment.remove("own")
    assert not folder.exists()


@pytest.mark.parametrize("action", [environment.install, environment.remove])
def test_an_engine_of_this_python_has_no_environment(action: object) -> None:
    assert callable(action)
    with pytest.raises(BadInput):
        action("onnxruntime")


def test_an_unknown_engine_gets_the_nearest_name() -> None:
    with pytest.raises(BadInput, match="Did you mean 'deepsparse'"):
        registry.get_engine("deepsparce")


@pytest.mark.parametrize(
    ("name", "pin"), [("deepsparse", "deepsparse==1.8.0"), ("llama.cpp", "llama-cpp-python==")]
)
def test_the_lock_pins_everything(name: str, pin: str) -> None:
    row = registry.ENGINES[name]
    lock = row.build.lock if row.build else row.lock
    assert lock is not None
    pins = [line for line in lock.read_text().splitlines() if line and line[0] not in "# "]
    assert all("==" in pin and "+cpu" not in pin for pin in pins)
    assert pin in " ".join(pins)
    assert lock.read_text().count("--hash=sha256:") >= len(pins)


def test_every_driver_and_lock_is_there() -> None:
    for engine in registry.ENGINES.values():
        assert engine.driver.is_file()
        assert engine.licence
        assert engine.lock is None or engine.lock.is_file()
        assert engine.build is None or engine.build.lock.is_file()
        assert engine.variable.replace("-", "").isalnum()


def test_what_runs_in_the_old_python_parses_there() -> None:
    here = Path(registry.__file__).parent
    for file in (here / "worker.py", here / "drivers" / "deepsparse.py"):
        compile(file.read_text(), str(file), "exec", dont_inherit=True)
        text = file.read_text()
        assert "from owl_deploy" not in text
        subprocess.run(
            [sys.executable, "-c", f"import ast; ast.parse({text!r}, feature_version=(3, 8))"],
            check=True,
        )


@pytest.mark.parametrize("columns", [50, 80, 160])
def test_the_list_fits_a_terminal_and_says_the_licence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    show(environment.list_engines())
    printed = capsys.readouterr().out
    assert columns - 25 <= max(map(len, printed.splitlines())) <= columns
    words = " ".join(printed.split())
    assert "never" in words
    assert "production" in words


def test_the_list_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    environment.list_engines()
    assert list(tmp_path.iterdir()) == []


def test_installing_where_nothing_can_be_written(
    engine: registry.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "lock.txt" / "cache"))
    with pytest.raises(EnvironmentFailed, match="Set OWL_CACHE"):
        environment.install("own")


def test_a_missing_library_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", "/nowhere/libowl_runtime.so")
    show(environment.list_engines())
    assert "`owl engines path owl` says what is missing" in capsys.readouterr().out
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", __file__)
    show(environment.list_engines())
    said = capsys.readouterr().out
    assert "missing" not in said
    assert "kernels" not in said


def test_the_kernels_that_run_here_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    known = environment.list_engines()
    kernels = next(one["kernels"] for one in known if one["name"] == "owl")
    if kernels is None:
        pytest.skip("the library was not built")
    show(known)
    assert f"processor: {kernels}." in capsys.readouterr().out


def test_other_kernels_are_another_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = tmp_path / "library.so"
    library.write_text("1")
    found = []
    for kernels, content in (("avx2", "1"), ("avx512", "1"), ("avx512", "2")):
        monkeypatch.setattr(environment, "kernels", lambda kernels=kernels: kernels)
        library.write_text(content)
        found.append(environment.software("owl", library))
    assert len({str(one) for one in found}) == 3
    plain = environment.software("onnxruntime")
    assert plain == {
        "version": metadata.version("onnxruntime-genai"),
        "onnxruntime": metadata.version("onnxruntime"),
    }
