"""The operators in stock ONNX Runtime: right results, clear errors for hostile weights."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.value_types import Values

from .conftest import VALUES, Kernels, sparse_weight
from .test_attention import rotary_tables


def model_of(block: NDArray[np.uint8], cols: int) -> onnx.ModelProto:
    """x [n, cols] -> SparseMatMul."""
    node = helper.make_node("SparseMatMul", ["x", "w"], ["y"], domain="ai.owl")
    graph = helper.make_graph(
        [node],
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", cols])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "m"])],
        [numpy_helper.from_array(block, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model, check_custom_domain=False)
    return model


def session(block: NDArray[np.uint8], cols: int, threads: int = 1) -> onnxruntime.InferenceSession:
    """That model, opened."""
    return opened(model_of(block, cols), threads)


def opened(model: onnx.ModelProto, threads: int = 1) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("rows", [1, 5])
def test_runs_in_onnxruntime(rows: int) -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "fp32")
    x = np.random.default_rng(0).standard_normal((rows, 96)).astype(np.float32)
    y = session(block, 96).run(None, {"x": x})[0]
    np.testing.assert_allclose(y, x @ pack.unpack(block).T, atol=1e-4)


@pytest.mark.usefixtures("kernels")
def test_hostile_weight_is_refused_when_the_session_opens() -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "int8").copy()
    block[pack.inspect(block).mask_offset] ^= 1
    with pytest.raises(Exception, match=r"ai\.owl: packed weight"):
        session(block, 96)


def test_wrong_width_is_refused(kernels: Kernels) -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "bf16")
    with pytest.raises(Exception, match="last dimension"):
        session(block, 95).run(None, {"x": np.zeros((1, 95), dtype=np.float32)})


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "value"),
    [("epilogue", 1), ("epilogue", [0.5]), ("columns", 50.0), ("columns", [50]), ("epsilon", "0")],
)
def test_an_attribute_of_another_type_is_refused(name: str, value: object) -> None:
    """Not taken for one that is left out, whose default it would get."""
    model = model_of(pack.pack(sparse_weight(50, 96, 0.7), "fp32"), 96)
    model.graph.node[0].attribute.append(helper.make_attribute(name, value))
    with pytest.raises(Exception, match=rf"ai\.owl: attribute {name} has the wrong type"):
        opened(model)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("rows", [1, 70])
def test_no_thread_count_of_the_session_changes_a_bit(values: Values, rows: int) -> None:
    block = pack.pack(sparse_weight(900, 260, 0.7), values)
    x = np.random.default_rng(0).standard_normal((rows, 260)).astype(np.float32)
    first = session(block, 260).run(None, {"x": x})[0]
    for threads in (2, 3, 5, 8):
        again = session(block, 260, threads).run(None, {"x": x})[0]
        np.testing.assert_array_equal(again, first)


@pytest.mark.usefixtures("kernels")
def test_no_rows_give_no_rows() -> None:
    block = pack.pack(sparse_weight(50, 96, 0.7), "int8")
    y = session(block, 96).run(None, {"x": np.zeros((0, 96), dtype=np.float32)})[0]
    assert y.shape == (0, 50)


# ---- Hostile models ------------------------------------------------------------------------------


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("values", VALUES)
def test_no_damaged_weight_crashes_a_session(values: Values) -> None:
    """Each damage is refused by name, or harmless; the header's fields are refused."""
    rng = np.random.default_rng(0)
    whole = pack.pack(sparse_weight(40, 150, 0.6), values)
    refused = []
    for turn in range(60):
        block = whole.copy()
        places = rng.integers(0, 128 if turn % 2 else block.size, 3)
        block[places] = rng.integers(0, 256, 3)
        if turn % 3 == 0:
            block = block[: rng.integers(0, block.size)]
        try:
            session(block, 150).run(None, {"x": np.ones((2, 150), dtype=np.float32)})
        except Exception as error:
            refused.append(str(error))
    assert len(refused) >= 30
    assert all("ai.owl: " in words for words in refused)


@pytest.mark.usefixtures("kernels")
def test_a_truncated_data_file_is_refused(tmp_path: Path) -> None:
    model = model_of(pack.pack(sparse_weight(64, 96, 0.7), "bf16"), 96)
    onnx.save(
        model, tmp_path / "m.onnx", save_as_external_data=True, size_threshold=0, location="d"
    )
    data = (tmp_path / "d").read_bytes()
    for size in (len(data) - 64, 100, 0):
        (tmp_path / "d").write_bytes(data[:size])
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.register_custom_ops_library(str(library_path()))
        with pytest.raises(Exception, match=r"out of bounds|external|size|ai\.owl"):
            onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), options)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("token", [-1, 50, 2**40, -(2**63)])
