"""Operators joined into programs: the numbers of node by node; what is left out is refused."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.export.program import join_programs
from owl_deploy.inference.loading import LAST_LOGITS
from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.value_types import Values

from .conftest import FEW_THREADS, VALUES, Kernels, sparse_weight
from .test_edges import with_isa
from .test_native import RESIDENT

pytestmark = pytest.mark.usefixtures("kernels")
WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY = 96, 4, 2, 32, 80, 70
TOTAL, PAST = 40, 13
LEFT_OUT = r"ai\.owl: .*(left out|must be an initializer)"
NOT_OURS = "Input0 is absent, but not optional"  # ONNX Runtime refuses the first by itself
REFUSALS = tuple(
    getattr(onnxruntime.capi.onnxruntime_pybind11_state, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "RuntimeException")
)


def decoder(blocks: int, cache: int, values: Values = "fp32") -> onnx.ModelProto:
    """What `owl export` makes of a small model, node by node; a foreign node between two blocks."""
    weights = {}
    nodes = []
    floats = {"gamma": np.linspace(0.5, 1.5, WIDTH, dtype=np.float32)}

    def matmul(name: str, rows: int, cols: int, inputs: list[str], outputs: list[str], **extra):
        weight = sparse_weight(rows, cols, 0.6, seed=len(weights)) / np.float32(np.sqrt(cols))
        weights[name] = pack.pack(weight, values, sparse=name != "head")
        inputs = [inputs[0], name, *inputs[1:]]
        nodes.append(helper.make_node("SparseMatMul", inputs, outputs, domain="ai.owl", **extra))

    residual, update = "x", ""
    for i in range(blocks):
        norm = [residual, "", update, "gamma"]
        qkv_width = (HEADS + 2 * KV_HEADS) * SIZE
        after = f"r{i}" if update else ""
        matmul(
            f"qkv{i}", qkv_width, WIDTH, norm, [f"q{i}", after][: 2 if after else 1], epsilon=1e-5
        )
        residual = after or residual
        nodes.append(
            helper.make_node(
                "CachedAttention",
                [f"q{i}", "", "", f"pk{i}", f"pv{i}", "seqlens", "total", "cos", "sin"],
                [f"a{i}", f"k{i}", f"v{i}"],
                domain="ai.owl",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
                do_rotary=1,
            )
        )
        matmul(f"o{i}", WIDTH, HEADS * SIZE, [f"a{i}"], [f"o{i}.y"])
        norm = [residual, "", f"o{i}.y", "gamma"]
        gated = {"epilogue": "silu_mul", "columns": INNER}
        matmul(f"up{i}", 2 * INNER, WIDTH, norm, [f"u{i}", f"s{i}"], epsilon=1e-5, **gated)
        matmul(f"down{i}", WIDTH, INNER, [f"u{i}"], [f"d{i}"])
        residual, update = f"s{i}", f"d{i}"
        if i == 0 and blocks > 2:
            nodes.append(helper.make_node("Neg", [update], ["foreign"]))
            update = "foreign"
    matmul("head", VOCABULARY, WIDTH, [residual, "", update, "gamma"], ["logits"], epsilon=1e-5)
    angles = np.arange(TOTAL)[:, None] / 100.0 ** (np.arange(SIZE // 2) / (SIZE // 2))
    floats |= {"cos": np.cos(angles).astype(np.float32), "sin": np.sin(angles).astype(np.float32)}
    info = helper.make_tensor_value_info
    shape = [1, KV_HEADS, TOTAL, SIZE]
    inputs = [info("x", TensorProto.FLOAT, [1, "n", WIDTH])]
    inputs += [info(name, TensorProto.INT32, [1]) for name in ("seqlens", "total")]
    inputs += [info(f"p{kv}{i}", cache, shape) for i in range(blocks) for kv in "kv"]
    outputs = [info("logits", TensorProto.FLOAT, [1, "n", VOCABULARY])]
    outputs += [info(f"{kv}{i}", cache, shape) for i in range(blocks) for kv in "kv"]
    constants = [numpy_helper.from_array(array, name) for name, array in (weights | floats).items()]
    graph = helper.make_graph(nodes, "decoder", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def joined(model: onnx.ModelProto) -> tuple[onnx.ModelProto, int]:
    headers = {
        tensor.name: pack.read_header(numpy_helper.to_array(tensor))
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.UINT8
    }
    shapes = {name: (header.rows, header.cols) for name, header in headers.items()}
    copy = ir.from_proto(model)
    count = join_programs(copy.graph, shapes, SIZE)
    return ir.to_proto(copy), count


def run(
    model: onnx.ModelProto,
    length: int,
    past: int,
    threads: int = 2,
    mask: NDArray | None = None,
    tokens: NDArray | None = None,
) -> list[NDArray]:
    """What comes out; of rows with `tokens` only the last logits."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(LAST_LOGITS, "0" if tokens is None else "1")
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    rng = np.random.default_rng(5)
    feeds = {
        "x": rng.standard_normal((1, length, WIDTH)).astype(np.float32),
        "seqlens": np.array([past + length - 1], dtype=np.int32),
        "total": np.array([past + length], dtype=np.int32),
    }
    names = [value.name for value in session.get_inputs()]
    feeds = {name: value for name, value in feeds.items() if name in names}
    if "attention_mask" in names:
        mask = np.ones((1, past + length), np.int64) if mask is None else mask
        tokens = np.arange(length)[None] if tokens is None else tokens
        feeds |= {"attention_mask": mask, "input_ids": tokens}
        feeds["seqlens"][0] = mask.sum() - 1
    for value in session.get_inputs():
        if value.name in feeds:
            continue
        kind = np.float16 if "float16" in value.type else np.float32
        feeds[value.name] = rng.standard_normal(value.shape).astype(kind)
    return session.run(None, feeds)


