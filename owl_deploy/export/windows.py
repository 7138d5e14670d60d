"""Which blocks look at the last tokens only, as transformers has it.

A graph or a file can have other windows than its checkpoint and pass every comparison of texts that
are shorter than they are, so what makes one is told, or refused.
"""

from typing import Any

from owl_deploy.models.families import FAMILIES

# What transformers makes of a Mistral whose config.json lists its layers.
_LISTED = ("ministral",)


def sliding(config: Any) -> list[bool]:  # noqa: ANN401 - a transformers config
    """Of each block whether it has the sliding window of `config`; a family without has none."""
    blocks: int = config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None:
        return [False] * blocks
    if _is_listed(config):
        return [kind == "sliding_attention" for kind in config.layer_types[:blocks]]
    return [FAMILIES[config.model_type].windows == "every"] * blocks


def is_lacking(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    """Whether blocks are listed for a window that the config has not, on which the model fails."""
    layers = getattr(config, "layer_types", None) or ()
    unset = getattr(config, "sliding_window", None) is None
    return unset and "sliding_attention" in layers and _is_listed(config)


def _is_listed(config: Any) -> bool:  # noqa: ANN401 - a transformers config
    kind: str = config.model_type
    return kind in _LISTED or FAMILIES[kind].windows == "listed"
