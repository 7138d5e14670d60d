"""A model's rotary tables, as its own module computes them.

They are traced (`traced.py`), given to onnxruntime-genai's builder in the place of its own
(`builder.py`), and what a graph holds is compared with them (`tables.py`).
"""

from typing import Any

import torch
from torch import nn

# Their frequencies depend on the longest position so far: a table is exact up to a length only.
LENGTH_DEPENDENT = ("dynamic", "longrope")


def modules(model: Any) -> dict[str, nn.Module]:  # noqa: ANN401 - transformers is partly typed
    """The rotary modules of a transformers model by their dotted names: one, or none."""
    return {
        name: module
        for name, module in model.named_modules()
        if any(buffer.endswith("inv_freq") for buffer in module._buffers)
    }


def of_config(config: Any) -> nn.Module:  # noqa: ANN401 - a transformers config
    """The rotary module of a model with this `config`, which it keeps; no weights are made."""
    import accelerate
    import transformers

    with accelerate.init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    (module,) = modules(model).values()
    return module


def layer_types(rotary: nn.Module) -> list[str | None]:
    """The types of layers for which a module has tables of their own; [None] if all share one."""
    return list(getattr(rotary, "layer_types", None) or [None])


def is_whole(rotary: nn.Module, config: Any) -> bool:  # noqa: ANN401
    """Whether the model of this `config` rotates all of each head, in every layer."""
    types = layer_types(rotary)
    widths = {tables(rotary, torch.zeros(1, dtype=torch.int64), one)[0].shape[1] for one in types}
    return widths == {head_size(config)}


def head_size(config: Any) -> int:  # noqa: ANN401
    """The width of a head of attention, by a transformers config."""
    told = getattr(config, "head_dim", None)
    return int(told or config.hidden_size // config.num_attention_heads)


def tables(
    rotary: nn.Module, positions: torch.Tensor, layer_type: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, fp32 [P, D], at `positions` [P] of a text that ends with the last of them.

    D: the dimensions that rotate; the second half of a row repeats the first.
    """
    extra = {} if layer_type is None else {"layer_type": layer_type}
    with torch.no_grad():
        cosine, sine = rotary(torch.zeros(1), position_ids=positions[None], **extra)
    return cosine[0], sine[0]


def halves(
    rotary: nn.Module, length: int, layer_type: str | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, fp32 [length, D / 2], at all positions, without the half that repeats.

    Of layers that the model does not have: the table of others, since nobody will read it.
    """
    known = layer_types(rotary)
    cosine, sine = tables(
        rotary, torch.arange(length), layer_type if layer_type in known else known[0]
    )
    return cosine[:, : cosine.shape[1] // 2], sine[:, : sine.shape[1] // 2]


def parameters(config: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - a transformers config
    """The rotary parameters in a transformers config: one row, or one a type of layer."""
    ropes = getattr(config, "rope_parameters", None) or {}
    rows = [ropes] if "rope_type" in ropes else ropes.values()
    return [row for row in rows if isinstance(row, dict)]
