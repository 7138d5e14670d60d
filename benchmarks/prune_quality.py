"""Perplexity of a model pruned by every method with every allocation and structure, as a table.

    python benchmarks/prune_quality.py MODEL CALIBRATION EVALUATION -o FILE [--length 2048]
                                       [--method alps ...] [--setting owl ...] [--sparsity 0.7]
                                       [--keep FOLDER]

Prunes with `owl prune` and measures with `owl eval`, each in a process of its own; the checkpoint
is then dropped, or kept in FOLDER. FILE holds what is done after every row, and a row that it holds
is not repeated: run the command again to go on. `--rows N` stops after N rows.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from owl_deploy.bench.machine import look
from owl_deploy.utils.artefact import sha256, write_json

METHODS = (
    "magnitude",
    "wanda",
    "wanda --refit",
    "sparsegpt",
    "sparsegpt --refit",
    "sparsegpt --asymmetric",
    "alps",
    "alps --asymmetric",
    "sparsegpt --reconstruct 8",
    "alps --reconstruct 8",
)
SETTINGS: dict[str, list[str]] = {
    "uniform": ["--allocation", "uniform"],
    "owl": ["--allocation", "owl"],
    "linear": ["--allocation", "linear"],
    "fisher": ["--allocation", "fisher"],
    "uniform 2:4": ["--allocation", "uniform", "--structure", "2:4"],
    "owl, mixed N:8, 4:8 on average": ["--allocation", "owl", "--structure", "4:8"],
    "owl, mixed N:8, 3:8 on average": ["--allocation", "owl", "--structure", "3:8"],
}


def owl(*arguments: str | Path) -> dict[str, Any]:
    """One `owl` command's JSON."""
    command = [sys.executable, "-m", "owl_deploy", *map(str, arguments), "--json"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(model: Path, given: argparse.Namespace) -> float:
    """The model's perplexity on the evaluation text."""
    text = ["--perplexity", str(given.evaluation), "--windows", str(given.windows)]
    return float(owl("eval", model, *text)["value"])


def row(method: str, setting: str, given: argparse.Namespace) -> dict[str, Any]:
    """Prune once and evaluate."""
    with tempfile.TemporaryDirectory() as scratch:
        out = given.keep / f"{method} {setting}" if given.keep else Path(scratch) / "pruned"
        command = ["prune", str(given.model), "-o", str(out), "--method", *method.split()]
        command += ["--calibration", str(given.calibration), "--samples", str(given.samples)]
        command += ["--sequence-length", str(given.length), "--dtype", given.dtype]
        command += ["--seed", str(given.seed)]
        asked = SETTINGS[setting]
        if "--structure" not in asked:
            command += ["--sparsity", str(given.sparsity)]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        manifest = owl(*command, *asked)
        cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        return {
            "method": method,
            "setting": setting,
            "sparsity": manifest["sparsity"]["achieved"],
            "settings": manifest["settings"],
            "prune_seconds": manifest["wall_seconds"],
            "prune_cpu_seconds": cpu_seconds,
            "perplexity": measure(out, given),
            "cpu": look().cpu,  # a file may be gone on with on another machine
        }


def table(result: dict[str, Any]) -> str:
    """Methods across, settings down, in markdown."""
    cells = {(one["setting"], one["method"]): one["perplexity"] for one in result["rows"]}
    reached = {one["setting"]: one["sparsity"] for one in result["rows"]}
    lines = ["| | sparsity | " + " | ".join(METHODS) + " |", "|---|" + "---:|" * (len(METHODS) + 1)]
    for setting in (one for one in SETTINGS if one in reached):
        found = [cells.get((setting, method)) for method in METHODS]
        shown = ["" if value is None else f"{value:,.1f}" for value in found]
        lines.append(f"| {setting} | {reached[setting]:.1%} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    """Do the rows that FILE does not hold; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("evaluation", type=Path)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=16, help="of 2048 tokens, to evaluate on")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--sparsity", type=float, default=0.7, help="where none is in a setting")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeat. [all]")
    parser.add_argument("--setting", action="append", choices=SETTINGS, help="repeat. [all]")
    parser.add_argument("--keep", type=Path, help="folder for the checkpoints")
    parser.add_argument("--seed", type=int, default=0, help="of calibration windows")
    parser.add_argument("--rows", type=int, default=len(METHODS) * len(SETTINGS))
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    keys = ("samples", "length", "windows", "dtype", "sparsity", "seed")
    asked = {key: getattr(given, key) for key in keys}
    read = {"model": given.model.name}
    read |= {name: sha256(getattr(given, name)) for name in ("calibration", "evaluation")}
    result: dict[str, Any] = {"cpu": look().cpu, **asked, **read, "rows": []}
    if given.output.is_file():
        result = json.loads(given.output.read_text(encoding="utf-8"))
        if {key: result.get(key, 0) for key in keys} != asked:
            parser.error(f"{given.output} was made with other options")
        if any(result.get(name, one) != one for name, one in read.items()):
            parser.error(f"{given.output} was made of another model or text")
    if "dense" not in result:
        result["dense"] = measure(given.model, given)
        write_json(given.output, result)
    done = {(one["method"], one["setting"]) for one in result["rows"]}
    methods = sorted(given.method or METHODS, key="magnitude".__eq__)  # the least interesting last
    settings = given.setting or SETTINGS
    wanted = [(m, s) for m in methods for s in settings if (m, s) not in done]
    for method, setting in wanted[: given.rows]:
        result["rows"].append(row(method, setting, given))
        write_json(given.output, result)
        print(f"{method} {setting}: {result['rows'][-1]['perplexity']:.1f}", flush=True)
    print(f"\ndense: {result['dense']:.1f}\n\n{table(result)}")


if __name__ == "__main__":
    main()
