"""Join SparseMatMul and CachedAttention nodes into operators that run many of them in one go.

A node by itself wakes the session's threads and lets them go again, some 150 times a token; a
`Program` keeps them from its first step to its last. Nodes that follow one another with nothing
foreign between them become one: in most models all of them, from the first block to the logits.
csrc/program.cpp describes the attributes that this module writes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import onnx
from onnx import TensorProto, helper

DOMAIN = "ai.owl"
_STEPS = ("SparseMatMul", "CachedAttention")
_EPILOGUES = {"": 0, "none": 0, "silu_mul": 1, "gelu_mul": 2}
_ABSENT = -1
_INPUT, _SLOT, _OUTPUT = range(3)
_FLOAT_OUTPUTS = 4  # values other than caches that nodes outside may read
_RANK = 3  # activations are [batch, length, width]


def join_programs(
    graph: onnx.GraphProto, weight_shape: Callable[[str], tuple[int, int]], head_size: int
) -> int:
    """Replace runs of nodes in `graph`; returns how many programs there are now.

    `weight_shape` gives (rows, columns) of a packed weight.
    """
    count = 0
    nodes: list[onnx.NodeProto] = []
    for run in _runs(graph):
        program = None
        if len(run) > 1:
            program = _Program(graph, run, weight_shape, head_size, f"/program/{count}").node()
        nodes.extend(run if program is None else [program])
        count += program is not None
    del graph.node[:]
    graph.node.extend(nodes)
    return count


def _runs(graph: onnx.GraphProto) -> Iterator[list[onnx.NodeProto]]:
    """The graph's nodes in an order that is as good, cut into runs that may become one node."""
    run: list[onnx.NodeProto] = []
    waiting: list[onnx.NodeProto] = []  # foreign nodes that need the run's results
    made: set[str] = set()  # by the run
    late: set[str] = set()  # by those that wait
    for node in graph.node:
        needs = {name for name in node.input if name}
        if node.op_type in _STEPS and node.domain == DOMAIN:
            if needs & late:
                yield run
                yield from ([foreign] for foreign in waiting)
                run, waiting, made, late = [], [], set(), set()
            run.append(node)
            made.update(node.output)
        elif needs & (made | late):
            waiting.append(node)
            late.update(node.output)
        else:
            yield [node]
    if run:
        yield run
    yield from ([foreign] for foreign in waiting)