def test_a_token_outside_the_vocabulary_is_refused(token: int) -> None:
    block = pack.pack(sparse_weight(50, 32, 0.0), "int8", sparse=False)
    gather = gather_of(block)
    rows = gather.run(None, {"ids": np.array([[0, 49]])})[0]
    np.testing.assert_array_equal(rows[0], pack.unpack(block)[[0, 49]])
    with pytest.raises(Exception, match="outside the vocabulary"):
        gather.run(None, {"ids": np.array([[0, token]])})


@pytest.mark.usefixtures("kernels")
def test_a_sparse_table_is_refused() -> None:
    with pytest.raises(Exception, match="without a mask"):
        gather_of(pack.pack(sparse_weight(50, 32, 0.5), "int8"))


def gather_of(block: NDArray[np.uint8]) -> onnxruntime.InferenceSession:
    """ids [b, n] -> PackedGather."""
    graph = helper.make_graph(
        [helper.make_node("PackedGather", ["ids", "w"], ["y"], domain="ai.owl")],
        "test",
        [helper.make_tensor_value_info("ids", TensorProto.INT64, ["b", "n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", "m"])],
        [numpy_helper.from_array(block, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    return opened(helper.make_model(graph, opset_imports=opsets, ir_version=10))


HEADS, KV, SIZE, POSITIONS = 4, 2, 16, 64


def attention(mask: str = "", **others: object) -> onnxruntime.InferenceSession:
    """Packed queries, keys and values against a cache of fp32, with rotary tables; a `mask`.

    `others`: further attributes.
    """
    floats = {
        "q": ["b", "n", "w"],
        "past_k": ["b", "h", "p", "d"],
        "past_v": ["b", "h", "p", "d"],
    }
    whole = {"lengths": ["b"], "total": []}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, d) for n, d in floats.items()]
    inputs += [helper.make_tensor_value_info(n, TensorProto.INT32, d) for n, d in whole.items()]
    if mask:
        inputs.append(helper.make_tensor_value_info(mask, TensorProto.INT64, ["b", "t"]))
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", "n", "o"]),
        helper.make_tensor_value_info("k", TensorProto.FLOAT, ["b", "h", "q", "d"]),
        helper.make_tensor_value_info("v", TensorProto.FLOAT, ["b", "h", "q", "d"]),
    ]
    node = helper.make_node(
        "CachedAttention",
        ["q", "", "", "past_k", "past_v", "lengths", "total", "cos", "sin", mask],
        ["y", "k", "v"],
        domain="ai.owl",
        num_heads=HEADS,
        kv_num_heads=KV,
        do_rotary=1,
        **others,
    )
    tables = [
        numpy_helper.from_array(table, name)
        for name, table in zip(("cos", "sin"), rotary_tables(POSITIONS, SIZE), strict=True)
    ]
    graph = helper.make_graph([node], "test", inputs, outputs, tables)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("ai.owl", 1)]
    return opened(helper.make_model(graph, opset_imports=opsets, ir_version=10))


