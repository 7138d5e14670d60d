import subprocess
import sys
from pathlib import Path

from owl_deploy.schemas import SCHEMAS


def test_the_schemas_in_the_docs_are_current(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "owl_deploy.schemas", str(tmp_path)]
    subprocess.run(command, check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    kept = {path.name: path.read_text() for path in Path("docs/schemas").iterdir()}
    assert sorted(written) == sorted(f"{name}.json" for name in SCHEMAS)
    assert kept == written, "run python -m owl_deploy.schemas docs/schemas"
