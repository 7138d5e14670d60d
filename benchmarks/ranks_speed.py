"""How much faster two processes of one core each prune than one process of one core.

    python benchmarks/ranks_speed.py -o benchmarks/results/ranks_speed.json

SmolLM2-135M, the demo's input. Runs of one and of two processes in turn, as many rounds as asked.
Two times of each: of the pruning, as the manifest has it, and of the whole command, which starts
torch in every process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from owl_deploy.bench.machine import look
from owl_deploy.bench.stats import compare
from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.utils.artefact import write_json
from owl_deploy.utils.progress import bar

METHODS = ("wanda", "sparsegpt")


def prune(method: str, ranks: int, windows: int, folder: Path) -> dict[str, float]:
    """Seconds of one run of so many processes, each on one core with one thread."""
    given, output = demo_input(), folder / "pruned"
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m"]
    line = ["prune", given / MODEL, "-o", output, "--method", method]
    line += ["--allocation", "owl", "--sparsity", "0.5"]
    line += ["--calibration", given / CALIBRATION]
    line += ["--samples", windows, "--sequence-length", "512"]
    command = [sys.executable, "-m", *(launcher if ranks > 1 else []), "owl_deploy", *line]
    begun = time.perf_counter()
    subprocess.run(
        ["taskset", "-c", f"0-{ranks - 1}", *map(str, command), "--force"],
        check=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    whole = time.perf_counter() - begun
    manifest = read_manifest(output, CheckpointManifest)
    assert manifest is not None
    return {"pruning": manifest.wall_seconds, "whole": whole}


def gains(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """How many times as fast two processes are, in pairs: `owl bench`'s statistics."""
    kinds = ("pruning", "whole")
    times = {kind: [[run[kind] for run in own] for own in runs.values()] for kind in kinds}
    return {kind: asdict(compare(two, one)) for kind, (one, two) in times.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--windows", type=int, default=32, help="of 512 tokens")
    given = parser.parse_args()
    found: dict[str, Any] = {"cpu": look().cpu, "windows": given.windows, "methods": {}}
    steps = len(METHODS) * given.rounds * 2
    with tempfile.TemporaryDirectory() as name, bar("Pruning in turn", steps) as advance:
        for method in METHODS:
            runs: dict[str, list[dict[str, float]]] = {"1": [], "2": []}
            for _ in range(given.rounds):
                for ranks, own in runs.items():
                    own.append(prune(method, int(ranks), given.windows, Path(name)))
                    advance(1)
            found["methods"][method] = {"runs": runs, "times as fast": gains(runs)}
            print(method, found["methods"][method]["times as fast"])
    write_json(given.output, found)


if __name__ == "__main__":
    main()
