import errno
import itertools
import json
import os
import shutil

import httpx2
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError
from safetensors.torch import load_file, save_file

from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.models import checkpoint
from owl_deploy.models.families import family_of


@pytest.fixture
def copy(llama, tmp_path):
    """A private copy of the tiny model, to be damaged."""
    return shutil.copytree(llama, tmp_path / "model")


def test_tensors_are_found_by_module(llama):
    found = checkpoint.open_checkpoint(llama)
    names = found.names("model.layers.1.mlp")
    assert sorted(names) == ["down_proj.weight", "gate_proj.weight", "up_proj.weight"]
    assert found.read("model.layers.1.mlp.up_proj.weight").shape == (112, 64)


def test_a_missing_folder_a_file_and_an_empty_folder(tmp_path):
    for path in (tmp_path / "no", tmp_path / "empty", tmp_path / "file"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput):
            checkpoint.open_checkpoint(path)


def test_a_path_that_is_no_text(tmp_path, llama):
    """safetensors takes none, which would be told as a corrupt file."""
    folder = shutil.copytree(llama, tmp_path / os.fsdecode(b"m\xff"))
    with pytest.raises(BadInput, match="is not UTF-8"):
        checkpoint.open_checkpoint(folder)


def test_a_hub_name_that_the_hub_does_not_give(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(BadInput, match="the Hub did not give that model"):
        checkpoint.open_checkpoint("org/name")


def test_a_model_with_a_licence_to_accept(monkeypatch):
    request = httpx2.Request("GET", "https://huggingface.co")

    def refuse(*_, **__):
        raise GatedRepoError("401 Client Error", response=httpx2.Response(401, request=request))

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(BadInput, match=r"accepted its licence.*huggingface\.co/org/name, then run"):
        checkpoint.open_checkpoint("org/name")


def test_a_truncated_file(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadInput, match="corrupt"):
        checkpoint.open_checkpoint(copy)


def test_a_pickle_is_not_read(copy):
    (copy / "model.safetensors").unlink()
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(BadInput, match="Pickled weights are not read"):
        checkpoint.open_checkpoint(copy)


@pytest.mark.parametrize("name", ["model.gguf", ""])
def test_a_gguf_is_not_read(copy, name):
    (copy / "model.safetensors").rename(copy / "model.gguf")
    with pytest.raises(BadInput, match="transformers can expand it"):
        checkpoint.open_checkpoint(copy / name)


def test_a_file_is_no_model(copy):
    with pytest.raises(BadInput, match="is a file, and a model is a folder"):
        checkpoint.open_checkpoint(copy / "model.safetensors")


def test_a_folder_of_two_models(copy):
    (copy / "other.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    index = {"weight_map": {"a": "other.safetensors"}}
    (copy / checkpoint.INDEX).write_text(json.dumps(index))
    with pytest.raises(BadInput, match="holds two models"):
        checkpoint.open_checkpoint(copy)


def test_an_index_of_the_one_file(copy):
    index = {"weight_map": {"a": checkpoint.WEIGHTS}}
    (copy / checkpoint.INDEX).write_text(json.dumps(index))
    assert "model.norm.weight" in checkpoint.open_checkpoint(copy).files


def test_an_index_that_leads_outside_the_folder(copy):
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (copy / checkpoint.INDEX).write_text(json.dumps(index))
    (copy.parent / "elsewhere.safetensors").write_bytes((copy / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match="outside the model's folder"):
        checkpoint.open_checkpoint(copy)


def test_quantized_weights(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.int8)}, copy / "model.safetensors")
    with pytest.raises(BadInput, match=r"up_proj\.weight.* is quantized: it holds int8"):
        checkpoint.open_checkpoint(copy).read(name)
    scale = {"model.layers.0.k_scale": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(tensors | scale, copy / "model.safetensors")
    with pytest.raises(BadInput, match=r"k_scale.* is quantized: it holds float8_e4m3fn"):
        checkpoint.open_checkpoint(copy).read("model.layers.0.k_scale")


@pytest.mark.parametrize("count", [0, 1, None, 2, "2"])
def test_the_config_counts_the_blocks(copy, count):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": count}))
    if count == 2:
        assert checkpoint.open_checkpoint(copy).blocks == ["model.layers.0", "model.layers.1"]
        return
    complaint = (
        r"counts 1 .* model\.layers\.1 as well" if count == 1 else f"counts {count!r} blocks"
    )
    with pytest.raises(BadInput, match=complaint):
        checkpoint.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 1_000_000}, r"counts 1000000 blocks.* hold no model\.layers\.2"),
        ({"vocab_size": 321}, r"a vocab_size of 321, and model\.embed_tokens.* has 320 rows"),
        ({"vocab_size": "320"}, r"a vocab_size of '320'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized"),
        ({"transformers_weights": "x.safetensors"}, "names weights of its own"),
        ({"model_type": "lama"}, "Unknown model family 'lama'"),
    ],
)
def test_the_config_is_that_of_the_weights(copy, change, complaint):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=complaint):
        checkpoint.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("held", "dtype"),
    [
        ({"bfloat16"}, torch.bfloat16),
        ({"float16"}, torch.float16),
        ({"float16", "bfloat16"}, torch.float32),
        ({"bfloat16", "float32"}, torch.float32),
        ({"float64"}, torch.float32),
        ({"bfloat16", "int64"}, torch.bfloat16),  # buffers of old checkpoints
    ],
)
def test_the_dtype_that_holds_what_the_files_hold(copy, held, dtype):
    weights = load_file(copy / "model.safetensors")
    dtypes = itertools.cycle(sorted(held))
    as_held = {name: one.to(getattr(torch, next(dtypes))) for name, one in weights.items()}
    as_held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)  # nothing reads it
    save_file(as_held, copy / "model.safetensors", {"format": "pt"})
    assert checkpoint.Checkpoint(copy).dtype() == dtype


