"""Join SparseMatMul and CachedAttention nodes into operators that run many of them in one go.

A node by itself wakes the session's threads and lets them go again, some 150 times a token; a
`Program` keeps them from its first step to its last. Nodes that follow one another with nothing
foreign between them become one: in most models all of them, from the first block to the logits.
csrc/program.cpp describes the attributes that this module writes.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from owl_deploy.export.rewriter import DOMAIN

_STEPS = ("SparseMatMul", "CachedAttention")
_EPILOGUES = {"": 0, "none": 0, "silu_mul": 1, "gelu_mul": 2}
_ABSENT = -1
_INPUT, _SLOT, _OUTPUT = range(3)
_FLOAT_OUTPUTS = 4  # values other than caches that nodes outside may read
LOGITS = "logits"  # the attribute that names the output of the head
_TOLD_BY = {"tokens": "input_ids", "mask": "attention_mask"}  # attributes with it: graph inputs
_RANK = 3  # activations are [batch, length, width]


def join_programs(
    graph: ir.Graph, weight_shapes: Mapping[str, tuple[int, int]], head_size: int
) -> int:
    """Replace runs of nodes in `graph`; returns how many programs there are now.

    `weight_shapes`: (rows, columns) of each packed weight.
    """
    count = 0
    told_by = {value.name: value for value in graph.inputs}
    for run in list(_runs(graph)):
        node = _Program(run, weight_shapes, head_size, told_by).node()
        if node and (len(run) > 1 or LOGITS in node.attributes):
            node.name = f"/program/{count}"
            made = [value for value in node.outputs if value.name]
            old = {value.name: value for step in run for value in step.outputs}
            ir.convenience.replace_nodes_and_values(
                graph, run[-1], run, [node], [old[value.name] for value in made], made
            )
            count += 1
    graph.sort()  # what needs a program's results may have stood among its nodes
    return count


def knows_logits(graph: ir.Graph) -> bool:
    """Whether a program of `graph` ends in its logits, so that it can leave some of them out."""
    return any(LOGITS in node.attributes for node in graph if node.domain == DOMAIN)


def _runs(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Steps in graph order that may become one: no foreign node lies between any two of a run."""
    run: list[ir.Node] = []
    made: set[ir.Value] = set()  # by the run
    late: set[ir.Value] = set()  # by foreign nodes that need its results
    for node in graph:
        needs = set(filter(None, node.inputs))
        if node.op_type in _STEPS and node.domain == DOMAIN:
            if needs & late:
                yield run
                run, made, late = [], set(), set()
            run.append(node)
            made.update(node.outputs)
        elif needs & (made | late):
            late.update(node.outputs)
    yield run


