"""A graph on its way into operators of domain `ai.owl`, and the weights that were packed so far."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from owl_deploy.errors import BadInput
from owl_deploy.export import onnx_file
from owl_deploy.export.grid import Grid, Rounded
from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import SCALE_COLUMNS, TRAITS, Values

Cache = Literal["fp16", "fp32"]
# How the head is stored: as int8 in planes, so that a token's likely successors get all 8 bits and
# the others 4, or whole, as the other weights are.
Head = Literal["screened", "whole"]

DOMAIN = "ai.owl"


@dataclass
class Rewriter:
    """The graph, how its weights are to be packed, and what those are that were.

    Attributes: `precision` of the weights, `cache` that of the KV cache; `head_size`, the width of
    an attention head where the graph has only a name for it; `grid`, which the weights lie on;
    `packed`, the headers by name; `on_grid`, how many of them kept their grid.
    """

    model: ir.Model
    precision: Values
    cache: Cache
    head: Head = "whole"
    head_size: int = 0
    grid: Grid | None = None
    packed: dict[str, pack.PackedInfo] = field(default_factory=dict)
    on_grid: int = 0

    def nodes(self, *kinds: str) -> list[ir.Node]:
        """The nodes of these types, in graph order; safe to edit the graph meanwhile."""
        return [node for node in self.model.graph if node.op_type in kinds]

    def format_of(
        self, weight: NDArray[np.float32], rounded: Rounded | None
    ) -> tuple[Values, bool, bool]:
        """How `pack` stores a weight [outputs, inputs]: in which values, whether sparse, and
        whether on the grid that it was `rounded` to.
        """
        values = self._holder(rounded, self.precision) or self.precision
        return values, _pays(weight, values), self.keeps(rounded)

    def keeps(self, rounded: Rounded | None) -> bool:
        """Whether `pack` stores a weight on the grid that it was `rounded` to."""
        return self._holder(rounded, self.precision) is not None

    def _holder(self, rounded: Rounded | None, values: Values) -> Values | None:
        """What keeps the grid of a weight where `values` are asked for; None: nothing does."""
        return self.grid.holder(rounded.bits, values) if self.grid and rounded else None

    def pack(
        self,
        name: str,
        weight: NDArray[np.float32],
        *,
        may_be_sparse: bool = True,
        planes: bool = False,
        precision: Values | None = None,
        rounded: Rounded | None = None,
    ) -> ir.Value:
        """The initializer `name` with `weight` [outputs, inputs] packed, sparse if that pays.

        A name is packed once. With `planes` as int8, whatever the `precision`, which is that of
        the others unless it is given. `rounded`: what it was rounded to, of no use to planes.
        """
        graph = self.model.graph
        if name not in self.packed:
            values = "int8" if planes else precision or self.precision
            scales, shared = None, SCALE_COLUMNS
            if not planes and (holder := self._holder(rounded, values)):
                assert rounded is not None
                assert self.grid is not None
                values, scales, shared = holder, rounded.scales, self.grid.group
            sparse = may_be_sparse and _pays(weight, values)
            try:
                block = pack.pack(
                    *(np.ascontiguousarray(weight), values, sparse),
                    planes=planes,
                    scales=scales,
                    scale_columns=shared,
                )
            except ValueError as error:
                raise BadInput(
                    f"{name.removesuffix('.packed')} cannot be packed: {error}.",
                    *(["Round the model again, or remove the grid."] if scales is not None else []),
                ) from None
            self.packed[name] = pack.read_header(block)
            self.on_grid += scales is not None
            graph.register_initializer(ir.val(name, const_value=ir.Tensor(block, name=name)))
        return graph.initializers[name]

    def keep(self, name: str, values: NDArray[np.float32]) -> ir.Value:
        """The initializer `name` with these `values` as they are."""
        if name not in self.model.graph.initializers:
            tensor = ir.Tensor(np.ascontiguousarray(values), name=name)
            self.model.graph.register_initializer(ir.val(name, const_value=tensor))
        return self.model.graph.initializers[name]

    def parts(self, weight: ir.Value | None) -> list[Rounded | None]:
        """What q, k and v were rounded to, where an initializer is all of them, and any was."""
        return [] if self.grid is None or weight is None else self.grid.parts(str(weight.name))

    def rounded(self, weight: ir.Value | None) -> Rounded | None:
        """What an initializer was rounded to, if it was."""
        return None if self.grid is None or weight is None else self.grid.of(str(weight.name))

    def replace(
        self,
        old: Sequence[ir.Node],
        kind: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any],
        outputs: Sequence[ir.Value] = (),
    ) -> None:
        """Put a node of type `kind` where the last of `old` stood and drop these.

        It makes what the last made, or `outputs`, and is called as the last was.
        """
        outputs = outputs or old[-1].outputs
        new = ir.node(kind, inputs, attributes, domain=DOMAIN, num_outputs=len(outputs))
        new.name = old[-1].name
        ir.convenience.replace_nodes_and_values(
            self.model.graph, old[-1], old, [new], outputs, new.outputs
        )


def _pays(weight: NDArray[np.float32], values: Values) -> bool:
    """Whether a weight has zeros enough to be stored sparse."""
    return TRAITS[values].pays(int(np.count_nonzero(weight)) / weight.size)


def constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    """The fp32 initializer `value`, read from its file only now; None if it is not one."""
    tensor = None if value is None else value.const_value
    return None if tensor is None or tensor.dtype != ir.DataType.FLOAT else onnx_file.read(tensor)


def maker(value: ir.Value | None, *kinds: str) -> ir.Node | None:
    """The node that makes `value`, if it is of one of these types."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type in kinds else None


def are_closed(nodes: Sequence[ir.Node]) -> bool:
    """Whether nothing but `nodes` reads what any of them but the last makes."""
    made = [value for node in nodes[:-1] for value in node.outputs]
    return not any(value.is_graph_output() for value in made) and set(nodes).issuperset(
        reader for value in made for reader in value.consumers()
    )
