"""The grid that a checkpoint's weights lie on, for the packing, which keeps it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from owl_deploy.models.rounded_grid import read_grid
from owl_deploy.runtime.value_types import INTEGERS, TRAITS, Values

QKV = ("q_proj", "k_proj", "v_proj")
_GATE_UP = ("gate_proj", "up_proj")
_INTEGERS = [name for _, name in sorted(INTEGERS.items())]  # the narrowest first


@dataclass(frozen=True)
class Rounded:
    """What a weight of the graph was rounded to: `scales` [out, ceil(in / group)], and the `bits`
    of its integers.
    """

    scales: NDArray[np.float32]
    bits: int


def joined(
    parts: Sequence[Rounded | None],
    join: Callable[[Sequence[NDArray[np.float32]]], NDArray[np.float32]],
) -> Rounded | None:
    """What weights that become one were rounded to; None where some were not, or other groups."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts) or len({one.scales.shape[1] for one in known}) > 1:
        return None
    return Rounded(join([part.scales for part in known]), max(part.bits for part in known))


@dataclass(frozen=True)
class Grid:
    """Scales [out, ceil(in / group)] and bits of an integer, by the names of their Linears.

    `chosen`: the bits were chosen for each Linear (see `KeptGrid`).
    """

    bits: dict[str, int]
    group: int
    scales: dict[str, NDArray[np.float32]]
    chosen: bool = False

    @classmethod
    def read(cls, checkpoint: Path) -> "Grid | None":
        """The grid of the checkpoint in a folder, None where it has none (see `read_grid`)."""
        kept = read_grid(checkpoint)
        if kept is None:
            return None
        scales = {name: scale.numpy() for name, scale in kept.scales.items()}
        return cls(kept.bits, kept.group, scales, kept.chosen)

    def holder(self, bits: int, values: Values) -> Values | None:
        """The type that keeps integers of so many `bits` where `values` are asked for.

        That type, or the narrowest that does where fewer than 8 bits are asked for and those of
        each Linear were chosen. None where the weight is to be rounded anew.
        """
        if values not in _INTEGERS:
            return None
        if values != "int8" and self.chosen:
            return next(one for one in _INTEGERS if _fits(bits, one))
        return values if _fits(bits, values) else None

    def of(self, initializer: str) -> Rounded | None:
        """What a weight of the model builder's graph was rounded to; None where it was not."""
        linear = _linear(initializer)
        if found := self._known(linear):
            return found
        block, _, last = linear.rpartition(".")
        whole = f"{block}.gate_up_proj"  # Phi-3's, which the builder cuts in two
        if last in _GATE_UP and whole in self.scales:
            half = np.split(self.scales[whole], 2)[_GATE_UP.index(last)]
            return Rounded(half, self.bits[whole])
        return joined(self.parts(initializer), np.concatenate)

    def parts(self, initializer: str) -> list[Rounded | None]:
        """What q, k and v, which the builder joins, were rounded to; empty where none was."""
        block, _, last = _linear(initializer).rpartition(".")
        known = [self._known(f"{block}.{name}") for name in QKV]
        return known if last == "qkv_proj" and any(known) else []

    def _known(self, linear: str) -> Rounded | None:
        return Rounded(self.scales[linear], self.bits[linear]) if linear in self.scales else None


def _fits(bits: int, values: Values) -> bool:
    return TRAITS[values].stored_bits >= bits


def _linear(initializer: str) -> str:
    """The Linear of a weight of the graph: the builder calls a block's attention `attn`."""
    linear = initializer.removesuffix(".weight").removesuffix(".MatMul")
    return linear.replace(".attn.", ".self_attn.")
