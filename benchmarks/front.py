"""What a bit buys: perplexity, and of the showcase's 1.5B HumanEval too, against bits and bytes.

    python benchmarks/front.py -o front.svg

Draws what the other commands measured, from their results; nothing is measured here. First
SmolLM2-135M, by the bits of a weight in its blocks (`benchmarks/low_bits.py`; llama.cpp's by the
tensors of `blk.` in the GGUF that `owl export` makes); then Qwen2.5-Coder-1.5B, as deployed, by
the size of the file (`make showcase`, `owl bench`), and by HumanEval, with a standard error, what
was asked half of its problems at least. Where a deployment was measured more than once, the first
of the files counts.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from owl_deploy.utils.artefact import read_object
from owl_deploy.utils.picture import ACCENT, FAINT, INK, plain_log_scale, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESULTS = Path(__file__).parent / "results"
SMALL = (
    "ordered_bits_smollm2.json",
    "asymmetric_bits_smollm2.json",
    "low_bits_signs.json",
    "low_bits_trained.json",
    "low_bits_llama_cpp.json",
)
LARGE = (
    "humaneval_showcase.json",
    "iq4_showcase.json",
    "int3_showcase.json",
    "showcase_intel/result.json",
    "showcase_amd/result.json",
    "budget_showcase.json",
    "finetune_showcase.json",
    "finetune_answers.json",
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
SPARSE = Kind("weights removed, half if not said; trained on ...", "s", INK, True)
RIVAL = Kind("llama.cpp", "^", FAINT, True)

# By the beginnings of deployments' names: how they were rounded, or what they were trained on.
AFTER = {
    "owl-int4": " to nearest",
    "trained": " on code",
    "answers": " on answers",
    "weighed": " by text",
    "sparse-mixed": ", asymmetric",
    "sparse-60": ", 60 %",
}
_ENOUGH = 82  # problems to tell deployments apart by

# Labels that would lie upon others where the usual ones do, in points from their marks.
_CROWDED = {
    ("60 % int3", TRAINED.label): (5, 2),
    ("60 % int4", TRAINED.label): (-5, -8),
    ("int3", ONE_SHOT.label): (6, 1),
    ("50 % int4", ONE_SHOT.label): (5, 2),
    ("int4 to nearest", ONE_SHOT.label): (5, 2),
    ("int4, asymmetric", SPARSE.label): (5, -11),
    ("int8, asymmetric", SPARSE.label): (6, -7),
    ("Q2_K by text", RIVAL.label): (6, 3),
    ("Q2_K", RIVAL.label): (5, -5),
    ("IQ2_M by text", RIVAL.label): (3, 8),
    ("Q3_K_M by text", RIVAL.label): (6, 3),
}


class Point(NamedTuple):
    """A checkpoint or deployment: how large, and what it is worth."""

    name: str
    size: float
    perplexity: float
    kind: Kind
    solved: float | None = None  # % of HumanEval's problems
    error: float = 0.0  # the standard error of that


def small() -> Iterator[Point]:
    """SmolLM2-135M; rows that were trained for other times are left out."""
    seen = set()
    for file in SMALL:
        for row in read_object(RESULTS / file, "Check out the results.")["rows"]:
            # Of a slower machine: where as many steps took so many minutes.
            minutes = row.get("equal_to_minutes", row.get("minutes", 0))
            if minutes not in (0, 30) or row.get("settings", {}).get("asymmetric") is False:
                continue
            name: str = row["format"].partition(", ")[0].removeprefix("dense ")
            kind = ONE_SHOT
            if row.get("engine") == "llama.cpp":
                kind = RIVAL
            elif minutes:  # all in 3 bits lie where half of the weights in 4 do
                kind, name = TRAINED, "" if name == "int3" else name
            elif row["settings"].get("reconstruct"):
                kind, name = RECONSTRUCTED, ""
            elif name.startswith("budget"):
                if file != SMALL[0]:  # as a budget was met before
                    continue
                kind, name = BUDGET, ""
            if (row["format"], kind) not in seen:
                yield Point(name, row["bits"], row["perplexity"], kind)
            seen.add((row["format"], kind))


def large() -> Iterator[Point]:
    """The 1.5B, as deployed."""
    seen = set()
    for file in LARGE:
        found = read_object(RESULTS / file, "Check out the results.")
        runs = found.get("runs") or [{"rows": found.get("subjects") or found["rows"]}]
        for row in (row for run in runs for row in run["rows"]):
            name: str = (row.get("name") or row["deployment"]).removeprefix("dense-")
            if name in seen or row["engine"] not in ("owl", "llama.cpp") or "sister" in name:
                continue
            seen.add(name)
            kind = RIVAL if row["engine"] == "llama.cpp" else ONE_SHOT
            if name.startswith("b"):
                kind = BUDGET
            elif name.startswith(("sparse", "trained", "answers")):
                kind = SPARSE
            after = next((told for start, told in AFTER.items() if name.startswith(start)), "")
            unnamed = kind == BUDGET or name.startswith("rounded-mixed")  # next to another int4
            name = "" if unnamed else name.rpartition("-")[2] + after
            score = row.get("scores", {}).get("humaneval", {})
            megabytes, perplexity = row["size_bytes"] / 1e6, row["perplexity"]
            if score.get("documents", 0) < _ENOUGH:
                yield Point(name, megabytes, perplexity, kind)
            else:
                solved, error = 100 * score["value"], 100 * score["stderr"]
                yield Point(name, megabytes, perplexity, kind, solved, error)


def plot(axes: "Axes", points: Iterable[tuple[Point, float, float]], *, rivals_left: bool) -> None:
    """The points by their sizes and the values with their errors; labels where there is room."""
    for point, value, error in points:
        axes.plot(
            point.size,
            value,
            point.kind.marker,
            color=point.kind.color,
            markerfacecolor=point.kind.color if point.kind.filled else "none",
            label=point.kind.label,
        )
        if error:
            axes.errorbar(point.size, value, error, color=point.kind.color, linewidth=1)
        right = (point.kind == RIVAL) != rivals_left
        usual = (5, 2) if right else (-5, 3 if point.kind == TRAINED else -11)
        offset = _CROWDED.get((point.name, point.kind.label), usual)
        axes.annotate(
            point.name,
            (point.size, value),
            offset,
            textcoords="offset points",
            fontsize=8,
            horizontalalignment="left" if offset[0] > 0 else "right",
        )
    axes.margins(x=0.16, y=0.1)
    axes.grid()


def picture() -> str:
    """The SVG."""

    def draw(grid: list[list]) -> None:  # type: ignore[type-arg]
        (first, legend), (loss, task) = grid
        deployed = list(large())
        asked = ((p, p.solved, p.error) for p in deployed if p.solved is not None)
        plot(first, ((p, p.perplexity, 0.0) for p in small()), rivals_left=False)
        plot(loss, ((p, p.perplexity, 0.0) for p in deployed), rivals_left=True)
        plot(task, asked, rivals_left=False)
        plain_log_scale(first)
        first.set_title("SmolLM2-135M", fontsize=10)
        first.set_xlabel("bits a weight in the blocks")
        for axes in (first, loss):
            axes.set_ylabel("perplexity (less is better)")
        for axes, on in ((loss, "code"), (task, "HumanEval")):
            axes.set_title(f"Qwen2.5-Coder-1.5B, on {on}", fontsize=10)
            axes.set_xlabel("file, MB")
        task.set_ylabel("problems solved, %")
        legend.set_axis_off()
        marks = {
            label: mark
            for axes in (first, loss)
            for mark, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        legend.legend(marks.values(), marks.keys(), loc="center", fontsize=9)

    return svg(draw, (9.0, 8.0), (2, 2))


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    given.output.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
