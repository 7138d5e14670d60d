"""What PyTorch computes, whether the model is in memory or one block of it at a time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_deploy.errors import BadInput
from owl_deploy.export.source import Source
from owl_deploy.models.families import FAMILIES
from tests import tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_at_a_time_computes_what_the_whole_model_does(tmp_path, family):
    folder = tiny.write_model(family, tmp_path / "model", dtype=torch.bfloat16)
    whole, parts = Source(folder), Source(folder)
    assert whole.model is not None
    assert "model" not in vars(parts)
    assert parts.reference.greedy == whole.reference.greedy
    scale = np.abs(whole.reference.logits).max()
    np.testing.assert_allclose(
        parts.reference.logits, whole.reference.logits, rtol=0, atol=1e-5 * scale
    )


def test_no_more_than_a_block_is_in_memory(llama):
    skeleton = Source(llama).skeleton
    with skeleton.running() as model:
        first, second = (block.mlp.up_proj.weight.data_ptr() for block in model.model.layers)
        assert first == second
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weight: weight[:-1].clone(), "do not fit config.json"),
        (None, r"lacks 1 tensors, 'model\.layers\.1\.mlp\.up_proj\.weight'"),
        (lambda weight: weight * np.nan, "holds NaN"),
    ],
)
def test_weights_that_are_not_the_model_s(llama, tmp_path, change, complaint):
    copy = shutil.copytree(llama, tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(copy / "model.safetensors")
    weight = tensors.pop(name)
    if change is not None:
        tensors[name] = change(weight)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=complaint):
        _ = Source(copy).reference


def test_a_model_that_sees_the_tokens_to_come_is_refused(tmp_path):
    """A causal graph of it would compute something else, which integers' parity does not tell."""
    folder = tiny.write_model("gemma3_text", tmp_path / "model", use_bidirectional_attention=True)
    with pytest.raises(BadInput, match="sees the tokens to come"):
        Source(folder)


@pytest.mark.parametrize("name", ["config.json", "chat_template.jinja", "tokenizer_config.json"])
def test_a_link_to_another_file_is_refused_before_any_work(llama, tmp_path, name):
    """What reads the tokenizer would follow it, and its content would be in the deployment."""
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    secret = tmp_path / "private_key.txt"
    (folder / name).rename(secret) if (folder / name).exists() else secret.write_text("mine")
    (folder / name).symlink_to(secret)
    with pytest.raises(BadInput, match=f"{name} is a link to .*private_key"):
        Source(folder)


def test_a_template_among_others_that_is_a_link(llama, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (tmp_path / "private_key.txt").write_text("mine")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").symlink_to(tmp_path / "private_key.txt")
    with pytest.raises(BadInput, match=r"rag\.jinja is a link to"):
        Source(folder)


def test_a_tokenizer_in_two_files_of_other_names(tmp_path):
    """A byte-level BPE as it was kept before tokenizer.json; transformers reads it still."""
    folder = tiny.write_model("opt", tmp_path / "model")
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "vocab.json").write_text(json.dumps(whole["vocab"]))
    merges = "".join(" ".join(pair) + "\n" for pair in whole["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert Source(folder).tokenizer.get_vocab().keys() >= whole["vocab"].keys()
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").unlink()
    assert (folder / "generation_config.json").is_file()
    assert Source(folder).tokenizer is None


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_layers_named_for_a_window_that_the_model_has_not(tmp_path, family):
    """Such a model has none, whatever its config.json calls its layers."""
    plain = tiny.write_model(family, tmp_path / "plain", sliding_window=None)
    kinds = ["sliding_attention", "full_attention"]
    named = tiny.write_model(family, tmp_path / "named", sliding_window=None, layer_types=kinds)
    np.testing.assert_array_equal(Source(named).reference.logits, Source(plain).reference.logits)


@pytest.mark.parametrize("family", ["qwen2", "mistral"])
def test_a_window_that_is_asked_for_and_not_given(tmp_path, family):
    kinds = ["sliding_attention", "full_attention"]
    folder = tiny.write_model(family, tmp_path / "model", sliding_window=None, layer_types=kinds)
    with pytest.raises(BadInput, match=r"gives no window\. Give its sliding_window, or"):
        Source(folder)


def test_a_model_of_too_few_positions_cannot_be_compared(tmp_path):
    folder = tiny.write_llama(tmp_path / "model", max_position_embeddings=32)
    with pytest.raises(BadInput, match="takes 32 tokens, and an export is compared with it on 33"):
        Source(folder).prompt()
