"""Perplexity against bits a weight: the demo's model rounded to few bits, dense and sparse.

    python benchmarks/low_bits.py WORK [--format "50 % int4" ...] [--minutes 10] -o FILE

Makes each format with `owl prune` in one shot and measures it with `owl eval` through PyTorch, so
that no kernel is needed to judge a format. With `--minutes` each is trained for so long first, on
its grid, with the dense model as its teacher: rows of their own. WORK keeps the checkpoints: run
the command again to go on, also after a kill; FILE gets every row that is measured. With `--steps
N` the command ends after N of them.
"""

import argparse
from pathlib import Path
from typing import Any

from prune_quality import owl

from owl_deploy.bench.machine import look
from owl_deploy.demo_input import CALIBRATION, EVALUATION, MODEL, demo_input
from owl_deploy.models.manifest import CheckpointManifest, read_manifest, versions
from owl_deploy.utils.artefact import is_artefact, read_object, write_json
from owl_deploy.utils.resume import is_interrupted

SPARSEGPT = ("--method", "sparsegpt", "--allocation", "uniform")
ALPS = ("--method", "alps", "--allocation", "fisher")
RECONSTRUCT = ("--reconstruct", "8")
FORMATS: dict[str, tuple[str, ...]] = {
    "dense int8": ("quantize", "--bits", "8"),
    "dense int4": ("quantize", "--bits", "4"),
    "dense int4, groups of 64": ("quantize", "--bits", "4", "--group", "64"),
    "dense int3": ("quantize", "--bits", "3"),
    "50 %": (*SPARSEGPT, "--sparsity", "0.5"),
    "50 % int8": (*SPARSEGPT, "--sparsity", "0.5", "--bits", "8"),
    "50 % int4": (*SPARSEGPT, "--sparsity", "0.5", "--bits", "4"),
    "50 % int3": (*SPARSEGPT, "--sparsity", "0.5", "--bits", "3"),
    "60 % int3": (*SPARSEGPT, "--sparsity", "0.6", "--bits", "3"),
    "dense int4, reconstructed": ("quantize", "--bits", "4", *RECONSTRUCT),
    "dense int3, reconstructed": ("quantize", "--bits", "3", *RECONSTRUCT),
    "50 % int4, reconstructed": (*ALPS, "--sparsity", "0.5", "--bits", "4", *RECONSTRUCT),
    "budget 4.25": ("--budget", "4.25"),
    "budget 3.8": ("--budget", "3.8"),
    "budget 3.3": ("--budget", "3.3"),
    "budget 3.25": ("--budget", "3.25"),
    "budget 2.75": ("--budget", "2.75"),
}
TRAINING = ("--method", "masked", "--sequence-length", "512")
WINDOW, WINDOWS = 2048, 6


def made(name: str, given: argparse.Namespace) -> Path:
    """The checkpoint in the format `name`, made, or gone on with, if it is not there."""
    plain = name.replace(" ", "-").replace(",", "").replace("%", "percent")
    folder: Path = given.work / f"{plain}-of-{given.samples}-{given.dtype}"
    if not is_artefact(folder):
        text = ("--calibration", demo_input() / CALIBRATION, "--samples", given.samples)
        asked = (*text, "--sequence-length", 512, "--dtype", given.dtype, *FORMATS[name])
        resume = ["--resume"] if is_interrupted(folder) else []
        verb, options = ("quantize", asked[1:]) if asked[0] == "quantize" else ("prune", asked)
        owl(verb, demo_input() / MODEL, "-o", folder, *map(str, options), *resume)
    return folder


def trained(folder: Path, minutes: float) -> Path:
    """What so many minutes of training make of a checkpoint, made or gone on with."""
    after = folder.with_name(f"{folder.name}-trained-{minutes:g}")
    if not is_artefact(after):
        text, teacher = demo_input() / CALIBRATION, demo_input() / MODEL
        asked = ("--text", text, "--teacher", teacher, *TRAINING, "--max-minutes", minutes)
        resume = ["--resume"] if is_interrupted(after) else []
        owl("finetune", folder, "-o", after, *map(str, asked), *resume)
    return after


def named(name: str, minutes: float) -> str:
    """The name of a format's row."""
    return f"{name}, trained {minutes:g} minutes" if minutes else name


def bits_a_weight(manifest: CheckpointManifest) -> float:
    """What a weight of the blocks takes, on average, in bits.

    A byte of scale a group, and the integers, or a mask of 1 bit and those that are not zero, if
    that is less. What was not rounded counts 16 bits; a budget's as it was counted.
    """
    if manifest.spent is not None:
        return 8 * manifest.spent.bytes / manifest.weights
    settings, zeros = manifest.settings, manifest.sparsity.achieved
    bits = settings.bits or 16
    scale = 8 / settings.bits_group if settings.bits_group else 0.0
    return scale + min(bits, 1 + (1 - zeros) * bits)


def row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Make a format, train it if that is asked for, and measure it."""
    folder = made(name, given)
    measured = trained(folder, given.minutes) if given.minutes else folder
    text = ("--perplexity", demo_input() / EVALUATION, "--window", WINDOW, "--windows", WINDOWS)
    manifest = read_manifest(folder, CheckpointManifest)
    assert manifest is not None
    return {
        "format": named(name, given.minutes),
        "bits": bits_a_weight(manifest),
        "zeros": manifest.sparsity.achieved,
        "perplexity": owl("eval", measured, *map(str, text))["value"],
        "prune_seconds": manifest.wall_seconds,
        **({"minutes": given.minutes} if given.minutes else {}),
        "settings": manifest.settings.model_dump(mode="json"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The formats in markdown, the largest first."""
    lines = ["| format | bits a weight | zeros | perplexity |", "|---|--:|--:|--:|"]
    for one in sorted(rows, key=lambda one: -one["bits"]):
        lines.append(
            f"| {one['format']} | {one['bits']:.2f} | {one['zeros']:.0%} "
            f"| {one['perplexity']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Do the rows that FILE does not hold; print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--format", action="append", choices=FORMATS, help="[all]")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--minutes", type=float, default=0.0, help="of training [none]")
    parser.add_argument("--dtype", default="auto", help="to prune in; perplexity is in float32")
    parser.add_argument("--steps", type=int, default=len(FORMATS), help="rows to do now")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    settings = {"samples": given.samples, "dtype": given.dtype}
    result = {"cpu": look().cpu, **settings, "versions": versions(), "rows": []}
    if given.output.is_file():
        result = read_object(given.output, "Delete it.")
        if {key: result.get(key) for key in settings} != settings:
            parser.error(f"{given.output} was made with other options")
    done = {one["format"] for one in result["rows"]}
    asked = [one for one in given.format or FORMATS if named(one, given.minutes) not in done]
    for name in asked[: given.steps]:
        result["rows"].append(row(name, given))
        write_json(given.output, result)
        print(f"{result['rows'][-1]['format']}: {result['rows'][-1]['perplexity']:.2f}", flush=True)
    print(f"\n{table(result['rows'])}")


if __name__ == "__main__":
    main()