def test_the_whole_model_is_what_transformers_loads(llama):
    found = checkpoint.open_checkpoint(llama).load(torch.bfloat16)
    expected = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    assert not found.training
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
        assert not parameter.requires_grad


@pytest.mark.parametrize(
    ("name", "change", "complaint"),
    [
        ("model.norm.weight", lambda weight: weight * torch.nan, r"norm\.weight.* NaN"),
        ("model.norm.weight", lambda weight: weight[:-1].clone(), "transformers cannot load"),
        ("model.norm.weight", lambda weight: weight.to(torch.int8), "is quantized: it holds int8"),
        ("model.norm.weight", None, r"lacks 1 tensors, 'model\.norm\.weight'"),
    ],
)
def test_a_whole_model_with_a_wrong_tensor_is_refused(copy, name, change, complaint):
    tensors = load_file(copy / "model.safetensors")
    weight = tensors.pop(name)
    if change is not None:
        tensors[name] = change(weight)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=complaint):
        checkpoint.open_checkpoint(copy).load(torch.float32)


NO_MEMORY = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8")


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (NO_MEMORY, RuntimeError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), OSError),
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (OSError(errno.EIO, "Input/output error"), EnvironmentFailed),
        (OSError("no file named model.safetensors"), BadInput),
        (ValueError("rope_theta must be a number"), BadInput),
    ],
    ids=str,
)
def test_what_the_system_refuses_is_no_bad_model(llama, monkeypatch, error, ends):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(ends) as caught:
        checkpoint.open_checkpoint(llama).load(torch.float32)
    assert type(caught.value) is ends


def test_a_config_nested_too_deep(copy):
    (copy / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(BadInput, match=r"config\.json is not valid JSON"):
        checkpoint.open_checkpoint(copy)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite(copy, value):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][3] = value
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(BadInput, match=r"model\.norm\.weight.*NaN"):
        checkpoint.open_checkpoint(copy).read("model.norm.weight")


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({}, "no model_type"),
        ({"model_type": "lama"}, "Supported: llama, mistral"),
        ({"model_type": "bert"}, "Unknown model family"),
        ({"model_type": "llama", "num_local_experts": 8}, "mixture of experts"),
    ],
)
def test_families_without_a_row(config, complaint):
    with pytest.raises(BadInput, match=complaint):
        family_of(config)


