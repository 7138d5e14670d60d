"""Environments for the engines that cannot live beside this package's own libraries.

Each is a virtual environment in the user's cache folder, pinned in full by a lock file. It counts
as installed when its marker, written last, names that lock file's digest: one that was interrupted,
or that an older version of this package made, is made again.
"""

import contextlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.inference.registry import Build, Engine, Server, get_engine, public_engines
from owl_deploy.models.digests import digest
from owl_deploy.runtime import kernels, library_path
from owl_deploy.utils import artefact
from owl_deploy.utils.cache import cache_dir, cache_path
from owl_deploy.utils.lock import lease

WORKER = Path(__file__).with_name("worker.py")
Progress = Callable[[str], None]
MARKER = ".complete"
_THIS = "{}.{}".format(*sys.version_info)
_ABOUT = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"


def ending_with_us(command: Sequence[str]) -> list[str]:
    """What becomes `command`, a program by its path, to be killed when this process ends."""
    program, *arguments = command
    return [sys.executable, "-I", str(WORKER), program, str(os.getpid()), *arguments]


def environment_folder(engine: Engine) -> Path:
    """Where the environment of `engine` is, or would be."""
    return cache_path() / "engines" / engine.name


def is_installed(name: str) -> bool:
    """Whether the engine called `name` can be started as it is."""
    return installed_version(name) is not None


def installed_version(name: str) -> str | None:
    """The version of an engine, or None when it is not installed (or not as the lock file says, or
    with another Python's packages, where this one needs them).
    """
    engine = get_engine(name)
    if engine.lock is None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(engine.package)
        return None
    folder = environment_folder(engine)
    with contextlib.suppress(OSError, BadInput, KeyError):
        marker = artefact.read_object(folder / MARKER, "")
        other = engine.shares_packages and not (folder / "lib" / f"python{_THIS}").is_dir()
        if marker["lock"] == _pinned(engine) and _python(folder).exists() and not other:
            return str(marker["version"])
    return None


def software(name: str, library: Path | None = None) -> dict[str, Any]:
    """What an engine computes by, besides a deployment's files: versions, and what of ours runs
    in it, which is the `library` that it was told to open, if any.
    """
    engine = get_engine(name)
    found: dict[str, Any] = {"version": installed_version(name)}
    if engine.lock is None:  # onnxruntime-genai's, beside which another onnxruntime may be put
        found["onnxruntime"] = importlib.metadata.version("onnxruntime")
    if engine.operators:
        found["kernels"] = kernels()
    if library is not None:
        found["library"] = digest(library)
    return found


def python_of(name: str) -> Path:
    """The Python that drives an engine; raises `EnvironmentFailed` when it is not installed."""
    engine = get_engine(name)
    if not is_installed(name):
        hint = f"Run: owl engines install {name}" if engine.lock else f"Install {engine.package}."
        raise EnvironmentFailed(f"The engine {name!r} is not installed.", hint)
    return Path(sys.executable) if engine.lock is None else _python(environment_folder(engine))


def require(name: str) -> None:
    """Raise `EnvironmentFailed` where an engine, or the operators that it needs, are not here."""
    if get_engine(name).operators:
        library_path()
    python_of(name)


def served_by(name: str) -> Server:
    """The server of an engine; raises `BadInput` for one that has none."""
    server = get_engine(name).server
    if server is None:
        serving = ", ".join(engine.name for engine in public_engines() if engine.server)
        raise BadInput(f"The engine {name!r} has no server.", f"Those that have one: {serving}.")
    return server


def server_of(name: str) -> list[str]:
    """What starts an engine's server, without its options.

    Raises `BadInput` for an engine that has none, `EnvironmentFailed` when it is not installed.
    """
    server = served_by(name)
    python = python_of(name)
    if server.program is None:
        return [str(python)]
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    return [str(packages / server.program)]


