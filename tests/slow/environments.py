"""Environments of other libraries, from lock files under requirements/, kept in the cache."""

import subprocess
import sys
from pathlib import Path

from owl_deploy.utils.artefact import sha256
from owl_deploy.utils.cache import cache_dir


def environment(name: str) -> Path:
    """The Python of the environment that requirements/NAME.lock describes, made if need be."""
    lock = Path("requirements") / f"{name}.lock"
    folder = cache_dir() / "test-environments" / name
    marker = folder / "lock.sha256"
    python = folder / "bin" / "python"
    if not marker.is_file() or marker.read_text() != sha256(lock):
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "-r", lock], check=True)
        marker.write_text(sha256(lock))
    return python


def run(python: Path, code: str, *arguments: str | Path) -> str:
    """Run `code` in an environment; its stdout. Its own failure is shown whole."""
    done = subprocess.run(
        [python, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={"NM_DISABLE_ANALYTICS": "True", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"},
        cwd=python.parent,  # SparseML writes logs where it runs
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
