"""Prompts of unequal length in one batch: every row of the engine `owl` equals its single run.

The builder's own graph (`GroupQueryAttention`) takes padding on the left for padding on the right,
and is wrong without a word; onnxruntime-genai pads on the right.
"""

import json

import numpy as np
import onnxruntime
import onnxruntime_genai
import pytest
import torch
import transformers

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.inference import EngineProcess, open_deployment
from owl_deploy.inference.rows import Row
from owl_deploy.inference.sampling import Sampling
from owl_deploy.inference.writer import open_writer
from owl_deploy.runtime import library_path
from tests import tiny

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

PAD = 1
LENGTHS = (10, 6, 1, 10)


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def deployment(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("padding")
    model = tiny.write_model(request.param, folder / "dense")
    export(model, folder / "owl", target="owl", precision="fp32")
    return folder / "owl"


class Batch:
    """The graph in plain ONNX Runtime, its caches kept from one call to the next."""

    def __init__(self, deployment, rows):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.register_custom_ops_library(str(deployment / library_path().name))
        self.session = onnxruntime.InferenceSession(str(deployment / "model.onnx"), options)
        config = json.loads((deployment / "genai_config.json").read_text())["model"]["decoder"]
        empty = np.zeros(
            (rows, config["num_key_value_heads"], 0, config["head_size"]), dtype=np.float32
        )
        self.names = {value.name for value in self.session.get_inputs()}
        self.past = {name: empty for name in self.names if name.startswith("past_key_values")}
        self.mask = np.ones((rows, 0), dtype=np.int64)

    def step(self, ids, mask):
        """ids, mask [rows, length] -> logits [rows, length, vocabulary]."""
        self.mask = np.concatenate([self.mask, mask], axis=1)
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": self.mask, "position_ids": positions}
        feeds = {name: array for name, array in inputs.items() if name in self.names} | self.past
        outputs = [value.name for value in self.session.get_outputs()]
        results = dict(zip(outputs, self.session.run(outputs, feeds), strict=True))
        self.past = {
            name: results[name.replace("past_key_values", "present")] for name in self.past
        }
        return results["logits"]


def run(deployment, ids, mask, parts):
    """The prompt in parts, then three tokens more: logits [rows, length + 3, vocabulary]."""
    batch = Batch(deployment, len(ids))
    logits = [
        batch.step(ids[:, end - part : end], mask[:, end - part : end])
        for end, part in zip(np.cumsum(parts), parts, strict=True)
    ]
    for token in (11, 12, 13):
        one = np.ones((len(ids), 1), dtype=np.int64)
        logits.append(batch.step(token * one, one))
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("parts", [[10], [4, 6]])
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_every_row_equals_its_single_run(deployment, side, parts):
    rng = np.random.default_rng(0)
    longest = max(LENGTHS)
    ids = np.full((len(LENGTHS), longest), PAD, dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        first = {"left": longest - length, "right": 0, "both": (longest - length) // 2}[side]
        mask[row, first : first + length] = 1
        ids[row, first : first + length] = rng.integers(3, 320, length)
    together = run(deployment, ids, mask, parts)
    for row, length in enumerate(LENGTHS):
        tokens = mask[row].astype(bool)
        alone = run(deployment, ids[row : row + 1, tokens], np.ones((1, length), int), [length])[0]
        found = together[row, [*np.flatnonzero(tokens), *range(longest, longest + 3)]]
        np.testing.assert_allclose(found, alone, atol=1e-4 * np.abs(alone).max())


def test_onnxruntime_genai_pads_and_every_row_says_what_it_says_alone(deployment):
    model = onnxruntime_genai.Model(str(deployment))
    rng = np.random.default_rng(0)
    rows = [rng.integers(3, 318, length).astype(np.int32) for length in (10, 6)]

    def greedy(ids):
        parameters = onnxruntime_genai.GeneratorParams(model)
        length = ids.shape[-1] + 8
        parameters.set_search_options(
            max_length=length, min_length=length, do_sample=False, batch_size=len(ids)
        )
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(ids if len(ids) > 1 else ids[0])
        while not generator.is_done():
            generator.generate_next_token()
        return [list(generator.get_sequence(i))[ids.shape[-1] :] for i in range(len(ids))]

    padded = np.full((2, 10), PAD, dtype=np.int32)
    for row, tokens in enumerate(rows):
        padded[row, : len(tokens)] = tokens
    assert greedy(padded) == [greedy(tokens[None])[0] for tokens in rows]


@pytest.mark.parametrize("fills", [0, 1, 3, 20])
@torch.no_grad()
def test_a_text_may_end_with_the_token_that_fills_rows(deployment, fills):
    """As one that ends with <|endoftext|>: onnxruntime-genai itself goes on before it."""
    model = transformers.AutoModelForCausalLM.from_pretrained(deployment.parent / "dense")
    texts = [[20, 31, 42, 53] + [PAD] * fills, [7, 8, 9, 10, 11]]

    def after(tokens, barred=()):
        for _ in range(4):
            logits = model(torch.tensor([tokens])).logits[0, -1]
            logits[list(barred)] = -torch.inf
            tokens = [*tokens, int(logits.argmax())]
        return tokens

    with EngineProcess("owl", deployment) as engine:
        found = engine.request("greedy", tokens=texts[0], count=4)["tokens"]
    assert texts[0] + found == after(texts[0])
    sampling = Sampling(max_new_tokens=4, do_sample=False, ignore_eos=True)  # which fills, too
    for batch, chosen in ((1, [0]), (2, [0]), (2, [0, 1]), (2, [1, 0])):
        writer = open_writer(open_deployment(deployment), 1, batch=batch)
        rows = [
            Row(list(texts[place]), len(texts[place]) + 4, sampling, never=[PAD])
            for place in chosen
        ]
        for row in rows:
            writer.add(row)
        while not all(row.ended for row in rows):
            writer.step()
        assert [row.tokens for row in rows] == [after(texts[place], [PAD]) for place in chosen]