def install(name: str, progress: Progress = lambda _: None) -> Path:
    """Make the environment of the engine called `name`, unless it is there; returns its folder.

    Raises `EnvironmentFailed` with pip's last words, or when no fitting Python is found, and
    `BadInput` for an engine that needs no environment.
    """
    engine = get_engine(name)
    if engine.lock is None:
        raise BadInput(f"The engine {name!r} needs no environment: this Python runs it.")
    folder = environment_folder(engine)
    cache_dir("engines")
    with _only_one(folder):
        if is_installed(name):
            progress(f"{name} {installed_version(name)} is installed already")
            return folder
        python = find_python(engine)
        _check_compilers(engine)
        shutil.rmtree(folder, ignore_errors=True)
        progress(f"making {folder} with {python}")
        _run([str(python), "-m", "venv", str(folder)], "making the environment", progress)
        _fill(engine, folder, progress)
    return folder


def _pinned(engine: Engine) -> str:
    """What the engine's environment is made from: digests of files, and a compiler's options."""
    files, options = [engine.lock], list[str]()
    if build := engine.build:
        files += [build.lock, *(instead for _, instead in build.replaced)]
        options += build.options
    return "+".join([*(artefact.sha256(file) for file in files if file is not None), *options])


def _fill(engine: Engine, folder: Path, progress: Progress) -> None:
    _pip(folder, "install", "--no-deps", "-r", str(engine.lock), progress=progress)
    module = engine.package.replace("-", "_")
    if engine.build:
        _compile(engine.build, folder, progress)
        module = engine.build.module
    # Importing it now finds a processor or a system library that it cannot work with.
    ask = (
        "import importlib, importlib.metadata as m; "
        f"importlib.import_module({module!r}); "
        f"print(m.version({engine.package!r}))"
    )
    command = [str(_python(folder)), "-I", "-c", ask]
    version = _run(command, f"importing {engine.package}", lambda _: None)[-1]
    artefact.write_json(folder / MARKER, {"lock": _pinned(engine), "version": version})
    progress(f"{engine.name} {version} is ready")


def _compile(build: Build, folder: Path, progress: Progress) -> None:
    """Build and install `build` with the tools that are in the environment already."""
    source = folder / "source"
    fetch = ("download", "--no-binary=:all:", "-d", str(source), "-r", str(build.lock))
    _pip(folder, *fetch, "--no-deps", "--no-build-isolation", progress=progress)
    (archive,) = source.glob("*.tar.gz")
    with tarfile.open(archive) as held:
        held.extractall(source, filter="data")
    archive.unlink()
    tree = source / archive.name.removesuffix(".tar.gz")
    for path, instead in build.replaced:
        shutil.copyfile(instead, tree / path)
    options = " ".join((*build.options, os.environ.get("CMAKE_ARGS", "")))
    arguments = ("-v", "--no-deps", "--no-build-isolation", str(tree))
    progress("compiling, which takes minutes")
    _pip(folder, "install", *arguments, progress=_steps(progress), CMAKE_ARGS=options)
    for path in build.kept:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(tree / path, source / path)
    shutil.rmtree(tree)


def _steps(progress: Progress) -> Progress:
    """Of a compiler's many and long lines, that one of so many files is being compiled."""

    def tell(line: str) -> None:
        if found := re.match(r"\[(\d+)/(\d+)\]", line):
            progress(f"compiling: {found[1]} of {found[2]}")

    return tell


def _check_compilers(engine: Engine) -> None:
    """Raise `EnvironmentFailed` where `engine` would be compiled, and nothing could do that."""
    if engine.build is None:
        return
    choices = {"C": ("CC", "cc", "gcc", "clang"), "C++": ("CXX", "c++", "g++", "clang++")}
    for language, (variable, *usual) in choices.items():
        names = [*os.environ.get(variable, "").split()[:1], *usual]
        if not any(map(shutil.which, names)):
            raise EnvironmentFailed(
                f"The engine {engine.name!r} is compiled for this processor, and there is no "
                f"{language} compiler.",
                f"Install one (apt install g++, or dnf install gcc-c++), or name it in {variable}, "
                "and run this again.",
            )