def feeds(**changes: NDArray[np.generic]) -> dict[str, NDArray[np.generic]]:
    """One new token behind ten."""
    cache = np.ones((1, KV, 10, SIZE), dtype=np.float32)
    good = {
        "q": np.ones((1, 1, (HEADS + 2 * KV) * SIZE), dtype=np.float32),
        "past_k": cache,
        "past_v": cache,
        "lengths": np.array([10], dtype=np.int32),
        "total": np.array(11, dtype=np.int32),
    }
    return good | changes


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lengths", np.array([11], dtype=np.int32)),
        ("lengths", np.array([2**31 - 1], dtype=np.int32)),
        ("lengths", np.array([-5], dtype=np.int32)),
        ("lengths", np.array([10, 10], dtype=np.int32)),
        ("lengths", np.array([], dtype=np.int32)),
        ("total", np.array(-1, dtype=np.int32)),
        ("q", np.ones((1, 1, 16), dtype=np.float32)),
        ("q", np.ones((2, 1, (HEADS + 2 * KV) * SIZE), dtype=np.float32)),
        ("q", np.ones((1, 70, (HEADS + 2 * KV) * SIZE), dtype=np.float32)),  # beyond the tables
        ("past_k", np.ones((1, KV, 9, SIZE), dtype=np.float32)),
        ("past_k", np.ones((1, KV, 10, 8), dtype=np.float32)),
        ("past_v", np.ones((1, 1, 10, SIZE), dtype=np.float32)),
    ],
    ids=str,
)
def test_hostile_attention_inputs_are_refused(name: str, value: NDArray[np.generic]) -> None:
    session = attention()
    assert session.run(None, feeds())[1].shape == (1, KV, 11, SIZE)
    with pytest.raises(Exception, match=r"ai\.owl: "):
        session.run(None, feeds(**{name: value}))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("name", "value"),
    [("scale", 1), ("softcap", "20"), ("local_window_size", 3.0), ("rotary_interleaved", [1])],
)
def test_attributes_of_attention_have_their_types(name: str, value: object) -> None:
    with pytest.raises(Exception, match=rf"ai\.owl: attribute {name} has the wrong type"):
        attention(**{name: value})


# ---- Padding -------------------------------------------------------------------------------------


def in_parts(
    session: onnxruntime.InferenceSession, q: NDArray[np.float32], mask: NDArray, parts: list[int]
) -> NDArray[np.float32]:
    """q [batch, length, width] run `parts` positions at a time behind an empty cache."""
    caches = [np.zeros((len(q), KV, 0, SIZE), np.float32)] * 2
    results = []
    for end, part in zip(np.cumsum(parts), parts, strict=True):
        seen = mask[:, :end]
        inputs = {
            "q": q[:, end - part : end],
            "past_k": caches[0],
            "past_v": caches[1],
            "lengths": seen.sum(axis=1, dtype=np.int32) - 1,
            "total": np.array(end, dtype=np.int32),
            "mask": seen,
        }
        y, *caches = session.run(None, inputs)
        results.append(y)
    return np.concatenate(results, axis=1)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("parts", [[9], [4, 5], [3, 3, 3], [1] * 9])
def test_padding_anywhere_changes_no_token(parts: list[int]) -> None:
    masks = ["000011111", "111100000", "110001101", "000000001", "011111110", "111111111"]
    check_padding(masks, parts)


@pytest.mark.usefixtures("kernels")
def test_short_and_long_runs_of_a_sequence_follow_one_another() -> None:
    """Up to 16 positions are attended to one by one, more of them in blocks."""
    masks = ["111" + 2 * ("0" + 20 * "1"), 20 * "1" + "0" + 16 * "1" + 8 * "0", 44 * "0" + "1"]
    check_padding([*masks, "11" + 17 * "0" + 26 * "1", 45 * "1"], [45])
    check_padding([45 * "1", 28 * "0" + 17 * "1"], [20, 20, 5])


def check_padding(masks: list[str], parts: list[int]) -> None:
    """Each row's tokens say the same without their padding, in one part."""
    mask = np.array([[int(digit) for digit in row] for row in masks])
    width = (HEADS + 2 * KV) * SIZE
    q = np.random.default_rng(0).standard_normal((*mask.shape, width)).astype(np.float32)
    session = attention("mask")
    together = in_parts(session, q, mask, parts)
    for row, tokens in enumerate(mask.astype(bool)):
        count = int(tokens.sum())
        alone = in_parts(session, q[row : row + 1, tokens], np.ones((1, count), int), [count])
        np.testing.assert_allclose(together[row, tokens], alone[0], atol=1e-5)
        assert not together[row, ~tokens].any()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.ones((1, 10), np.int64), "total_length"),
        (np.ones((2, 11), np.int64), "total_length"),
        (np.ones((11,), np.int64), r"total_length|rank"),
    ],
)
def test_a_mask_of_another_shape_is_refused(mask: NDArray[np.int64], words: str) -> None:
    with pytest.raises(Exception, match=words):
        attention("mask").run(None, feeds(mask=mask))


@pytest.mark.usefixtures("kernels")
def test_a_mask_with_more_tokens_than_the_lengths_is_refused() -> None:
    changes = {"lengths": np.array([-1], dtype=np.int32), "mask": np.ones((1, 11), np.int64)}
    with pytest.raises(Exception, match="more tokens than seqlens_k"):
        attention("mask").run(None, feeds(**changes))