@dataclass
class _Program:
    """One run of nodes on its way into one node."""

    graph: onnx.GraphProto
    run: list[onnx.NodeProto]
    weight_shape: Callable[[str], tuple[int, int]]
    head_size: int
    name: str
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=lambda: [""] * _FLOAT_OUTPUTS)
    slots: list[int] = field(default_factory=list)  # widths
    places: dict[str, int] = field(default_factory=dict)  # coded, of values that steps made

    def node(self) -> onnx.NodeProto | None:
        """The node, or None where the operator cannot take these nodes together."""
        caches = [name for node in self.run for name in _caches(node)]
        types = {value.name: value.type.tensor_type.elem_type for value in self.graph.output}
        kinds = {types.get(name) for name in caches}
        outside = self._read_outside()
        floats = [name for node in self.run for name in _floats(node) if name in outside]
        if len(kinds) > 1 or None in kinds or len(floats) > _FLOAT_OUTPUTS or not self._ranks_fit():
            return None
        self.outputs[: len(floats)] = floats
        self.places = {name: _code(i, _OUTPUT) for i, name in enumerate(floats)}
        steps: list[int] = []
        numbers: list[float] = []
        for at, node in enumerate(self.run):
            encode = self._matmul if node.op_type == "SparseMatMul" else self._attention
            record, floats_of_step = encode(node)
            steps += record
            numbers += floats_of_step
            self._release(at)
        fp32 = kinds == {TensorProto.FLOAT}
        return helper.make_node(
            "ProgramFp32" if fp32 else "ProgramFp16",
            self.inputs,
            self.outputs,
            name=self.name,
            domain=DOMAIN,
            steps=steps,
            numbers=numbers,
            slots=self.slots or [1],
        )

    def _matmul(self, node: onnx.NodeProto) -> tuple[list[int], list[float]]:
        x, weight, bias, skip, gamma = (*node.input, *[""] * 5)[:5]
        y, total = (*node.output, "")[:2]
        rows, columns = self.weight_shape(weight)
        epilogue = _EPILOGUES[_attribute(node, "epilogue", b"").decode()]
        outputs = _attribute(node, "columns", rows // 2 if epilogue else rows)
        read = [self._read(name) for name in (x, weight, bias, skip, gamma)]
        made = [self._make(y, outputs), self._make(total, columns)]
        return [0, *read, *made, epilogue, outputs], [_attribute(node, "epsilon", 0.0)]

    def _attention(self, node: onnx.NodeProto) -> tuple[list[int], list[float]]:
        heads = _attribute(node, "num_heads", 0)
        *first, mask = (*node.input, *[""] * 10)[:10]
        read = [self._read(name) for name in (*first, *([mask] if mask else []))]
        made = [self._make(node.output[0], heads * self.head_size)]
        for name in _caches(node):
            self.outputs.append(name)
            made.append(_code(len(self.outputs) - 1, _OUTPUT))
        settings = [
            heads,
            _attribute(node, "kv_num_heads", 0),
            _attribute(node, "local_window_size", -1),
            _attribute(node, "do_rotary", 0),
            _attribute(node, "rotary_interleaved", 0),
        ]
        numbers = [_attribute(node, "scale", 0.0), _attribute(node, "softcap", 0.0)]
        return [2 if mask else 1, *read, *made, *settings], numbers

    def _read(self, name: str) -> int:
        if not name:
            return _ABSENT
        if name in self.places:
            return self.places[name]
        if name not in self.inputs:
            self.inputs.append(name)
        return _code(self.inputs.index(name), _INPUT)

    def _make(self, name: str, width: int) -> int:
        """Where a step writes `name`: its output, or the free slot that fits best."""
        if not name:
            return _ABSENT
        if name not in self.places:
            taken = {code for code in self.places.values() if code % 4 == _SLOT}
            free = [i for i in range(len(self.slots)) if _code(i, _SLOT) not in taken]
            if not free:
                self.slots.append(width)
                free = [len(self.slots) - 1]
            slot = min(free, key=lambda i: (self.slots[i] < width, abs(self.slots[i] - width)))
            self.slots[slot] = max(self.slots[slot], width)
            self.places[name] = _code(slot, _SLOT)
        return self.places[name]

    def _release(self, at: int) -> None:
        """Free the slots of values that no step after number `at` reads."""
        needed = {name for node in self.run[at + 1 :] for name in node.input}
        for name, code in list(self.places.items()):
            if code % 4 == _SLOT and name not in needed:
                del self.places[name]

    def _read_outside(self) -> set[str]:
        inside = {id(node) for node in self.run}
        names = {value.name for value in self.graph.output}
        for node in self.graph.node:
            if id(node) not in inside:
                names.update(node.input)
        return names

    def _ranks_fit(self) -> bool:
        """Whether all activations from outside have the rank that the operator takes."""
        known = {
            value.name: len(value.type.tensor_type.shape.dim)
            for value in (*self.graph.value_info, *self.graph.input)
        }
        made = {name for node in self.run for name in node.output}
        read = (name for node in self.run for name in _activations(node) if name not in made)
        return all(known.get(name, _RANK) == _RANK for name in read)


def _floats(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.output if name and name not in _caches(node)]


def _caches(node: onnx.NodeProto) -> list[str]:
    return list(node.output[1:3]) if node.op_type == "CachedAttention" else []


def _activations(node: onnx.NodeProto) -> list[str]:
    if node.op_type == "CachedAttention":
        return [name for name in node.input[:3] if name]
    return [name for name in (node.input[0], *node.input[3:4]) if name]


def _code(index: int, place: int) -> int:
    return 4 * index + place


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:  # noqa: ANN401 - as in ONNX
    for attribute in node.attribute:
        if attribute.name == name:
            return helper.get_attribute_value(attribute)
    return default
