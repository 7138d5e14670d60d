"""Batches in stock onnxruntime-genai: every row of the engine `owl` says what it says alone."""

import json

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.inference.loading import LAST_LOGITS
from owl_deploy.runtime import library_path
from tests import tiny

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

PAD = 1  # tiny models' tokenizer
LONGEST = 700
LENGTHS = (1, 127, 128, 129, LONGEST)
BATCHES = (2, 3, 8, 16)
NEW = 3  # tokens behind a prompt


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    changes = {"num_hidden_layers": 2, "max_position_embeddings": LONGEST + 16}
    return tiny.write_llama(tmp_path_factory.mktemp("batches") / "dense", **changes)


@pytest.fixture(scope="module", params=["int8", "fp32"])
def deployment(request, dense):
    folder = dense.parent / request.param
    export(dense, folder, target="owl", precision=request.param)
    return folder


@pytest.fixture(scope="module")
def model(deployment):
    return onnxruntime_genai.Model(str(deployment))


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(3, 318, length).astype(np.int32) for length in lengths]


def padded(rows):
    ids = np.full((len(rows), max(map(len, rows))), PAD, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    return ids


def decode(model, ids):
    """Logits [rows, NEW, vocabulary] behind each row of ids, and the tokens [rows, NEW]."""
    parameters = onnxruntime_genai.GeneratorParams(model)
    length = ids.shape[1] + NEW
    parameters.set_search_options(
        max_length=length, min_length=length, do_sample=False, batch_size=len(ids)
    )
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids if len(ids) > 1 else ids[0])
    logits, tokens = [], []
    for _ in range(NEW):
        logits.append(generator.get_logits().reshape(len(ids), -1).copy())
        generator.generate_next_token()
        tokens.append(generator.get_next_tokens().copy())
    return np.stack(logits, 1), np.stack(tokens, 1)


@pytest.fixture(scope="module")
def alone(model):
    """What each prompt says by itself; those of a length by their places in a batch."""
    found = {}

    def of(length, place):
        if (length, place) not in found:
            ids = prompts([length] * max(BATCHES), length)[place][None]
            found[length, place] = tuple(part[0] for part in decode(model, ids))
        return found[length, place]

    return of


def check_rows(together, singles, tolerance=0.0):
    """Without `tolerance` to the last bit, whatever the number of rows and the padding."""
    for row, (logits, tokens) in enumerate(singles):
        np.testing.assert_allclose(together[0][row], logits, rtol=0, atol=tolerance)
        np.testing.assert_array_equal(together[1][row], tokens)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_row_equals_its_single_run(model, alone, batch, length):
    if batch == max(BATCHES) and length == LONGEST:
        batch = 5  # the same ways in a third of the time
    rows = prompts([length] * max(BATCHES), length)[:batch]
    check_rows(decode(model, padded(rows)), [alone(length, place) for place in range(batch)])


@pytest.mark.parametrize("order", [LENGTHS, LENGTHS[::-1], (1, 127, 1)])
def test_rows_of_mixed_lengths_equal_their_single_runs(deployment, model, alone, order):
    """Integers' sums are exact; floats' come in another order where a prompt of one is padded."""
    rows = [prompts([length] * max(BATCHES), length)[0] for length in order]
    tolerance = 0.0 if deployment.name == "int8" else 1e-5
    check_rows(decode(model, padded(rows)), [alone(length, 0) for length in order], tolerance)


@pytest.mark.parametrize("fillers", [1, 15, 16, 17, 40])
def test_a_prompt_may_end_in_any_number_of_fillers(model, alone, fillers):
    """Of a prompt alone onnxruntime-genai masks none, and reads what stands before them."""
    (prompt,) = prompts([128] * max(BATCHES), 128)[:1]
    filled = np.concatenate((prompt, np.full(fillers, PAD, np.int32)))
    logits, _ = decode(model, filled[None])
    scale = np.abs(alone(128, 0)[0][0]).max()
    np.testing.assert_allclose(logits[0, 0], alone(128, 0)[0][0], rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_the_last_logits_are_known_where_foreign_nodes_lie_between(tmp_path, family):
    """Norms of queries and keys, or behind attention and MLP: the head begins a program there."""
    source = tiny.write_model(family, tmp_path / "source")
    export(source, tmp_path / "made", target="owl", precision="int8")
    config = json.loads((tmp_path / "made" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"][LAST_LOGITS] == "1"
    assert "chunk_size" not in config["search"]
    model = onnxruntime_genai.Model(str(tmp_path / "made"))
    (prompt,) = prompts([60])
    wanted, _ = decode(model, prompt[None])
    scale = np.abs(wanted).max()
    for fillers in (15, 16, 17, 196):
        filled = np.concatenate((prompt, np.full(fillers, PAD, np.int32)))
        found, _ = decode(model, filled[None])
        np.testing.assert_allclose(found[0, 0], wanted[0, 0], rtol=0, atol=1e-4 * scale)
    rows = prompts([60, 150])
    singles = [decode(model, row[None]) for row in rows]
    check_rows(
        decode(model, padded(rows)), [(one[0], two[0]) for one, two in singles], 1e-4 * scale
    )


def test_a_plain_session_gives_all_logits_and_one_that_says_so_the_last(deployment):
    config = json.loads((deployment / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    assert options[LAST_LOGITS] == "1"
    assert "chunk_size" not in config["search"]
    ids = prompts([40])[0].astype(np.int64)[None]
    every, last = (logits_of(deployment, ids, entry) for entry in ("0", "1"))
    assert np.ptp(every, axis=2).min() > 0
    # All of them take all bits of a screened head, a few take them near the largest.
    scale = np.abs(every).max()
    likely = every[:, -16:] >= every[:, -16:].max(axis=2, keepdims=True) - 10
    np.testing.assert_allclose(last[:, -16:][likely], every[:, -16:][likely], atol=1e-4 * scale)


def logits_of(deployment, ids, last):
    """Of a prompt [1, n] in plain ONNX Runtime: [1, n, vocabulary]."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(LAST_LOGITS, last)
    options.register_custom_ops_library(str(deployment / library_path().name))
    session = onnxruntime.InferenceSession(str(deployment / "model.onnx"), options)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    decoder = json.loads((deployment / "genai_config.json").read_text())["model"]["decoder"]
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            kind = np.float16 if value.type == "tensor(float16)" else np.float32
            shape = (1, decoder["num_key_value_heads"], 0, decoder["head_size"])
            feeds[value.name] = np.zeros(shape, kind)
    return session.run(["logits"], feeds)[0]
