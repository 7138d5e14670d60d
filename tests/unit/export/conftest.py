from collections.abc import Callable
from pathlib import Path

import pytest

from owl_deploy.export import traced
from owl_deploy.export.source import Source
from tests import tiny

ALL_INLINE, ALL_EXTERNAL = 1 << 40, 0


@pytest.fixture(scope="session")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose head has a weight of its own."""
    folder = tmp_path_factory.mktemp("untied") / "model"
    return tiny.write_llama(folder, tie_word_embeddings=False)


@pytest.fixture(scope="session")
def source(llama: Path) -> Source:
    """The tied model, loaded once; nobody changes it."""
    return Source(llama)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Path]:
    """Trace a source into a folder of the test's own."""

    def run(source: Source, external_bytes: int = ALL_INLINE) -> Path:
        folder = tmp_path / "deployment"
        folder.mkdir()
        traced.build(source, folder, external_bytes)
        return folder

    return run
