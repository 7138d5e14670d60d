"""What `owl finetune` ends with."""

import math

from owl_deploy.finetune.settings import LARGEST_LOSS
from owl_deploy.models.manifest import AdapterManifest, CheckpointManifest, Finetuning
from owl_deploy.utils.progress import result_console


def caption(name: str, done: Finetuning) -> str:
    """One line on a fine-tuning, from the part of the manifest that is about it."""
    before, after = done.held_out_loss.before, done.held_out_loss.after
    teacher = " with a teacher" if done.teacher else ""
    known = done.held_out_loss.teacher
    beside = f"; the teacher has {known:.4f}" if known is not None else ""
    speed = done.tokens_per_second
    fast = f" at {speed:.0f} tokens/s" if speed else ""
    return (
        f"{name}: {done.settings.method}{teacher}, {done.steps} steps in "
        f"{done.seconds / 60:.1f} minutes, {done.tokens} tokens{fast}; "
        f"held-out loss {before:.4f} -> {after:.4f} nats a token "
        f"(perplexity {_perplexity(before):.4g} -> {_perplexity(after):.4g}){beside}."
    )


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < LARGEST_LOSS else math.inf


def show(manifest: CheckpointManifest | AdapterManifest, output: str) -> None:
    """Print what a fine-tuning changed, from its artefact's manifest."""
    console = result_console()
    if manifest.finetune:
        console.print(caption(output, manifest.finetune), soft_wrap=True)
    what = "An adapter" if manifest.kind == "adapter" else "A checkpoint with the same zeros"
    console.print(f"{what}; the picture is in learning_curve.svg.", soft_wrap=True)
