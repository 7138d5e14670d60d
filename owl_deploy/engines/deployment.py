"""What a deployment folder is, before an engine opens it."""

from dataclasses import dataclass
from pathlib import Path

from owl_deploy.engines.loading import GENAI_CONFIG, MODEL, check, genai_config, load_graph
from owl_deploy.engines.registry import TARGETS
from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.manifest import (
    Block,
    CheckpointManifest,
    DeploymentManifest,
    measurement,
    read_manifest,
    what_it_is,
)
from owl_deploy.runtime import kernels

FAKE = "fake.json"


@dataclass(frozen=True)
class Deployment:
    """A folder that an engine can open; `manifest` is its owl.json, or says nothing."""

    path: Path
    target: str
    vocab: int
    manifest: DeploymentManifest

    @property
    def precision(self) -> str:
        """How the weights are held: fp32, bf16, int8 or int4."""
        return self.manifest.precision

    @property
    def zeros(self) -> float | None:
        """The share of zeros in the weights of the matrix products, if the manifest says."""
        return self.manifest.sparsity

    @property
    def perplexity(self) -> float | None:
        """The perplexity that `owl eval` recorded, if it did."""
        recorded = measurement(self.path, "perplexity")
        return float(recorded["value"]) if recorded else None

    @property
    def max_context(self) -> int | None:
        """The tokens that the model takes at most; None where nothing says."""
        told = self.manifest.max_context
        if told is None and (self.path / GENAI_CONFIG).is_file():
            told = genai_number(self.path, "context_length")
        return told or None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The blocks of the checkpoint that was exported, if that was pruned here."""
        source = read_manifest(Path(self.manifest.source.path), CheckpointManifest)
        return source.blocks if source else ()

    @property
    def size_bytes(self) -> int:
        """The bytes of the model: the graph, its weights and its operators, not the tokenizer."""
        parts = [self.path / MODEL, *self.path.glob("*.data"), *self.path.glob("*.so")]
        return sum(part.stat().st_size for part in set(parts) if part.is_file())


def open_deployment(path: Path, *, trust_library: bool = False) -> Deployment:
    """Read what `path` is; raises `BadInput` when no engine could run it as a language model.

    So it does when graph, weights, settings or operators are not those that were exported, and for
    a library of operators that is not ours unless `trust_library` (see loading.py).
    """
    if not path.exists():
        raise BadInput(f"The deployment {path} does not exist.", "Make it with owl export.")
    if not path.is_dir():
        raise BadInput(f"{path} is a file.", "Give the deployment's folder.")
    manifest = read_manifest(path, DeploymentManifest) or DeploymentManifest()
    target = manifest.target
    if (path / FAKE).is_file() and target in (None, "fake"):
        return Deployment(path, "fake", 16, manifest)
    if not (path / MODEL).is_file():
        raise BadInput(
            f"{path} is not a deployment: it has no {MODEL}.",
            what_it_is(path) or "Make it with owl export.",
        )
    check(path, trust=trust_library)
    inputs, vocab = _describe_graph(path / MODEL)
    if "input_ids" not in inputs or not any(name.startswith("past_key_values.") for name in inputs):
        raise BadInput(
            f"{path / MODEL} is not a decoder with a KV cache: it has the inputs "
            f"{', '.join(sorted(inputs)[:4]) or '(none)'}.",
            "Export the checkpoint with owl export.",
        )
    target = target or _guess_target(path, inputs)
    if target not in TARGETS:
        raise unknown_name(f"target (in {path / 'owl.json'})", str(target), TARGETS)
    if target == "owl":
        kernels()  # to hear of a wrong OWL_ISA before an engine starts
    return Deployment(path, target, vocab or genai_number(path, "vocab_size"), manifest)


def _guess_target(path: Path, inputs: set[str]) -> str:
    """The target of a folder that has no manifest."""
    if (path / GENAI_CONFIG).is_file() or "causal_mask" not in inputs:
        return "onnxruntime"
    return "deepsparse"


def _describe_graph(path: Path) -> tuple[set[str], int]:
    """The names of a graph's inputs, and the width of `logits` (0 if that is not written)."""
    graph = load_graph(path)
    outputs = {item.name: item.type.tensor_type.shape.dim for item in graph.output}
    logits = outputs.get("logits")
    return {item.name for item in graph.input}, logits[-1].dim_value if logits else 0


def genai_number(path: Path, name: str) -> int:
    """A number about the model in the genai_config.json of the deployment `path`."""
    try:
        return int(genai_config(path)["model"][name])
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path / GENAI_CONFIG} does not say the model's {name}.", "Export again."
        ) from error
