"""What later Linears make up for of what those of each name lose, rounded to 3 bits.

    python benchmarks/made_up_for.py WORK [--samples 32] -o FILE

Makes the demo's model with all Linears of one name in 3 bits and the others in 8, each of which
makes up for what came before, and measures its perplexity; then all in 8, and all in 3, the latter
without making up for anything too. FILE has a row for each: what a budget counts that they cost,
one by one, and what was lost beside all in 8 bits, both in nats a token. If it counts them rightly,
the one is in proportion to the other. Run again with the same FILE it goes on.
"""

import argparse
import math
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from prune_quality import owl

from owl_deploy.bench.machine import look
from owl_deploy.compression.quantization.formats import Costs
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.demo_input import CALIBRATION, EVALUATION, MODEL, demo_input
from owl_deploy.models.manifest import Cost, versions
from owl_deploy.utils.artefact import read_object, write_json
from owl_deploy.utils.hardware import Hardware

NAMES = ("v_proj", "q_proj", "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# What is rounded to 3 bits, by the end of its name, and whether later ones make up for it.
ROWS = {
    "8 bits": ("nothing", True),
    **{name: (name, True) for name in NAMES},
    "all": ("_proj", True),
    "all, not made up for": ("_proj", False),
}


def row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Make and measure one."""
    end, asymmetric = ROWS[name]

    def chosen(costs: Costs, *_: object, **__: object) -> list[dict[str, Cost]]:
        bits = {key: 3 if key.endswith(end) else 8 for key in costs[0]}
        return [
            {key: next(one for one in own if one.bits == bits[key]) for key, own in block.items()}
            for block in costs
        ]

    folder = given.work / "made"
    asked = PruneSettings.checked(method="none", budget="8", asymmetric=asymmetric)
    text = Calibration(demo_input() / CALIBRATION, given.samples, 512)
    with mock.patch("owl_deploy.compression.plan.spend", chosen):
        made = prune(
            demo_input() / MODEL, folder, asked, text, Hardware(dtype="bfloat16"), force=True
        )
    evaluation = ("--perplexity", demo_input() / EVALUATION, "--window", "2048", "--windows", "6")
    perplexity = owl("eval", folder, *evaluation)["value"]
    shutil.rmtree(folder)
    assert made.spent is not None
    return {"rounded": name, "counted": made.spent.loss, "perplexity": perplexity}


def main() -> None:
    """Do the rows that FILE does not hold, and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    result = {"cpu": look().cpu, "samples": given.samples, "versions": versions(), "rows": []}
    if given.output.is_file():
        result = read_object(given.output, "Delete it.")
    rows = result["rows"]
    for name in list(ROWS)[len(rows) :]:
        rows.append(row(name, given))
        rows[-1]["lost"] = math.log(rows[-1]["perplexity"] / rows[0]["perplexity"])
        print(*rows[-1].values(), flush=True)
        write_json(given.output, result)


if __name__ == "__main__":
    main()
