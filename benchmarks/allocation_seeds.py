"""Perplexity by the rule that divides the sparsity, over several draws of the calibration text.

    python benchmarks/allocation_seeds.py FILE...

Each FILE is of `prune_quality.py`, all of one model. Of each method at each sparsity a table: the
mean over the seeds and the standard deviation of one of them, the seeds' own, and by how much more
the rule costs than `fisher` of the same seed, in percent of perplexity: the mean, and the range.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

BASIS = "fisher"


def gather(results: list[dict[str, Any]]) -> dict[tuple[float, str], dict[str, dict[int, float]]]:
    """(sparsity, method) -> setting -> seed -> perplexity. Raises `SystemExit` for one twice."""
    found: dict[tuple[float, str], dict[str, dict[int, float]]] = defaultdict(dict)
    for result in results:
        for one in result["rows"]:
            of = found[result["sparsity"], one["method"]].setdefault(one["setting"], {})
            if result["seed"] in of:
                raise SystemExit(f"{one['method']} {one['setting']}: seed {result['seed']} twice.")
            of[result["seed"]] = one["perplexity"]
    return found


def line(setting: str, seeds: dict[int, float], basis: dict[int, float]) -> str:
    """A row of the table."""
    values = [seeds[seed] for seed in sorted(seeds)]
    spread = f"{stdev(values):,.1f}" if len(values) > 1 else ""
    more = [100 * (seeds[seed] / basis[seed] - 1) for seed in sorted(seeds.keys() & basis.keys())]
    over = f"{mean(more):+.0f} ({min(more):+.0f} to {max(more):+.0f})" if more else ""
    shown = ", ".join(f"{value:,.1f}" for value in values)
    return f"| {setting} | {mean(values):,.1f} | {spread} | {shown} | {over} |"


def main() -> None:
    """Print the tables, in markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    results = [json.loads(file.read_text(encoding="utf-8")) for file in given.files]
    for (sparsity, method), settings in sorted(gather(results).items()):
        print(f"\n| {method}, {sparsity:.0%} | mean | s | seeds | % over {BASIS} |")
        print("|---|--:|--:|---|--:|")
        for setting, seeds in sorted(settings.items(), key=lambda one: mean(one[1].values())):
            print(line(setting, seeds, settings.get(BASIS, {})))


if __name__ == "__main__":
    main()