def remove(name: str) -> bool:
    """Delete the environment of the engine called `name`; returns whether there was one."""
    engine = get_engine(name)
    if engine.lock is None:
        raise BadInput(f"The engine {name!r} has no environment of its own to remove.")
    folder = environment_folder(engine)
    if not folder.exists():
        return False
    with _only_one(folder):
        (folder / MARKER).unlink(missing_ok=True)  # first: a half-deleted one is not installed
        shutil.rmtree(folder)
    return True


def list_engines() -> list[dict[str, Any]]:
    """What is known about every engine: name, version (None: not installed), targets, licence.

    `library` is the file that the engine's exports carry, `kernels` the instruction set that it
    computes with here: None if it has none, or was not built.
    """
    return [
        {
            "name": engine.name,
            "installed": is_installed(engine.name),
            "version": installed_version(engine.name),
            "opens": list(engine.targets),
            "licence": engine.licence,
            "library": _library() if engine.operators else None,
            "kernels": kernels() if engine.operators else None,
            "environment": str(environment_folder(engine)) if engine.lock else None,
        }
        for engine in public_engines()
    ]


def _library() -> str | None:
    with contextlib.suppress(EnvironmentFailed):
        return str(library_path())
    return None


def find_python(engine: Engine) -> Path:
    """A Python that the engine's environment can be made with: this one, or one on the PATH where
    the two share no packages.

    Raises `EnvironmentFailed` that says how to get one.
    """
    others = () if engine.shares_packages else engine.pythons
    names = [f"python{version}" for version in others]
    for candidate in [sys.executable, *filter(None, map(shutil.which, names))]:
        if _version_of(candidate) in engine.pythons:
            return Path(candidate)
    wanted = f"{engine.pythons[-1]} to {engine.pythons[0]}"
    raise EnvironmentFailed(
        f"The engine {engine.name!r} needs Python {wanted} with venv, and none was found.",
        "Install one (apt install python3.11-venv, or pyenv install 3.11, or "
        "uv python install 3.11), see that python3.11 is on the PATH, and run this again.",
    )


def _version_of(python: str) -> str:
    """The "3.N" of a Python that can make environments, else an empty string."""
    try:
        answer = subprocess.run(
            [python, "-I", "-c", _ABOUT], capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _pip(folder: Path, *arguments: str, progress: Progress, **variables: str) -> None:
    verb, *rest = arguments
    options = ["--progress-bar=off", "--disable-pip-version-check", *rest]
    command = [str(_python(folder)), "-m", "pip", verb, *options]
    _run(command, "pip", progress, **variables)


def _run(command: list[str], what: str, progress: Progress, **variables: str) -> list[str]:
    """Run a command, passing its lines on; raises `EnvironmentFailed` with its last words.

    `variables` go into its environment.
    """
    environment = {**os.environ, "NM_DISABLE_ANALYTICS": "True", "PIP_REQUIRE_VIRTUALENV": "0"}
    environment |= variables
    environment.pop("PYTHONPATH", None)
    lines: list[str] = []
    with subprocess.Popen(
        ending_with_us(command),  # or one is at work in a folder that the next owl clears
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
    ) as process:
        assert process.stdout is not None
        try:
            for line in map(str.strip, process.stdout):
                if line:
                    lines.append(line)
                    progress(line)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        # A compiler's error stands far above the last words of what called it.
        telling = [line for line in lines if " error: " in line] or lines
        words = " / ".join(telling[-3:]) or f"exit code {process.returncode}"
        raise EnvironmentFailed(f"Installing failed in {what}: {words}", "Fix that, and run again.")
    return lines


@contextlib.contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Let one process at a time make or remove `folder`; others wait."""
    with lease(folder.with_suffix(".lock"), wait=True):
        yield


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"
