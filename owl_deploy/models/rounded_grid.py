"""What the weights of a checkpoint were rounded to, as `grid.safetensors` beside them says.

That file has, for each Linear that was rounded, `<its name>.weight_scale` [out, ceil(in / group)],
and says in its metadata how many columns share a scale (`group`) and how many bits an integer has:
`bits`, of all Linears, or `<its name>.bits` for each, where they are to keep bits of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import GRID
from owl_deploy.runtime.value_types import INTEGERS, SHARED_COLUMNS, TRAITS
from owl_deploy.utils.artefact import save_tensors

if TYPE_CHECKING:
    import torch

SCALE = "weight_scale"  # the name of a Linear's scales, beside its weight


def limits(bits: int) -> tuple[int, int]:
    """The least and the largest integer of so many bits; 8 leave out -128, as the engine does."""
    levels = TRAITS[INTEGERS[bits]].levels
    assert levels is not None
    return levels


@dataclass(frozen=True)
class KeptGrid:
    """Scales [out, ceil(in / group)], float32, and bits of an integer, by the Linears' names.

    `chosen`: the bits were chosen for each Linear, if only to be those of all others.
    """

    bits: dict[str, int]
    group: int
    scales: "dict[str, torch.Tensor]"
    chosen: bool


def write_grid(
    checkpoint: Path, scales: "dict[str, torch.Tensor]", bits: int | Mapping[str, int], group: int
) -> None:
    """Write the grid of the checkpoint in a folder.

    `scales` [out, ceil(in / group)], by the tensors' names; `bits`, of all Linears, or by their
    names, where they were chosen for each.
    """
    if isinstance(bits, int):
        told = {"bits": str(bits)}
    else:
        told = {f"{name}.bits": str(number) for name, number in bits.items()}
    save_tensors(scales, checkpoint / GRID, **told, group=str(group))


def read_grid(checkpoint: Path) -> KeptGrid | None:
    """The grid of the checkpoint in a folder, None where it has none.

    Raises `BadInput` for a file that is none.
    """
    from safetensors import SafetensorError, safe_open

    file = checkpoint / GRID
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as tensors:
            told = tensors.metadata() or {}
            scales = {
                name.removesuffix(f".{SCALE}"): tensors.get_tensor(name).float()
                for name in tensors.keys()  # noqa: SIM118 - no mapping
                if name.endswith(f".{SCALE}")
            }
            bits = {name: int(told.get("bits") or told[f"{name}.bits"]) for name in scales}
            grid = KeptGrid(bits, int(told["group"]), scales, chosen="bits" not in told)
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(
            f"{file} is not a grid: {error}.", "Round the model again, or remove the file."
        ) from None
    matrices = all(one.ndim == 2 for one in scales.values())
    if not matrices or not set(grid.bits.values()) <= INTEGERS.keys():
        raise BadInput(
            f"{file} is not a grid: it has other bits, or scales of no matrix.",
            "Round the model again, or remove the file.",
        )
    if grid.group not in SHARED_COLUMNS:
        raise BadInput(
            f"In {file} {grid.group} columns share a scale.", "32, 64 or 128 can: round again."
        )
    return grid
