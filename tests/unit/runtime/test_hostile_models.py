"""Mutated models of every operator: each is refused or runs, and nothing outside is touched.

A mutant changes attributes, leaves out inputs and outputs, changes the dimensions of inputs and
initializers, or a packed weight's bytes. They run in a child process, since a crash ends it; it
writes each seed before it runs it. OWL_MUTANTS says how many; seeds from OWL_FIRST_MUTANT on.
"""

import functools
import os
import random
import subprocess
import sys
from collections.abc import MutableSequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.inference.loading import LAST_LOGITS
from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.value_types import Values

from .conftest import VALUES, sparse_weight
from .test_program import SIZE, TOTAL, decoder, joined, with_mask

NUMBERS = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 8, 9, 16, 17, 48, 63, 400, 401, 402, 4097)
NUMBERS += (2**20, 2**28, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
FLOATS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e-45, 3e38)
MODULE = "tests.unit.runtime.test_hostile_models"
# A dimension that asks for more is refused by the allocator of ONNX Runtime, or ends the process
# for want of memory: neither is the operators' doing.
EXTENTS = (0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 95, 97, 1000)
LENGTHS = (-(2**31), -2, -1, 0, 1, 2, 7, 12, 13, 14, 19, 20, 21, 1000, 2**31 - 1)

_TYPES = {
    TensorProto.FLOAT: np.float32,
    TensorProto.FLOAT16: np.float16,
    TensorProto.INT32: np.int32,
    TensorProto.INT64: np.int64,
}


@functools.cache
def base_model(
    blocks: int, cache: int, values: Values, *, mask: bool, program: bool
) -> onnx.ModelProto:
    """A small decoder, as nodes or as a program."""
    model = decoder(blocks, cache, values)
    if mask:
        model = with_mask(model)
    return joined(model)[0] if program else model


def whole_model(dice: random.Random) -> onnx.ModelProto:
    """A decoder to mutate; some have an embedding before their first layer."""
    cache = dice.choice([TensorProto.FLOAT, TensorProto.FLOAT16])
    program = dice.random() < 0.6
    model = onnx.ModelProto()
    model.CopyFrom(
        base_model(
            dice.choice([1, 2]),
            cache,
            dice.choice(VALUES),
            mask=dice.random() < 0.5,
            program=program,
        )
    )
    if not program and dice.random() < 0.4:
        table = pack.pack(sparse_weight(50, 96, 0.0), dice.choice(VALUES), sparse=False)
        model.graph.initializer.append(numpy_helper.from_array(table, "table"))
        node = helper.make_node("PackedGather", ["ids", "table"], ["x"], domain="ai.owl")
        model.graph.node.insert(0, node)
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1, "n"])
        model.graph.input[0].CopyFrom(ids)
    return model


# ---- Mutations -----------------------------------------------------------------------------------


def change_attribute(dice: random.Random, model: onnx.ModelProto) -> None:
    """One number of an attribute, its end cut off, its name, or its type."""
    nodes = [node for node in model.graph.node if node.attribute and node.domain]
    attribute = dice.choice(dice.choice(nodes).attribute)
    numbers = attribute.ints or attribute.floats
    choices = NUMBERS if attribute.ints else FLOATS
    if dice.random() < 0.05:
        attribute.name = "other"
    elif dice.random() < 0.05:
        value = dice.choice([1, 0.5, "silu_mul", [1, 2], [0.5]])
        attribute.CopyFrom(helper.make_attribute(attribute.name, value))
    elif numbers and dice.random() < 0.1:
        del numbers[dice.randrange(len(numbers)) :]
    elif numbers:
        at = dice.randrange(len(numbers))
        near = attribute.ints and abs(numbers[at]) < 2**32 and dice.random() < 0.4
        change = dice.choice([-4, -1, 1, 4, 5])
        numbers[at] = numbers[at] + change if near else dice.choice(choices)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = dice.choice(NUMBERS)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = dice.choice(FLOATS)
    else:
        attribute.s = dice.choice([b"gelu_mul", b"silu_mul", b"none", b"", b"x" * 99])


def some_names(dice: random.Random, model: onnx.ModelProto) -> MutableSequence[str]:
    """The inputs or the outputs of one of our nodes, of those that have any."""
    nodes = [node for node in model.graph.node if node.domain]
    return dice.choice([names for node in nodes for names in (node.input, node.output) if names])


def leave_out(dice: random.Random, model: onnx.ModelProto) -> None:
    """An input or an output, by an empty name or by the end of the list."""
    names = some_names(dice, model)
    at = dice.randrange(len(names))
    gone = names[at]
    if dice.random() < 0.8:
        names[at] = ""
    else:
        del names[at:]
    # What nobody makes any more cannot be an output of the model: it would be refused for that.
    made = dict.fromkeys(name for node in model.graph.node for name in node.output)
    for value in [v for v in model.graph.output if v.name == gone or v.name not in made]:
        model.graph.output.remove(value)
    if not model.graph.output:
        kept = next((name for name in made if name), "x")
        model.graph.output.append(helper.make_tensor_value_info(kept, TensorProto.FLOAT, None))


def swap_values(dice: random.Random, model: onnx.ModelProto) -> None:
    """Another value of the graph where a node read or wrote one."""
    names = some_names(dice, model)
    known = [name for node in model.graph.node for name in (*node.input, *node.output)]
    names[dice.randrange(len(names))] = dice.choice(known)