@dataclass
class _Program:
    """One run of nodes on its way into one node."""

    run: list[ir.Node]
    weight_shapes: Mapping[str, tuple[int, int]]
    head_size: int
    graph_inputs: Mapping[str | None, ir.Value]
    inputs: list[ir.Value] = field(default_factory=list)
    outputs: list[ir.Value | None] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)  # widths
    places: dict[ir.Value, int] = field(default_factory=dict)  # coded, of values that steps made

    def node(self) -> ir.Node | None:
        """The node, or None where the operator cannot take these nodes together."""
        caches = [value for node in self.run for value in _caches(node)]
        kinds = {value.dtype if value.is_graph_output() else None for value in caches}
        floats = [value for node in self.run for value in _floats(node) if self._leaves(value)]
        if len(kinds) > 1 or None in kinds or len(floats) > _FLOAT_OUTPUTS or not self._ranks_fit():
            return None
        # Those that are not there come first: at the end of a node they would not be written.
        absent = _FLOAT_OUTPUTS - len(floats)
        self.outputs = [*[None] * absent, *floats]
        self.places = {value: _code(absent + i, _OUTPUT) for i, value in enumerate(floats)}
        steps: list[int] = []
        numbers: list[float] = []
        for at, node in enumerate(self.run):
            encode = self._matmul if node.op_type == "SparseMatMul" else self._attention
            record, floats_of_step = encode(node)
            steps += record
            numbers += floats_of_step
            self._release(at)
        last = self._last_logits()
        return ir.node(
            "ProgramFp32" if kinds == {ir.DataType.FLOAT} else "ProgramFp16",
            self.inputs,
            {"steps": steps, "numbers": numbers, "slots": self.slots or [1], **last},
            domain=DOMAIN,
            outputs=[ir.val(value.name if value else "") for value in self.outputs],
        )

    def _last_logits(self) -> dict[str, int]:
        """The attributes by which logits may be left out that only the graph's caller reads."""
        if not self.graph_inputs.keys() >= set(_TOLD_BY.values()):
            return {}
        heads = [node.outputs[0] for node in self.run if node.op_type == "SparseMatMul"]
        for index, value in enumerate(self.outputs):
            if value and value in heads and value.is_graph_output() and not value.consumers():
                told_by = {key: self.graph_inputs[name] for key, name in _TOLD_BY.items()}
                return {LOGITS: index} | {key: self._input(one) for key, one in told_by.items()}
        return {}

    def _matmul(self, node: ir.Node) -> tuple[list[int], list[float]]:
        x, weight, bias, skip, gamma = (*node.inputs, *[None] * 5)[:5]
        y, total = (*node.outputs, None)[:2]
        assert weight is not None
        rows, columns = self.weight_shapes[str(weight.name)]
        epilogue = _EPILOGUES[node.attributes.get_string("epilogue", "")]
        outputs = node.attributes.get_int("columns", rows // 2 if epilogue else rows)
        read = [self._read(value) for value in (x, weight, bias, skip, gamma)]
        made = [self._make(y, outputs), self._make(total, columns)]
        return [0, *read, *made, epilogue, outputs], [node.attributes.get_float("epsilon", 0.0)]

    def _attention(self, node: ir.Node) -> tuple[list[int], list[float]]:
        number = node.attributes.get_int
        heads = number("num_heads", 0)
        *first, mask = (*node.inputs, *[None] * 10)[:10]
        read = [self._read(value) for value in (*first, *([mask] if mask else []))]
        made = [self._make(node.outputs[0], heads * self.head_size)]
        for value in _caches(node):
            self.outputs.append(value)
            made.append(_code(len(self.outputs) - 1, _OUTPUT))
        settings = [
            heads,
            number("kv_num_heads", 0),
            number("local_window_size", -1),
            number("do_rotary", 0),
            number("rotary_interleaved", 0),
        ]
        numbers = [node.attributes.get_float(name, 0.0) for name in ("scale", "softcap")]
        return [2 if mask else 1, *read, *made, *settings], numbers

    def _read(self, value: ir.Value | None) -> int:
        if value is None:
            return _ABSENT
        if value in self.places:
            return self.places[value]
        return _code(self._input(value), _INPUT)

    def _input(self, value: ir.Value) -> int:
        if value not in self.inputs:
            self.inputs.append(value)
        return self.inputs.index(value)

    def _make(self, value: ir.Value | None, width: int) -> int:
        """Where a step writes `value`: its output, or the free slot that fits best."""
        if value is None or not value.name:
            return _ABSENT
        if value not in self.places:
            taken = {code for code in self.places.values() if code % 4 == _SLOT}
            free = [i for i in range(len(self.slots)) if _code(i, _SLOT) not in taken]
            if not free:
                self.slots.append(width)
                free = [len(self.slots) - 1]
            slot = min(free, key=lambda i: (self.slots[i] < width, abs(self.slots[i] - width)))
            self.slots[slot] = max(self.slots[slot], width)
            self.places[value] = _code(slot, _SLOT)
        return self.places[value]

    def _release(self, at: int) -> None:
        """Free the slots of values that no step after number `at` reads."""
        needed = {value for node in self.run[at + 1 :] for value in node.inputs}
        for value, code in list(self.places.items()):
            if code % 4 == _SLOT and value not in needed:
                del self.places[value]

    def _leaves(self, value: ir.Value) -> bool:
        """Whether a node outside, or who runs the graph, reads `value`."""
        return value.is_graph_output() or not set(self.run).issuperset(value.consumers())

    def _ranks_fit(self) -> bool:
        """Whether all activations from outside have the rank that the operator takes."""
        read = {value for node in self.run for value in _activations(node) if value}
        read -= {value for node in self.run for value in node.outputs}
        return all(value.shape is None or len(value.shape) == _RANK for value in read)


def _floats(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if value.name and value not in _caches(node)]


def _caches(node: ir.Node) -> Sequence[ir.Value]:
    return node.outputs[1:3] if node.op_type == "CachedAttention" else ()


def _activations(node: ir.Node) -> Sequence[ir.Value | None]:
    if node.op_type == "CachedAttention":
        return node.inputs[:3]
    return (node.inputs[0], *node.inputs[3:4])


def _code(index: int, place: int) -> int:
    return 4 * index + place
