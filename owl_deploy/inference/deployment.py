"""What a deployment folder is, before an engine opens it."""

import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from owl_deploy.errors import BadInput, too_long, unknown_name, unknown_token
from owl_deploy.inference.loading import GENAI_CONFIG, Folder
from owl_deploy.inference.registry import MODEL, engine_for, known_targets
from owl_deploy.inference.sampling import LARGEST
from owl_deploy.models.manifest import (
    BlockShares,
    CheckpointManifest,
    DeploymentManifest,
    read_manifest,
    what_it_is,
)
from owl_deploy.models.measurements import measurement
from owl_deploy.models.tokenizer import ChatTemplate
from owl_deploy.runtime import kernels
from owl_deploy.utils.artefact import check_path, read_object


@dataclass(frozen=True)
class Deployment:
    """A folder that an engine can open; `manifest` is its owl.json, or says nothing.

    `library`: the operators to open it with; None where it needs none.
    """

    path: Path
    target: str
    vocab: int
    manifest: DeploymentManifest
    library: Path | None = None
    folder: Folder = field(kw_only=True, repr=False, compare=False)

    @property
    def precision(self) -> str:
        """How the weights are held, by a name of its target's; "unknown" where nothing says."""
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
    def perplexity_on(self) -> str:
        """What tells the text that gave its perplexity from others; "" where nothing says."""
        return text_of(measurement(self.path, "perplexity") or {})

    @property
    def max_context(self) -> int | None:
        """The tokens that the model takes at most; None where nothing says."""
        told = self.manifest.max_context
        if told is None and self.folder.settings:
            told = self.folder.number("context_length")
        return told or None

    def check_length(self, tokens: int, option: str) -> None:
        """Raise `BadInput` where the model takes fewer than the `tokens` of `option`."""
        if self.max_context and tokens > self.max_context:
            raise too_long(str(self.path), self.max_context, tokens, option)

    def check_tokens(self, tokens: Collection[int]) -> None:
        """Raise `BadInput` for tokens that the model does not have: its tokenizer has grown."""
        largest = max(tokens, default=0)
        if self.vocab and largest >= self.vocab:
            hint = "Leave out what gives it, or export the model resized for this tokenizer."
            raise unknown_token(self.path, largest, self.vocab, hint)

    def check_opens(self) -> None:
        """Raise `BadInput` where onnxruntime-genai, which writes texts, cannot open it."""
        if self.folder.settings:
            return
        hint = "Export the checkpoint with --target owl or onnxruntime."
        if self.manifest.target == "onnxruntime":  # traced, as its family is not known there
            hint = "It does not know such a model: owl bench times it, and owl eval evaluates it."
        raise BadInput(
            f"{self.path} has no {GENAI_CONFIG}, so onnxruntime-genai cannot open it.", hint
        )

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The form for messages that the model was taught, if any."""
        return ChatTemplate(self.path)

    @property
    def ends(self) -> list[int]:
        """The tokens that end a text, by genai_config.json or else by the model's own files.

        None that the model does not have: -1 says that there is none.
        """
        told = self.folder.settings.get("model", {}).get("eos_token_id")
        if told is not None:
            found = _listed(told, self.path / GENAI_CONFIG)
        else:
            files = ("config.json", "generation_config.json")
            every = (told_numbers(self.path / name, "eos_token_id") for name in files)
            found = list(dict.fromkeys(chain.from_iterable(every)))
        return [one for one in found if 0 <= one < (self.vocab or LARGEST)]

    @property
    def blocks(self) -> tuple[BlockShares, ...]:
        """The blocks of the checkpoint that was exported, if that was pruned here."""
        if self.manifest.source.blocks:
            return self.manifest.source.blocks
        # Exported by an earlier version.
        source = read_manifest(Path(self.manifest.source.path), CheckpointManifest)
        return source.blocks if source else ()

    @property
    def size_bytes(self) -> int:
        """The bytes of the model: the graph, its weights and its operators, not the tokenizer."""
        parts = [
            self.path / self.folder.model_file,
            *self.path.glob("*.data"),
            *self.path.glob("*.so"),
        ]
        return sum(part.stat().st_size for part in set(parts) if part.is_file())


def open_deployment(path: Path, *, trust_library: bool = False) -> Deployment:
    """Read what `path` is; raises `BadInput` when no engine could run it as a language model.

    So it does when graph, weights, settings or operators are not those that were exported, and for
    a library of operators that is not ours unless `trust_library` (see loading.py).
    """
    check_path(path)
    if not path.exists():
        raise BadInput(f"The deployment {path} does not exist.", "Make it with owl export.")
    if not path.is_dir():
        raise BadInput(f"{path} is a file.", "Give the deployment's folder.")
    folder = Folder(path)
    manifest = folder.manifest or DeploymentManifest()
    if not folder.has_model:
        raise BadInput(
            f"{path} is not a deployment: it has no {folder.model_file}.",
            what_it_is(path) or "Make it with owl export.",
        )
    library = folder.check(trust=trust_library)
    _check_config(path / "config.json")
    if folder.engine is not None:
        target, vocab = folder.engine.targets[0], _configured_vocabulary(folder)
    else:
        target, vocab = _described(folder, manifest.target)
    if engine_for(target).operators:
        kernels()  # to hear of a wrong OWL_ISA before an engine starts
    return Deployment(path, target, vocab, manifest, library, folder=folder)


def _check_config(file: Path) -> None:
    """Raise `BadInput` for a config.json that cannot be read: engines ask it how prompts are run,
    and would run them otherwise without one.
    """
    if file.exists():
        if not file.is_file():
            raise BadInput(f"{file} is no file.", "Export again.")
        read_object(file, "Export again.")


def text_of(recorded: Mapping[str, Any]) -> str:
    """What tells the text of a `recorded` perplexity from others: the digest of its tokens, and the
    length of its windows; "" where nothing says.
    """
    digest, window = recorded.get("token_ids_sha256"), recorded.get("window")
    # The same tokens in shorter windows are predicted from less, which is another perplexity.
    return f"{digest} in windows of {window}" if digest and window else str(digest or "")


def told_numbers(file: Path, key: str) -> list[int]:
    """The numbers, one or a list, that a JSON file has for `key`; none where it is not there."""
    return _listed(read_object(file, "Export again.").get(key) if file.is_file() else None, file)


def seen_of(folder: Path, window: int) -> int:
    """The tokens of a `window` that the model in `folder` takes: all, or as many as it can."""
    return min((window, *told_numbers(folder / "config.json", "max_position_embeddings")))


def _listed(told: Any, file: Path) -> list[int]:  # noqa: ANN401 - a JSON value
    """The numbers that `file` told; raises `BadInput` for what are none."""
    every = told if isinstance(told, list) else [told] if told is not None else []
    for one in every:
        if type(one) is not int:
            raise BadInput(f"{file} has {reprlib.repr(one)} for a number.", "Export again.")
    return every


def _configured_vocabulary(folder: Folder) -> int:
    """The size that config.json tells, or else the engine's row."""
    told = told_numbers(folder.path / "config.json", "vocab_size")
    return max(told, default=0) or (folder.engine.vocabulary if folder.engine else 0)


def _described(folder: Folder, target: str | None) -> tuple[str, int]:
    """A graph's target and the size of its vocabulary; raises `BadInput` for what is no decoder."""
    graph = folder.graph
    inputs = {value.name for value in graph.input}
    if "input_ids" not in inputs or not any(name.startswith("past_key_values.") for name in inputs):
        raise BadInput(
            f"{folder.path / MODEL} is not a decoder with a KV cache: it has the inputs "
            f"{', '.join(sorted(inputs)[:4]) or '(none)'}.",
            "Export the checkpoint with owl export.",
        )
    if target is None:  # a folder that has no manifest
        is_traced = "causal_mask" in inputs and not folder.settings
        target = "deepsparse" if is_traced else "owl" if folder.library else "onnxruntime"
    if target not in known_targets():
        place = folder.path / "owl.json"
        raise unknown_name(f"target (in {place})", target, known_targets())
    shapes = (x.type.tensor_type.shape.dim for x in graph.output if x.name == "logits")
    width = next((shape[-1].dim_value for shape in shapes if shape), 0)
    return target, width or folder.number("vocab_size")