def reshape_constant(dice: random.Random, model: onnx.ModelProto) -> None:
    """Other dimensions of an initializer that is no packed weight: gamma, rotary tables."""
    tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    tensor = dice.choice(tensors)
    dims = [dice.choice([0, 1, 15, 16, 20, 95, 97]) for _ in range(dice.randrange(4))]
    if dice.random() < 0.3 and len(tensor.dims) == 2:
        dims = list(reversed(tensor.dims))
    array = np.ones(dims, dtype=np.float32)
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_weight(dice: random.Random, model: onnx.ModelProto) -> None:
    """Bytes of a packed weight, a whole field of its header, or its length."""
    tensors = [t for t in model.graph.initializer if t.data_type == TensorProto.UINT8]
    tensor = dice.choice(tensors)
    block = numpy_helper.to_array(tensor).copy()
    kind = dice.randrange(4)
    if kind == 0:
        field = dice.randrange(8, 104, 4)
        wide = dice.choice(NUMBERS) if dice.random() < 0.5 else dice.randrange(300)
        block[field : field + 4] = np.frombuffer((wide % 2**32).to_bytes(4, "little"), np.uint8)
    elif kind == 1:
        for _ in range(3):
            block[dice.randrange(len(block))] = dice.randrange(256)
    elif kind == 2:
        block = block[: dice.randrange(len(block))].copy()
    else:
        block = numpy_helper.to_array(dice.choice(tensors)).copy()
    tensor.CopyFrom(numpy_helper.from_array(block, tensor.name))


def loosen(dice: random.Random, model: onnx.ModelProto) -> None:
    """Inputs of any shape and rank: what `feed` changes is for the operators to refuse."""
    del dice
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")


MUTATIONS = (
    change_attribute,
    change_attribute,
    leave_out,
    swap_values,
    reshape_constant,
    change_weight,
    loosen,
)


def feed(dice: random.Random, model: onnx.ModelProto, length: int, past: int, *, wild: bool):
    """Inputs that fit, and with `wild` one of them with other dimensions or lengths."""
    good = {
        "x": np.ones((1, length, 96), np.float32),
        "ids": np.ones((1, length), np.int64),
        "seqlens": np.array([past + length - 1], np.int32),
        "total": np.array([past + length], np.int32),
        "attention_mask": np.ones((1, past + length), np.int64),
        "input_ids": np.ones((1, length), np.int64),
    }
    result = {}
    for value in model.graph.input:
        kind = _TYPES[value.type.tensor_type.elem_type]
        result[value.name] = good.get(value.name, np.ones((1, 2, TOTAL, SIZE), kind)).astype(kind)
    if not wild:
        return result
    name = dice.choice(list(result))
    if dice.random() < 0.5 and name in ("seqlens", "total", "ids", "attention_mask", "input_ids"):
        number = dice.choice(LENGTHS)
        # Caches as long as `total`: beyond this the process ends for want of memory.
        result[name].flat[dice.randrange(result[name].size)] = (
            min(number, 5000) if name == "total" else number
        )
        return result
    dims = list(result[name].shape)
    if dice.random() < 0.25:
        dims = dims[1:] if dice.random() < 0.5 else [*dims, 1]
    else:
        dims[dice.randrange(len(dims))] = dice.choice(EXTENTS)
    result[name] = np.ones(dims, result[name].dtype)
    return result


def mutant(dice: random.Random) -> onnx.ModelProto:
    """A small model with one to three mutations."""
    model = whole_model(dice)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        dice.choice(MUTATIONS)(dice, model)
    return model


def run_mutant(seed: int) -> str:
    """Make a mutant and run it; what refused it, or nothing."""
    dice = random.Random(seed)
    model = mutant(dice)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = dice.choice([1, 2])
    options.add_session_config_entry(LAST_LOGITS, dice.choice("01"))
    options.register_custom_ops_library(str(library_path()))
    length, past = dice.choice([(1, 13), (4, 13), (1, 0), (5, 0), (30, 0)])
    inputs = feed(dice, model, length, past, wild=dice.random() < 0.4)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        names = {value.name for value in session.get_inputs()}
        session.run(None, {name: array for name, array in inputs.items() if name in names})
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(first: int, count: int, progress: Path) -> None:
    """In the child: the seeds from `first` on, each noted before it runs."""
    refused = ours = 0
    with progress.open("w") as file:
        for seed in range(first, first + count):
            file.seek(0)
            file.write(f"{seed:12}")
            file.flush()
            words = run_mutant(seed)
            refused += bool(words)
            ours += "ai.owl: " in words
    sys.stdout.write(f"{count} {refused} {ours}\n")


@pytest.mark.usefixtures("kernels")
@pytest.mark.timeout(7200)
def test_no_mutant_crashes(tmp_path):
    first = int(os.environ.get("OWL_FIRST_MUTANT", "0"))
    count = int(os.environ.get("OWL_MUTANTS", "400"))
    progress = tmp_path / "seed"
    progress.write_text("none")
    done = subprocess.run(
        [sys.executable, "-m", MODULE, str(first), str(count), str(progress)],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "OWL_RUNTIME_LIBRARY": str(library_path())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"seed {progress.read_text().strip()}: {done.stderr[-8000:]}"
    ran, refused, ours = map(int, done.stdout.split())
    # Otherwise the mutations would try nothing, or only what ONNX Runtime refuses by itself.
    assert ran == count
    assert count // 10 < ours <= refused < count
    sys.stdout.write(f"{ran} mutants: {refused} refused, {ours} of them by the operators\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
