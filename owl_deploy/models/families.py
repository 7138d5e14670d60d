"""One row a model family: where its blocks lie, and what is known of it.

A family is supported when it has a row here and a small random model in the tests that goes all
the way, from pruning to export parity. `model_type` is the name in a checkpoint's config.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from owl_deploy.errors import BadInput, unknown_name


@dataclass(frozen=True)
class Family:
    """Where the parts of a causal language model are, as dotted module names.

    `backbone` is the module that maps token ids to hidden states; `blocks` the list of decoder
    blocks in it; `embeddings` the modules that run before the first block; `head` what checkpoints
    call the output head; `queries_and_values` the Linears of a block's attention that make them,
    by the last part of their names: one, where they are fused. `halves`: in a block, the attention
    and the norm that the stream enters once the attention has added to it; None where the MLP reads
    what the attention reads. `writers`: the Linears of a half whose outputs are added to the stream
    as they are, by the last part of their names: none, where a norm comes between, or the halves
    cannot be told apart. `windows`: which blocks have the sliding window that config.json tells
    of: none, as the family's code does not read it; every one; or those that its list says.
    `capped`: whether it caps its logits, by `final_logit_softcapping`. `built`: whether
    onnxruntime-genai's model builder knows it.
    """

    backbone: str
    blocks: str
    embeddings: tuple[str, ...]
    head: str = "lm_head"
    queries_and_values: tuple[str, ...] = ("q_proj", "v_proj")
    halves: tuple[str, str] | None = ("self_attn", "post_attention_layernorm")
    writers: tuple[str, ...] = ("o_proj", "down_proj")
    windows: Literal["none", "every", "listed"] = "none"
    capped: bool = False
    built: bool = True


_LLAMA = Family("model", "model.layers", ("model.embed_tokens",))

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, windows="every"),
    "qwen2": replace(_LLAMA, windows="listed"),
    "qwen3": replace(_LLAMA, windows="listed"),
    "gemma3_text": replace(
        _LLAMA,
        halves=("self_attn", "pre_feedforward_layernorm"),
        writers=(),
        windows="listed",
        capped=True,
    ),
    "phi3": replace(_LLAMA, queries_and_values=("qkv_proj",), windows="every"),
    "opt": Family(
        "model.decoder",
        "model.decoder.layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        halves=("self_attn", "final_layer_norm"),
        writers=("out_proj", "fc2"),
        built=False,
    ),
    "gpt_neox": Family(
        "gpt_neox",
        "gpt_neox.layers",
        ("gpt_neox.embed_in",),
        head="embed_out",
        queries_and_values=("query_key_value",),
        halves=None,
        writers=(),
        built=False,
    ),
}


def heads() -> set[str]:
    """What the families' checkpoints call the output head."""
    return {family.head for family in FAMILIES.values()}


def family_of(config: Mapping[str, Any]) -> Family:
    """The row for a model's config.json.

    Raises `BadInput` for a family without a row, and for mixtures of experts, whose experts see
    too few calibration tokens each for the statistics to mean anything.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise BadInput("config.json names no model_type.", "Is this a Hugging Face model folder?")
    if any(config.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise BadInput(f"{model_type!r} is a mixture of experts, which owl does not support.")
    if model_type not in FAMILIES:
        error = unknown_name("model family", model_type, FAMILIES)
        error.hint = f"Supported: {', '.join(FAMILIES)}."
        raise error
    family = FAMILIES[model_type]
    width = config.get("word_embed_proj_dim")
    if model_type == "opt" and width not in (None, config.get("hidden_size")):  # OPT-350m's
        projected = (*family.embeddings, f"{family.backbone}.project_in")
        family = replace(family, embeddings=projected)
    if config.get("do_layer_norm_before", True):
        return family
    # OPT-350m has each norm at the end of its half: between what a Linear writes and the rest.
    return replace(family, halves=None, writers=())


def unbuilt(config: Mapping[str, Any]) -> str | None:
    """What of a model onnxruntime-genai's builder does not know, in words, by its config.json.

    None where nothing here says so: the builder itself may refuse more.
    """
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES and not FAMILIES[name].built:
        return repr(name)
    size, width, heads = map(config.get, ("head_dim", "hidden_size", "num_attention_heads"))
    if not size and isinstance(width, int) and isinstance(heads, int) and heads:
        size = width // heads
    if isinstance(size, int) and size % 16:
        return f"{name!r} with a head size of {size}, which is no multiple of 16"
    return None
