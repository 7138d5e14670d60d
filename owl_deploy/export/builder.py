"""Runs onnxruntime-genai's model builder on a config that it reads as it was meant.

A script of its own: `genai.py` starts it, and it imports nothing of this package. Version 0.18 of
the builder misreads some configs of transformers 5; what it is given instead is below.
"""

import contextlib
import ctypes
import runpy
import signal
from typing import Any


def die_with_parent() -> None:
    """A killed `owl export` must not leave a builder at work."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def adapted(config: Any) -> Any:  # noqa: ANN401 - transformers has no types
    """The config with its facts where the builder looks for them."""
    ropes = getattr(config, "rope_parameters", None) or {}
    if "full_attention" in ropes:  # Gemma 3: two rotary bases, which transformers 4 kept apart
        config.rope_local_base_freq = ropes["sliding_attention"]["rope_theta"]
        config.rope_parameters = ropes["full_attention"]
    if ropes.get("rope_type") == "longrope":  # Phi-3: its name in transformers 4
        config.rope_parameters["type"] = "longrope"
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "layer_types", None) is None:
        # Mistral and Phi-3: the builder drops a window that no layer claims.
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    return config


def main() -> None:
    """The builder's own command line."""
    import transformers

    read = transformers.AutoConfig.from_pretrained
    transformers.AutoConfig.from_pretrained = lambda *arguments, **options: adapted(
        read(*arguments, **options)
    )
    runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    die_with_parent()
    main()
