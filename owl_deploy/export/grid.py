"""The grid that a checkpoint's weights lie on, for the packing, which keeps it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.grid import read_grid
from owl_deploy.runtime import pack

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class Grid:
    """Scales [out, ceil(in / group)] by the name of their Linear; integers of so many `bits`."""

    bits: int
    group: int
    scales: dict[str, NDArray[np.float32]]

    @classmethod
    def read(cls, checkpoint: Path) -> "Grid | None":
        """The grid of the checkpoint in a folder, None where it has none (see `read_grid`)."""
        kept = read_grid(checkpoint)
        if kept is None:
            return None
        scales = {name: scale.numpy() for name, scale in kept.scales.items()}
        return cls(kept.bits, kept.group, scales)

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
