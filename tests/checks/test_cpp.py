"""The engine's C++ passes the checks of .clang-tidy, with the flags that it is built with."""

import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.runtime.build import ROOT, configure

SOURCES = ROOT / "owl_deploy/runtime/csrc"
TIDY = Path(sys.executable).with_name("clang-tidy")


def test_clang_tidy(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    """A minute on two cores; what has passed is not read again until something changes."""
    read = [*sorted(SOURCES.iterdir()), ROOT / ".clang-tidy", ROOT / "CMakeLists.txt"]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in read)).hexdigest()
    if pytestconfig.cache.get("clang-tidy/passed", "") == digest:
        return
    try:
        configure(tmp_path, ["OWL_WERROR"])
    except EnvironmentFailed as error:
        pytest.skip(f"clang-tidy is left out. {error}")
    built = (tmp_path / "compile_commands.json").read_text()
    files = [path for path in SOURCES.glob("*.cpp") if f'{path.name}"' in built]
    assert files
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(lambda path: tidy(tmp_path, path), files))
    assert not any(found), "\n".join(filter(None, found))
    pytestconfig.cache.set("clang-tidy/passed", digest)


def tidy(build: Path, path: Path) -> str:
    """What clang-tidy says of one file; nothing if it is in order."""
    command = [str(TIDY), "-p", str(build), "--quiet", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr if done.returncode else ""
