"""What `owl finetune` ends with."""

import math
from typing import Any

from rich.console import Console


def show(manifest: dict[str, Any], output: str) -> None:
    """Print what a fine-tuning changed, from its artefact's manifest."""
    done = manifest["finetune"]
    before, after = done["held_out_loss"]["before"], done["held_out_loss"]["after"]
    console = Console()
    console.print(
        f"{done['steps']} steps in {done['seconds'] / 60:.1f} minutes, {done['tokens']} tokens; "
        f"held-out loss {before:.4f} -> {after:.4f} nats a token "
        f"(perplexity {math.exp(before):.4g} -> {math.exp(after):.4g}).",
        soft_wrap=True,
    )
    what = "An adapter" if manifest["kind"] == "adapter" else "A checkpoint with the same zeros"
    console.print(f"{output}: {what}; the picture is in learning_curve.svg.", soft_wrap=True)