def test_llama3_rope_scaling_gets_both_names():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}
    both = checkpoint.compatible_config({"rope_parameters": rope, "dtype": "bfloat16"})
    assert both["rope_theta"] == 5e5
    assert both["rope_scaling"] == {"rope_type": "llama3", "factor": 8.0}
    assert both["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("family", "rope", "older"),
    [
        (
            "gpt_neox",
            {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5},
        ),
        (
            "gpt_neox",
            {
                "rope_type": "linear",
                "factor": 2.0,
                "rope_theta": 2e4,
                "partial_rotary_factor": 0.5,
            },
            {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ),
        (
            "llama",
            {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
        ),
    ],
)
def test_rotary_settings_get_their_older_names(family, rope, older):
    """Transformers 4.40 reads those alone, and 5 what it read before."""
    config = {"model_type": family, "rope_parameters": rope}
    both = checkpoint.compatible_config(config)
    assert {key: both.get(key) for key in older} == older
    read = [transformers.CONFIG_MAPPING[family].from_dict(dict(one)) for one in (config, both)]
    known = [{key: one.rope_parameters.get(key) for key in rope} for one in read]
    assert known == [rope, rope]


def test_merges_with_a_space_stay_pairs():
    pairs = {"model": {"merges": [["a", "b"], ["a b", "c"]]}}
    assert checkpoint._string_merges(pairs)["model"]["merges"] == [["a", "b"], ["a b", "c"]]


def test_what_models_compute_now_is_left_unread(copy):
    """Old checkpoints hold masks and frequencies, which transformers leaves unread."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    old = ["self_attn.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"]
    tensors |= {f"model.layers.0.{name}": torch.ones(4) for name in old}
    save_file(tensors, path, metadata={"format": "pt"})
    found = checkpoint.open_checkpoint(copy)
    assert not any(name.endswith(tuple(old)) for name in found.files)
    assert len(found.files) == len(tensors) - 3
    found.read_module("model.layers.0")
    assert "self_attn.q_proj.weight" in found.names("model.layers.0")


def test_a_file_that_cannot_be_read_now_is_not_called_corrupt(copy):
    found = checkpoint.open_checkpoint(copy)
    (copy / "model.safetensors").rename(copy / "away")
    with pytest.raises(EnvironmentFailed, match="cannot be read"):
        found.read("model.norm.weight")


def test_a_block_with_a_tensor_that_the_model_has_not(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.bias"] = torch.zeros(8)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"holds 'model\.layers\.0\.self_attn\.k_proj\.bias'"):
        checkpoint.open_checkpoint(copy).load(torch.float32)


def test_an_adapter_beside_the_model(copy):
    """Transformers would apply it where the whole model is loaded, and a block has it not."""
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInput, match=r"an adapter beside the model.* --adapter"):
        checkpoint.Checkpoint(copy)


def test_a_tokenizer_file_that_is_a_link_elsewhere_is_not_carried_on(copy, tmp_path):
    (tmp_path / "secret").write_text("mine")
    (copy / "merges.txt").unlink(missing_ok=True)
    (copy / "merges.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="is a link to"):
        checkpoint.write_compatible(checkpoint.Checkpoint(copy), tmp_path / "out")


def test_chat_templates_beside_the_tokenizers_own_are_carried_on(copy, tmp_path):
    tokenizer = load_tokenizer(copy)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(copy)
    (tmp_path / "out").mkdir()
    checkpoint.write_compatible(checkpoint.Checkpoint(copy), tmp_path / "out")
    assert load_tokenizer(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_folder_of_chat_templates_that_is_a_link_elsewhere(copy, tmp_path):
    (tmp_path / "secrets").mkdir()
    (copy / "additional_chat_templates").symlink_to(tmp_path / "secrets")
    (tmp_path / "out").mkdir()
    with pytest.raises(BadInput, match="additional_chat_templates is a link to"):
        checkpoint.check_links(copy)
    with pytest.raises(BadInput, match="additional_chat_templates is a link to"):
        checkpoint.write_compatible(checkpoint.Checkpoint(copy), tmp_path / "out")
