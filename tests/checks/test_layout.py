"""Imports run one way, and `owl --help` stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path("owl_deploy")
# From the top to the bottom; a part imports only what stands in a later row, or in itself.
LAYERS = (
    ("__main__", "schemas", "showcase"),
    ("demo",),
    ("cli",),
    ("options",),
    ("distributed",),
    ("api",),
    ("serve",),
    ("finetune", "export", "bench", "evaluate"),
    ("compression",),
    ("inference", "showcase_input"),
    ("demo_input",),
    ("data",),
    ("models",),
    ("runtime",),
    ("utils",),
    ("errors", "__init__"),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}
# Standalone scripts that run in another environment's Python, without this package.
STANDALONE = [
    *(PACKAGE / "inference" / f"{name}.py" for name in ("worker", "speculate", "slots")),
    *(PACKAGE / "export" / f"{name}.py" for name in ("to_gguf", "quantize_gguf")),
    *(PACKAGE / "inference" / "drivers").glob("*.py"),
]


def part_of(module: str) -> str:
    names = module.split(".")
    return names[1] if len(names) > 1 else "__init__"


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    ours = {name for name in found if name.split(".")[0] == "owl_deploy"}
    return {"owl_deploy" if name == "owl_deploy.__version__" else name for name in ours}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_run_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for name in imports(path):
        part = part_of(name)
        assert part in RANK, f"{part} has no row in LAYERS"
        assert part == own or RANK[part] > RANK[own], f"{path} imports {name}"


@pytest.mark.parametrize("path", STANDALONE, ids=str)
def test_what_runs_elsewhere_does_not_import_the_package(path):
    assert imports(path) == set()


def test_help_is_light():
    code = (
        "import sys; sys.argv = ['owl', '--help']\n"
        "import owl_deploy.cli\n"
        "try: owl_deploy.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'datasets', 'numpy'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
