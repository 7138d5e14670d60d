"""Small models, tokenizers and texts that the tests make for themselves."""

import copy
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from owl_deploy.compression.methods import METHODS

SENTENCES = (
    "The river ran past the mill and under the old stone bridge. ",
    "Nobody in the village could say when the clock had stopped. ",
    "A small boat came in on the tide with salt, rope and letters. ",
    "Most of the numbers were right, and the rest were close enough. ",
)


def text(words: int = 4000) -> str:
    """English-like text of at least so many words, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(SENTENCES), (words // 10,), generator=generator)
    return "".join(SENTENCES[pick] for pick in picks)


def write_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """A byte-level BPE tokenizer trained on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


REMOVING = [name for name, row in METHODS.items() if row.removes]  # methods that prune

_SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 2, "intermediate_size": 112}
# family: what makes it itself, besides the sizes.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED | {"tie_word_embeddings": True, "rope_theta": 50000.0},
    "mistral": _GROUPED | {"sliding_window": 24, "head_dim": 16},
    "qwen2": _GROUPED,
    "qwen3": _GROUPED | {"head_dim": 32},
    "gemma3_text": _GROUPED
    | {
        "head_dim": 16,
        "sliding_window": 24,
        "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi3": _GROUPED | {"original_max_position_embeddings": 512},
    "opt": {"ffn_dim": 112, "word_embed_proj_dim": 64},
    "gpt_neox": {"intermediate_size": 112, "rotary_pct": 0.25},
}


LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1.5] * 8,
    "original_max_position_embeddings": 256,
    "factor": 2.0,
}


def config_of(family: str, **changes: Any) -> Any:
    """The config of a two-block model of a family; it shares nothing with `changes`."""
    values = copy.deepcopy(_SIZES | FAMILIES[family] | changes)
    return transformers.AutoConfig.for_model(family, **values)


def write_model(family: str, folder: Path, **changes: Any) -> Path:
    """A random two-block model of a family, and a tokenizer.

    Its weights are rounded to a coarse grid, so that scores tie, as those of real quantised models.
    """
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(family, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                noise = torch.randn(parameter.shape) * 0.1  # biases too, which start at 0
                parameter.copy_((noise * 64).round() / 64)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_llama(folder: Path, **changes: Any) -> Path:
    """The family that most tests use: grouped-query attention and tied embeddings."""
    return write_model("llama", folder, **changes)


def round_to_grid(folder: Path, bits: int, group: int, sparsity: float) -> None:
    """Take some of the weights of a checkpoint's blocks away, and round to a grid beside it."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    largest = 2 ** (bits - 1) - 1
    scales = {}
    for name, weight in tensors.items():
        if ".layers." not in name or weight.ndim != 2:
            continue
        kept = torch.rand(weight.shape, generator=generator) >= sparsity
        blocks = (weight * kept).float().split(group, dim=1)
        peaks = torch.stack([block.abs().amax(dim=1) for block in blocks], dim=1)
        # A power of two times sixteenths, or with signs eighths, as the engine holds them.
        signs = int(bits < 8)
        places = 19 + signs
        upper = (peaks / largest).view(torch.int32) + (1 << places) - 1 >> places << places
        below_zero = signs * torch.randint(2, upper.shape, generator=generator)
        scale = upper.view(torch.float32) * (1 - 2 * below_zero)
        steps = scale.repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        rounded = (weight * kept / steps.where(steps != 0, 1)).round() * steps
        tensors[name] = rounded.to(torch.bfloat16)
        scales[name.removesuffix(".weight")] = scale
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(
        {f"{name}.weight_scale": scale.bfloat16() for name, scale in scales.items()},
        folder / "grid.safetensors",
        metadata={"bits": str(bits), "group": str(group)},
    )


def truncate(folder: Path) -> None:
    """Cut the end off a checkpoint's weights."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


def poison(folder: Path) -> None:
    """Put a NaN among a checkpoint's weights."""
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