@pytest.mark.parametrize(("length", "past"), [(1, PAST), (1, 0), (5, 0), (7, PAST)])
@pytest.mark.parametrize("cache", [TensorProto.FLOAT, TensorProto.FLOAT16])
@pytest.mark.parametrize(("blocks", "programs"), [(2, 1), (3, 2)])
def test_same_numbers_as_node_by_node(length, past, cache, blocks, programs):
    model = decoder(blocks, cache)
    together, count = joined(model)
    assert count == programs
    assert not any(node.op_type == "SparseMatMul" for node in together.graph.node)
    known = past + length
    for apart, one in zip(run(model, length, past), run(together, length, past), strict=True):
        valid = slice(None) if apart.ndim == 3 else (slice(None), slice(None), slice(known))
        np.testing.assert_array_equal(one[valid], apart[valid])


def layer(
    nodes: list[onnx.NodeProto], weights: dict[str, pack.Block], width: int
) -> onnx.ModelProto:
    """From x to y, both [1, n, width]."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, "n", width]) for name in "xy"
    )
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "layer", [x], [y], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def two_products() -> onnx.ModelProto:
    """A layer without attention."""
    weights = {
        "up": pack.pack(sparse_weight(2 * INNER, WIDTH, 0.6, seed=1), "fp32"),
        "down": pack.pack(sparse_weight(WIDTH, INNER, 0.6, seed=2), "fp32"),
    }
    gated = {"epilogue": "silu_mul", "columns": INNER}
    nodes = [
        helper.make_node("SparseMatMul", ["x", "up"], ["u"], domain="ai.owl", **gated),
        helper.make_node("SparseMatMul", ["u", "down"], ["y"], domain="ai.owl"),
    ]
    return layer(nodes, weights, WIDTH)


def test_a_program_without_a_cache():
    """Layers whose attention is not ours: empty outputs at a node's end are not written."""
    model = two_products()
    together, count = joined(model)
    assert count == 1
    np.testing.assert_array_equal(run(together, 3, 0)[0], run(model, 3, 0)[0])


