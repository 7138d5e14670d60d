"""What a bit buys: perplexity against bits a weight, and of the showcase's 1.5B against the file.

    python benchmarks/front.py -o front.svg

Draws what the other commands measured, from their results; nothing is measured here. On the left
SmolLM2-135M, by the bits of a weight in its blocks (`benchmarks/low_bits.py`; llama.cpp's by the
tensors of `blk.` in the GGUF that `owl export` makes); on the right
Qwen2.5-Coder-1.5B, as deployed, by the size of the file (`make showcase`, `owl bench`). Where a
deployment was measured more than once, the first of the files counts.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from owl_deploy.artefact import read_object
from owl_deploy.picture import ACCENT, FAINT, INK, plain_log_scale, svg

RESULTS = Path(__file__).parent / "results"
SMALL = (
    "low_bits_smollm2.json",
    "low_bits_reconstructed.json",
    "low_bits_trained.json",
    "low_bits_llama_cpp.json",
)
LARGE = (
    "showcase_intel/result.json",
    "showcase_amd/result.json",
    "budget_showcase.json",
    "finetune_showcase.json",
)


class Kind(NamedTuple):
    """How points of a kind look."""

    label: str
    marker: str
    color: str
    filled: bool


ONE_SHOT = Kind("one format, one shot", "o", ACCENT, False)
BUDGET = Kind("a format for each matrix", "D", ACCENT, False)
RECONSTRUCTED = Kind("reconstructed", "s", ACCENT, True)
TRAINED = Kind("trained for 30 minutes", "o", ACCENT, True)
SPARSE = Kind("half of the weights removed", "s", INK, True)
RIVAL = Kind("llama.cpp", "^", FAINT, True)


class Point(NamedTuple):
    """A checkpoint or deployment: how large, and what perplexity it has."""

    name: str
    size: float
    perplexity: float
    kind: Kind


def small() -> Iterator[Point]:
    """SmolLM2-135M; rows that were trained for other times are left out."""
    for file in SMALL:
        for row in read_object(RESULTS / file, "Check out the results.")["rows"]:
            minutes = row.get("minutes", 0)
            if minutes not in (0, 30):
                continue
            name: str = row["format"].partition(", ")[0]
            kind = ONE_SHOT
            if row.get("engine") == "llama.cpp":
                kind = RIVAL
            elif minutes:
                kind = TRAINED
            elif row["settings"].get("reconstruct"):
                kind, name = RECONSTRUCTED, ""
            elif name.startswith("budget"):
                kind, name = BUDGET, ""
            yield Point(name, row["bits"], row["perplexity"], kind)


def large() -> Iterator[Point]:
    """The 1.5B, as deployed."""
    seen = set()
    for file in LARGE:
        found = read_object(RESULTS / file, "Check out the results.")
        runs = found.get("runs") or [{"rows": found.get("subjects") or found["rows"]}]
        for row in (row for run in runs for row in run["rows"]):
            name: str = row.get("name") or row["deployment"]
            if name in seen or row["engine"] not in ("owl", "llama.cpp") or "sister" in name:
                continue
            seen.add(name)
            kind = RIVAL if row["engine"] == "llama.cpp" else ONE_SHOT
            if name.startswith("b"):
                kind = BUDGET
            elif name.startswith(("sparse", "trained")):
                kind = SPARSE
            after = ", trained" if name.startswith("trained") else ""
            name = name.rpartition("-")[2] + after
            yield Point(name, row["size_bytes"] / 1e6, row["perplexity"], kind)


def picture() -> str:
    """The SVG."""

    def draw(grid: list[list]) -> None:  # type: ignore[type-arg]
        panels = (
            (grid[0][0], "SmolLM2-135M", "bits a weight in the blocks", list(small())),
            (grid[0][1], "Qwen2.5-Coder-1.5B, on code", "file, MB", list(large())),
        )
        labelled = set()
        for axes, title, what, points in panels:
            for point in points:
                axes.plot(
                    point.size,
                    point.perplexity,
                    point.kind.marker,
                    color=point.kind.color,
                    markerfacecolor=point.kind.color if point.kind.filled else "none",
                    label="" if point.kind in labelled else point.kind.label,
                )
                labelled.add(point.kind)
                # Where there is room: rivals are the larger ones on the left, better on the right.
                right = (point.kind == RIVAL) == (axes is grid[0][0])
                axes.annotate(
                    point.name,
                    (point.size, point.perplexity),
                    (5, 2) if right else (-5, -11),
                    textcoords="offset points",
                    fontsize=8,
                    horizontalalignment="left" if right else "right",
                )
            axes.set_title(title, fontsize=10)
            axes.set_xlabel(what)
            axes.margins(x=0.16, y=0.1)
            axes.grid()
        plain_log_scale(grid[0][0])
        grid[0][0].set_ylabel("perplexity (less is better)")
        grid[0][0].figure.legend(loc="outside upper center", ncols=3, fontsize=8)

    return svg(draw, (9.0, 4.4), (1, 2))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
