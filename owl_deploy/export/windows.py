"""Which blocks look at the last tokens only, as transformers has it.

A graph or a file can have other windows than its checkpoint and pass every comparison of texts that
are shorter than they are, so what makes one is told, or refused.
"""

from typing import Any

# Where every block does, if config.json has a window; elsewhere its list of layers says which do.
_EVERY = ("mistral", "phi3")
_LISTED = ("qwen2", "qwen3", "gemma3_text")


def sliding(config: Any) -> list[bool]:  # noqa: ANN401 - a transformers config
    """Of each block whether it has the sliding window of `config`; a family without has none."""
    blocks: int = config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None:
        return [False] * blocks
    if config.model_type in _LISTED:
        return [kind == "sliding_attention" for kind in config.layer_types[:blocks]]
    return [config.model_type in _EVERY] * blocks