def test_two_results_do_not_go_to_one_place():
    model, _ = joined(decoder(2, TensorProto.FLOAT))
    (steps,) = (a.ints for a in model.graph.node[0].attribute if a.name == "steps")
    # Block 0's second product, behind attention and its output's: 0, x, weight, bias, skip, gamma,
    # y, sum, epilogue, columns. The sum's place is the wider one.
    first = 10 + 18 + 10
    y, total = first + 6, first + 7
    assert steps[first] == 0
    assert steps[y] != steps[total] >= 0
    steps[y] = steps[total]
    with pytest.raises(REFUSALS, match="two results to one place"):
        run(model, 1, PAST)


def test_one_weight_for_two_steps():
    model = decoder(2, TensorProto.FLOAT)
    for node in model.graph.node:
        for at, name in enumerate(node.input):
            if name == "down1":
                node.input[at] = "down0"
    together, count = joined(model)
    assert count == 1
    for apart, one in zip(run(model, 5, 0)[:1], run(together, 5, 0)[:1], strict=True):
        np.testing.assert_array_equal(one, apart)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_view_of_a_file_that_was_written_to_keeps_what_it_holds(tmp_path):
    """The engine gives a view's pages back once it has copied them: these would be the file's."""
    model, _ = joined(two_products())
    (tensor,) = (one for one in model.graph.initializer if one.name == "up")
    block = numpy_helper.to_array(tensor)
    assert block.size > 4 * mmap.PAGESIZE
    (tmp_path / "weights").write_bytes(bytes(block.size))
    view = np.memmap(tmp_path / "weights", np.uint8, "c")
    view[:] = block
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    held = onnxruntime.OrtValue.ortvalue_from_numpy(np.asarray(view))
    options.add_initializer("up", held)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    np.testing.assert_array_equal(view, block)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_long_prompts_slots_are_given_back(tmp_path):
    model, count = joined(two_products())
    assert count == 1
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    code = f"""{RESIDENT}
import sys
import numpy as np, onnxruntime
from owl_deploy.runtime import library_path
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.enable_cpu_mem_arena = options.enable_mem_pattern = False
options.register_custom_ops_library(str(library_path()))
session = onnxruntime.InferenceSession(sys.argv[1], options)
x = np.ones((1, 100000, {WIDTH}), np.float32)
session.run(None, {{"x": x[:, :1]}})
before = resident()
session.run(None, {{"x": x}})  # 32 MB of slots and as much prepared
print(resident() - before)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "m.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 25


TWICE = f"""{RESIDENT}
import sys
import numpy as np, onnxruntime
from owl_deploy.runtime import library_path
options = onnxruntime.SessionOptions()
options.log_severity_level = 4
options.register_custom_ops_library(str(library_path()))
sizes, results = [], []
for path in sys.argv[1:]:
    before = resident()
    session = onnxruntime.InferenceSession(path, options)
    sizes.append(resident() - before)
    x = np.random.default_rng(5).standard_normal((1, 21, session.get_inputs()[0].shape[2]))
    for rows in (1, 5, 21):
        results.append(session.run(None, {{"x": x[:, :rows].astype(np.float32)}})[0])
for apart, together in zip(results[:3], results[3:], strict=True):
    np.testing.assert_array_equal(together, apart)
