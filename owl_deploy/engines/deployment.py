"""What a deployment folder is, before an engine opens it."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from owl_deploy.artefact import MANIFEST, read_manifest, sha256
from owl_deploy.engines.registry import TARGETS
from owl_deploy.errors import BadInput, unknown_name

_MODEL_FILES = (".onnx", ".data", ".so", ".dylib", ".dll")  # of them, not of settings and tokenizer
MODEL, GENAI_CONFIG, FAKE = "model.onnx", "genai_config.json", "fake.json"


@dataclass(frozen=True)
class Deployment:
    """A folder that an engine can open; `manifest` is its owl.json, empty if it has none."""

    path: Path
    target: str
    vocab: int
    manifest: dict[str, Any]

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
        recorded = self.manifest.get("perplexity")
        return float(recorded["value"]) if recorded else None

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


def open_deployment(path: Path) -> Deployment:
    """Read what `path` is; raises `BadInput` when no engine could run it as a language model.

    So it does when graph, weights or operators are not those that were exported.
    """
    if not path.exists():
        raise BadInput(f"The deployment {path} does not exist.", "Make it with owl export.")
    if not path.is_dir():
        raise BadInput(f"{path} is a file.", "Give the deployment's folder.")
    manifest = read_manifest(path)
    target = manifest.get("target")
    if (path / FAKE).is_file() and target in (None, "fake"):
        return Deployment(path, "fake", 16, manifest)
    if not (path / MODEL).is_file():
        raise BadInput(
            f"{path} is not a deployment: it has no {MODEL}.", "Make it with owl export."
        )
    _check_files(path, manifest)
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
    return Deployment(path, target, vocab or genai_number(path, "vocab_size"), manifest)


def _check_files(path: Path, manifest: dict[str, Any]) -> None:
    """Damaged weights run as well as others do, and give other text."""
    for name, told in manifest.get("files", {}).items():
        file = path / name
        if file.suffix not in _MODEL_FILES:
            continue
        if not file.is_file():
            raise BadInput(f"{file} is missing.", "Export again.")
        status = file.stat()
        if _digest(file, status.st_size, status.st_mtime_ns) != told.get("sha256"):
            raise BadInput(
                f"{file} is damaged, or was changed since the export: its digest is another.",
                f"Export again; if the change is meant, delete {MANIFEST} there.",
            )


@cache
def _digest(file: Path, _size: int, _modified_ns: int) -> str:
    return sha256(file)


def _guess_target(path: Path, inputs: set[str]) -> str:
    """The target of a folder that has no manifest."""
    if (path / GENAI_CONFIG).is_file() or "causal_mask" not in inputs:
        return "onnxruntime"
    return "deepsparse"


def _describe_graph(path: Path) -> tuple[set[str], int]:
    """The names of a graph's inputs, and the width of `logits` (0 if that is not written)."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except DecodeError as error:
        raise BadInput(f"{path} is not an ONNX file, or a damaged one.", "Export again.") from error
    outputs = {item.name: item.type.tensor_type.shape.dim for item in graph.output}
    logits = outputs.get("logits")
    return {item.name for item in graph.input}, logits[-1].dim_value if logits else 0


def genai_number(path: Path, name: str) -> int:
    """A number about the model in the genai_config.json of the deployment `path`."""
    try:
        config = json.loads((path / GENAI_CONFIG).read_text(encoding="utf-8"))
        return int(config["model"][name])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(
            f"{path / GENAI_CONFIG} does not say the model's {name}.", "Export again."
        ) from error
