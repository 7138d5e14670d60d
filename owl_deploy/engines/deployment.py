"""What a deployment folder is, before an engine opens it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from owl_deploy.artefact import measurement, read_manifest, what_it_is
from owl_deploy.engines.loading import GENAI_CONFIG, MODEL, Folder
from owl_deploy.engines.registry import TARGETS
from owl_deploy.errors import BadInput, unknown_name
from owl_deploy.runtime import kernels

FAKE = "fake.json"


@dataclass(frozen=True)
class Deployment:
    """A folder that an engine can open; `manifest` is its owl.json, empty if it has none.

    `library`: the operators to open it with; None where it needs none.
    """

    path: Path
    target: str
    vocab: int
    manifest: dict[str, Any]
    library: Path | None = None
    folder: Folder = field(kw_only=True, repr=False, compare=False)

    @property
    def precision(self) -> str:
        """How the weights are held: fp32, bf16, int8 or int4."""
        packed = self.manifest.get("values")  # of earlier exports to owl: "precision" was fp32
        return packed if isinstance(packed, str) else str(self.manifest.get("precision", "fp32"))

    @property
    def zeros(self) -> float | None:
        """The share of zeros in the weights of the matrix products, if the manifest says."""
        share = self.manifest.get("sparsity")
        return float(share) if isinstance(share, int | float) else None

    @property
    def perplexity(self) -> float | None:
        """The perplexity that `owl eval` recorded, if it did."""
        recorded = measurement(self.path, "perplexity")
        return float(recorded["value"]) if recorded else None

    @property
    def max_context(self) -> int | None:
        """The tokens that the model takes at most; None where nothing says."""
        told = self.manifest.get("max_context")
        if told is None and self.folder.settings:
            told = self.folder.number("context_length")
        return int(told) if told else None

    @property
    def blocks(self) -> list[dict[str, Any]]:
        """Name, sparsity and outlier ratio (None: not measured) of each block, if pruned here."""
        source = Path(str(self.manifest.get("source", {}).get("path", "")))
        rows = read_manifest(source).get("blocks", []) if source.is_dir() else []
        return [
            {
                "name": row["name"],
                "sparsity": row["achieved"],
                "outlier_ratio": row.get("outlier_ratio"),
            }
            for row in rows
        ]

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
    manifest, folder = read_manifest(path), Folder(path)
    target = manifest.get("target")
    if (path / FAKE).is_file() and target in (None, "fake"):
        return Deployment(path, "fake", 16, manifest, folder=folder)
    if not folder.has_graph:
        raise BadInput(
            f"{path} is not a deployment: it has no {MODEL}.",
            what_it_is(path) or "Make it with owl export.",
        )
    library = folder.check(trust=trust_library)
    inputs = {value.name for value in folder.graph.input}
    if "input_ids" not in inputs or not any(name.startswith("past_key_values.") for name in inputs):
        raise BadInput(
            f"{path / MODEL} is not a decoder with a KV cache: it has the inputs "
            f"{', '.join(sorted(inputs)[:4]) or '(none)'}.",
            "Export the checkpoint with owl export.",
        )
    target = target or _guess_target(folder, inputs)
    if target not in TARGETS:
        raise unknown_name(f"target (in {path / 'owl.json'})", str(target), TARGETS)
    if target == "owl":
        kernels()  # to hear of a wrong OWL_ISA before an engine starts
    vocab = _width_of_logits(folder) or folder.number("vocab_size")
    return Deployment(path, target, vocab, manifest, library, folder=folder)


def _guess_target(folder: Folder, inputs: set[str]) -> str:
    """The target of a folder that has no manifest."""
    if (folder.path / GENAI_CONFIG).is_file() or "causal_mask" not in inputs:
        return "onnxruntime"
    return "deepsparse"


def _width_of_logits(folder: Folder) -> int:
    """0 if the graph does not say it."""
    shapes = (x.type.tensor_type.shape.dim for x in folder.graph.output if x.name == "logits")
    return next((shape[-1].dim_value for shape in shapes if shape), 0)
