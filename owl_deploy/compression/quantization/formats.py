"""The formats that `owl prune --budget` chooses from, and what they take in the engine."""

from dataclasses import dataclass

from owl_deploy.compression.methods import METHODS
from owl_deploy.models.manifest import Cost
from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import INTEGERS, TRAITS, Values


@dataclass(frozen=True)
class Format:
    """How a Linear may be made: a share `sparsity` removed, and rounded to `bits` where given."""

    bits: int | None
    sparsity: float = 0.0

    @property
    def values(self) -> Values:
        """The engine's type that holds what is rounded."""
        assert self.bits is not None
        return INTEGERS[self.bits]


# Half of the weights in 8 bits take more than all of them in 4, and lose more.
FORMATS = (
    *(Format(bits) for bits in (8, 4, 3)),
    *(Format(4, sparsity) for sparsity in (0.4, 0.5, 0.6, 0.7)),
    *(Format(3, sparsity) for sparsity in (0.5, 0.6, 0.7)),
)

Costs = list[dict[str, list[Cost]]]  # of each block, by the names of its pruned Linears


def formats(method: str) -> list[Format]:
    """Those of `FORMATS` that a method makes: one that only rounds makes the dense ones."""
    return [one for one in FORMATS if METHODS[method].removes or not one.sparsity]


def is_sparse(form: Format, zeros: float) -> bool:
    """Whether the engine packs a weight with this share of zeros sparse in this format."""
    return TRAITS[form.values].pays(1 - zeros)


def packed_size(shape: tuple[int, int], form: Format, zeros: float, group: int) -> int:
    """The bytes of a weight [out, in] with this share of zeros, stored as the engine would."""
    sparsity = zeros if is_sparse(form, zeros) else None
    return pack.stored_bytes(shape, form.values, sparsity, scale_columns=group)
