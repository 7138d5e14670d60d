"""The grid that a checkpoint's weights were rounded to: scales beside it, which the packing keeps.

`grid.safetensors` has, for each Linear that was rounded, `<its name>.weight_scale` [out,
ceil(in / group)], and says how many bits an integer has and how many columns share a scale.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.checkpoint import GRID
from owl_deploy.errors import BadInput
from owl_deploy.runtime import pack

_SUFFIX = ".weight_scale"
_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Grid:
    """Scales [out, ceil(in / group)] by the name of their Linear; integers of so many `bits`."""

    bits: int
    group: int
    scales: dict[str, NDArray[np.float32]]

    @classmethod
    def read(cls, checkpoint: Path) -> "Grid | None":
        """The grid of the checkpoint in a folder, None where it has none."""
        from safetensors import SafetensorError, safe_open

        file = checkpoint / GRID
        if not file.is_file():
            return None
        try:
            with safe_open(file, "pt") as tensors:
                told = tensors.metadata() or {}
                bits, group = int(told["bits"]), int(told["group"])
                scales = {
                    name.removesuffix(_SUFFIX): tensors.get_tensor(name).float().numpy()
                    for name in tensors.keys()  # noqa: SIM118 - no mapping
                    if name.endswith(_SUFFIX)
                }
        except (SafetensorError, KeyError, ValueError) as error:
            raise BadInput(
                f"{file} is not a grid: {error}.", "Round the model again, or remove the file."
            ) from None
        if group not in pack.SHARED_COLUMNS:
            raise BadInput(
                f"In {file} {group} columns share a scale.", "32, 64 or 128 can: round again."
            )
        return cls(bits, group, scales)

    def fits(self, values: pack.Values) -> bool:
        """Whether these values can be all the grid's integers."""
        levels = pack.TRAITS[values].levels
        return levels is not None and levels[1] + 1 >= 2 ** (self.bits - 1)

    def of(self, initializer: str) -> NDArray[np.float32] | None:
        """The scales of a weight of the model builder's graph; None where it has none.

        The builder calls a block's attention `attn`, and joins q, k and v.
        """
        linear = initializer.removesuffix(".weight").removesuffix(".MatMul")
        linear = linear.replace(".attn.", ".self_attn.")
        if linear in self.scales:
            return self.scales[linear]
        block, _, last = linear.rpartition(".")
        parts = [self.scales.get(f"{block}.{name}") for name in _QKV]
        known = [part for part in parts if part is not None]
        same = len({part.shape[1] for part in known}) == 1
        if last != "qkv_proj" or len(known) != len(_QKV) or not same:
            return None
        return np.concatenate(known)