print(sizes[1])
"""


def twice(weight: NDArray[np.float32], values: Values) -> onnx.ModelProto:
    """A square weight, and once more."""
    nodes = [
        helper.make_node("SparseMatMul", [source, "w"], [result], domain="ai.owl")
        for source, result in ("xu", "uy")
    ]
    return layer(nodes, {"w": pack.pack(weight, values)}, len(weight))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
@pytest.mark.parametrize(
    ("isa", "sparsity"), [("avx2", 0.5), ("avxvnni", 0.5), ("avx512f", 0.5), ("avx2", 0.95)]
)
@pytest.mark.parametrize("values", ["int4", "int3"])
def test_it_lies_dense_where_it_is_faster_so(
    kernels: Kernels, isa: str, values: Values, sparsity: float, tmp_path: Path
) -> None:
    """16.8 M weights, 6.6 or 5 MB at 50 % and 2.5 at 95 %, are 8.9 dense: the same bits of rows."""
    if isa not in kernels.isas():
        pytest.skip(f"{isa} was not built or does not run on this processor")
    model = twice(sparse_weight(4095, 4095, sparsity), values)
    together, count = joined(model)
    assert count == 1
    paths = [tmp_path / "apart.onnx", tmp_path / "together.onnx"]
    for path, form in zip(paths, (model, together), strict=True):
        path.write_bytes(form.SerializeToString())
    sizes = []
    for name in (isa, "portable"):
        done = with_isa(name, "-c", TWICE, *map(str, paths))
        assert done.returncode == 0, done.stderr
        sizes.append(float(done.stdout))
    dense = sparsity < 0.9 and len(os.sched_getaffinity(0)) <= FEW_THREADS
    assert (sizes[0] - sizes[1] > 1.8) == dense, sizes


def with_mask(model: onnx.ModelProto) -> onnx.ModelProto:
    """`decoder`'s model with the attention mask at every attention."""
    for node in model.graph.node:
        if node.op_type == "CachedAttention":
            node.input.append("attention_mask")
    for name, length in (("attention_mask", "t"), ("input_ids", "n")):
        value = helper.make_tensor_value_info(name, TensorProto.INT64, [1, length])
        model.graph.input.append(value)
    return model


def test_a_program_sees_the_mask():
    """Padding in front of a prompt; without the mask it would be at its end."""
    model = with_mask(decoder(2, TensorProto.FLOAT))
    mask = np.array([[0, 0, 0, 1, 1]])
    apart, together = (run(m, 5, 0, mask=mask)[0] for m in (model, joined(model)[0]))
    np.testing.assert_array_equal(together[:, 3:], apart[:, 3:])
    assert np.abs(together[:, 3:] - run(model, 5, 0)[0][:, 3:]).max() > 0.01


@pytest.mark.parametrize(("blocks", "programs"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("equals", [0, 1, 16, 17, 30])
def test_the_last_logits_and_those_before_equal_tokens(blocks, programs, equals):
    """The head's program need not begin with the tokens' embedding: rows of its input may differ
    where tokens are equal."""
    model, count = joined(with_mask(decoder(blocks, TensorProto.FLOAT)))
    assert count == programs
    tokens = np.arange(40)[None]
    tokens[:, 40 - equals :] = 7
    every, some = (run(model, 40, 0, tokens=one)[0][0] for one in (None, tokens))
    wanted = [*range(24, 40), *([39 - equals] if equals > 16 else [])]
    np.testing.assert_allclose(some[wanted], every[wanted], atol=1e-5)


@pytest.mark.parametrize(
    ("cut", "words"), [("output", LEFT_OUT), ("input", rf"{LEFT_OUT}|{NOT_OURS}")]
)
def test_what_a_step_needs_cannot_be_left_out(cut, words):
    """One empty name in the graph: it was once written through null."""
    model, _ = joined(decoder(2, TensorProto.FLOAT))
    node = model.graph.node[0]
    names = getattr(node, cut)
    for at, name in enumerate(names):
        if not name:
            continue
        broken = onnx.ModelProto()
        broken.CopyFrom(model)
        getattr(broken.graph.node[0], cut)[at] = ""
        for value in [v for v in broken.graph.output if cut == "output" and v.name == name]:
            broken.graph.output.remove(value)
        with pytest.raises(REFUSALS, match=words):
            run(broken, 1, PAST)


@pytest.mark.parametrize("values", VALUES[1:])
def test_thread_count_changes_no_bit(values):
    model, _ = joined(decoder(2, TensorProto.FLOAT16, values))
    first = run(model, 1, PAST, threads=1)[0]
    for threads in (2, 3, 8):
        np.testing.assert_array_equal(run(model, 1, PAST, threads)[0], first)


def test_a_weight_may_have_two_readers_and_activations_other_ranks():
    model = decoder(2, TensorProto.FLOAT)
    model.graph.input[0].type.tensor_type.shape.dim.add().dim_value = 1  # [1, n, width, 1]
    assert joined(model)[1] == 0
