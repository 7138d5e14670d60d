from pathlib import Path

import pytest

from tests import tiny


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama checkpoint; tests read it and never write into it."""
    return tiny.write_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text long enough for a few windows of some hundred tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(tiny.text())
    return path
