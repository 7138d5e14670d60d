"""Imports run one way, `owl --help` stays light, and the unit tests mirror the package."""

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
    ("sweep", "cluster"),
    ("pipeline",),
    ("api",),
    ("serve",),
    ("prune", "export", "bench", "evaluate", "finetune", "generate", "verify"),
    ("engines", "hardware", "adapter", "showcase_input", "survivors"),
    ("calibration", "input_statistics"),
    ("demo_input",),
    ("blocks", "grid", "tokens"),
    ("runtime", "recipe", "checkpoint", "options", "text", "tokenizer"),
    ("partial", "prune_settings", "measurements"),
    ("families", "allocation", "methods"),
    ("manifest", "digests", "record", "json_lines"),
    ("artefact", "cache", "ending", "picture", "progress"),
    ("lease", "ranks"),
    ("errors", "container", "interrupted", "__init__"),
)
RANK = {part: rank for rank, row in enumerate(LAYERS) for part in row}
# Standalone scripts that run in another environment's Python, without this package.
STANDALONE = [
    *(PACKAGE / "engines" / f"{name}.py" for name in ("worker", "speculate", "slots")),
    *(PACKAGE / "export" / f"{name}.py" for name in ("to_gguf", "quantize_gguf")),
    *(PACKAGE / "engines" / "drivers").glob("*.py"),
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


# Unit tests that are named for no module of the package, and what they are of.
NO_MODULE = {
    "bench/test_action.py": "action.yml",
    "cluster/test_cluster_run.py": "run.py; pytest wants names that no other folder has",
    "engines/test_engine_server.py": "server.py; pytest wants names that no other folder has",
    "export/test_export_show.py": "show.py; pytest wants names that no other folder has",
    "export/test_kept_grid.py": "grid.py; pytest wants names that no other folder has",
    "finetune/test_finetune_run.py": "run.py; pytest wants names that no other folder has",
    "prune/test_bits.py": "rounding in several modules, through the whole verb",
    "prune/test_pruned_head.py": "the head's part in several modules",
    "prune/test_table.py": "methods x allocations x families, through the whole folder",
    "runtime/test_attention.py": "csrc",
    "runtime/test_edges.py": "csrc",
    "runtime/test_hostile_models.py": "csrc",
    "runtime/test_kernels.py": "csrc",
    "runtime/test_operators.py": "csrc",
    "runtime/test_program.py": "csrc",
}


@pytest.mark.parametrize("path", sorted(Path("tests/unit").rglob("test_*.py")), ids=str)
def test_unit_tests_mirror_the_package(path):
    relative = path.relative_to("tests/unit")
    module = PACKAGE / relative.parent / relative.name.removeprefix("test_")
    mirrored = module.is_file() or module.with_suffix("").is_dir()
    assert mirrored != (str(relative) in NO_MODULE), f"{path} is to be named for a module"


def test_the_exceptions_are_there():
    assert [name for name in NO_MODULE if not (Path("tests/unit") / name).is_file()] == []
