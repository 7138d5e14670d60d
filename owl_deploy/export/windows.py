"""Which blocks look at the last tokens only, as transformers has it.

A graph or a file can have other windows than its checkpoint and pass every comparison of texts that
are shorter than they are, so what makes one is told, or refused.
"""

from typing import Any

from owl_deploy.families import FAMILIES


def sliding(config: Any) -> list[bool]:  # noqa: ANN401 - a transformers config
    """Of each block whether it has the sliding window of `config`; a family without has none."""
    blocks: int = config.num_hidden_layers
    if getattr(config, "sliding_window", None) is None:
        return [False] * blocks
    windows = FAMILIES[config.model_type].windows
    if windows == "listed":
        return [kind == "sliding_attention" for kind in config.layer_types[:blocks]]
    return [windows == "every"] * blocks
