"""`owl export --target owl` of every family, against PyTorch, with sparse weights and windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.export.targets import export
from owl_deploy.runtime import library_path
from tests import tiny

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

# name: the family, what is special about it, and how many of its 2 attentions are replaced.
CASES = {
    "llama": ("llama", {}, 2),
    # A key that only other families' code reads, as a model that was converted may have it.
    "llama, no window": ("llama", {"sliding_window": 24}, 2),
    "llama, untied": ("llama", {"tie_word_embeddings": False}, 2),
    "mistral, window": ("mistral", {}, 2),
    "qwen2": ("qwen2", {}, 2),
    "qwen2, window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
        2,
    ),
    "qwen3": ("qwen3", {}, 2),
    "gemma3": ("gemma3_text", {}, 2),
    "phi3": ("phi3", {}, 2),
    "phi3, window": (
        "phi3",
        {"sliding_window": 24, "layer_types": ["full_attention", "sliding_attention"]},
        2,
    ),
    # Its tables are chosen by a branch in the graph: ONNX Runtime's own attention stays.
    "phi3, long": (
        "phi3",
        {"original_max_position_embeddings": 256, "rope_parameters": tiny.LONG_ROPE},
        0,
    ),
    # As many outputs of a Linear as of the head, for which the builder alone takes it.
    "as wide as the vocabulary": ("llama", {"hidden_size": 320}, 2),
}
QUICK = ("mistral, window", "gemma3", "as wide as the vocabulary")  # the builder alone gets wrong


def thinned(folder: Path) -> Path:
    """The model with 70 % of its blocks' weights gone, at random."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if ".layers." in name and tensor.ndim == 2:
            tensor[torch.rand(tensor.shape) < 0.7] = 0
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        pytest.param(
            name,
            precision,
            marks=[] if name in QUICK and precision == "fp32" else pytest.mark.slow,
        )
        for name in CASES
        for precision in ("fp32", "bf16", "int8")
    ],
)
def test_every_family_computes_what_pytorch_does(name: str, precision: str, tmp_path: Path) -> None:
    family, changes, attentions = CASES[name]
    model = thinned(tiny.write_model(family, tmp_path / "model", **changes))
    manifest = export(model, tmp_path / "out", target="owl", precision=precision).to_json()
    parity = manifest["parity"]
    assert parity["greedy_tokens"] == 32
    if precision == "fp32":
        assert parity["relative_difference"] < 1e-5
        assert parity["equal_greedy_tokens"] == parity["equal_generated_tokens"] == 1
    else:
        assert parity["relative_difference"] < {"bf16": 2e-2, "int8": 0.1}[precision]
    replaced = manifest["packing"]["replaced"]
    assert replaced["fuse_gated"] == 2
    assert replaced["replace_matmuls"] == 7  # qkv, o and down of two blocks, and the head
    assert replaced["fuse_norms"] >= 4
    assert replaced["replace_attention"] == attentions
    assert manifest["packing"]["sparse_weights"] == 8


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("opt", {}, ","),
        ("gpt_neox", {}, ","),
        ("llama", {"head_dim": 24}, " with a head size of 24, which is no multiple of 16,"),
    ],
)
def test_what_the_builder_does_not_know_is_refused(
    family: str, changes: dict[str, int], what: str, tmp_path: Path
) -> None:
    model = tiny.write_model(family, tmp_path / "model", **changes)
    told = f"does not know '{family}'{what} .*--target deepsparse"
    with pytest.raises(BadInput, match=told) as caught:
        export(model, tmp_path / "out", target="owl")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_traced_for_it_writes_no_texts(owl: Any, tmp_path: Path) -> None:
    model = tiny.write_model("gpt_neox", tmp_path / "model")
    export(model, tmp_path / "out", target="onnxruntime")
    asked = ("--context", 64, "--clients", 1, "--new-tokens", 8, "--pairs", 1)
    for line in (
        ("generate", tmp_path / "out", "x"),
        ("serve", tmp_path / "out"),
        ("bench", tmp_path / "out", "--scenario", "requests", *asked),
    ):
        code, out, err = owl(*line)
        told = "has no genai_config.json, so onnxruntime-genai cannot open it. It does not know"
        assert (code, out, told in err) == (2, "", True), err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral, window", "gemma3", "phi3, window", "phi3, long"])
def test_the_dense_target_takes_them_too(name: str, tmp_path: Path) -> None:
    family, changes, _ = CASES[name]
    model = tiny.write_model(family, tmp_path / "model", **changes)
    manifest = export(model, tmp_path / "out", target="onnxruntime").to_json()
    assert manifest["parity"]["relative_difference"] < 1e-5
    assert manifest["parity"]["equal_generated_tokens"] == 1
