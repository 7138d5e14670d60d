"""What `owl.json` says of the artefact that it lies in: one frozen model for each kind.

`schema_version` is the number of the format. A manifest of an earlier one is read by `_upgraded`,
one of a later one is refused. Fields that a model does not name are kept as they are, since other
tools add theirs; what nobody set is left out of the file. Earlier versions wrote `tuning`, what a
search had tried, and allocations that are gone.
"""

import contextlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from owl_deploy import __version__
from owl_deploy.errors import BadInput, invalid
from owl_deploy.utils.artefact import MANIFEST, read_object, write_json

VERSION: Final = 1
_AGAIN = "Make the artefact again."


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Manifest(_Part):
    """What every artefact says. `versions`: of the packages that decided what it holds.

    `measured`: what earlier versions kept here of measurements, which lie beside it now.
    """

    USE: ClassVar[str] = ""  # for who gave it to the wrong verb

    kind: str
    schema_version: Literal[1] = VERSION
    versions: dict[str, str] = {}
    measured: dict[str, Any] = {}

    def to_json(self) -> dict[str, Any]:
        """What is known, as JSON values."""
        head = {"kind": self.kind, "schema_version": self.schema_version}
        return head | self.model_dump(mode="json", exclude_unset=True)

    def write(self, folder: Path) -> None:
        """Write it into the artefact's folder."""
        write_json(folder / MANIFEST, self.to_json())


class Cost(_Part):
    """What a Linear would take in a format, `bits` and `sparsity`, and cost.

    `bytes`: packed. `loss`: what the model loses by that, in nats a token. `microseconds`: what a
    token's product takes here, where the budget was of time.
    """

    bits: int
    sparsity: FiniteFloat
    bytes: int
    loss: FiniteFloat
    microseconds: FiniteFloat | None = None


class Spent(_Part):
    """What the formats that a budget chose take packed, and what the model is expected to lose by
    them, in nats a token. `speed_up`: of its weights' products over dense int8's on the machine
    that pruned, where the budget asked for one.
    """

    bytes: int
    loss: FiniteFloat
    speed_up: FiniteFloat | None = None


class Linear(_Part):
    """The shares of a Linear's weights that were asked to go, and went.

    `bits`: what is left was rounded to, if it was. `whole`: whether nothing had been removed before
    that, so that its zeros are integers like others. `costs`: what a budget chose from.
    """

    achieved: FiniteFloat
    sparsity: FiniteFloat
    weights: int
    bits: int | None = None
    whole: bool | None = None
    costs: tuple[Cost, ...] | None = None


class TrainedHalf(_Part):
    """A half of a block that was trained to give the dense one's output: its error on held-out text
    `before` and `after`, as a share of the output's squared norm, the mean over tokens. `epochs`:
    after how many the weights that were kept stood; 0 where it was put back.
    """

    before: FiniteFloat
    after: FiniteFloat
    epochs: int


class BlockShares(_Part):
    """A block of a pruned model: the shares of its weights that were asked to go and went.

    `outlier_ratio`: in percent, None where the allocation did not ask for it.
    """

    name: str
    achieved: FiniteFloat
    sparsity: FiniteFloat
    outlier_ratio: FiniteFloat | None = None


class Block(BlockShares):
    """A block of a pruned model, or its head: the shares of its weights that were asked to go and
    went. `outlier_ratio`: in percent, None where the allocation did not ask for it. `linears`: the
    same of each of its Linears that was pruned, by name. `halves`: those that were reconstructed.
    """

    weights: int = 0
    linears: dict[str, Linear] = {}
    halves: dict[str, TrainedHalf] = {}


class Shares(_Part):
    """The share of all weights in the blocks that was asked to go, and that went."""

    asked: FiniteFloat = 0.0
    achieved: FiniteFloat = 0.0


class Pruning(_Part):
    """The settings that decided what was pruned; those of `prune_settings.PruneSettings`.

    `bits`: what survives is rounded to, with a scale for every `bits_group` columns of a row.
    `structure`: "N:M", or "unstructured".
    `budget`: what the weights may take, by which each Linear got bits and a sparsity of its own.
    `head_bits`: what the output head was rounded to, if it was by itself.
    `reconstruct`: the most epochs for which a half of a block was trained.
    `asymmetric`: Linears made up for what those before them had lost, too.
    """

    method: str = ""
    allocation: str = ""
    sparsity: FiniteFloat = 0.0
    structure: str = "unstructured"
    skip: tuple[str, ...] = ()
    bits: int | None = None
    bits_group: int | None = None
    budget: str | None = None
    head_bits: int | None = None
    reconstruct: int | None = None
    asymmetric: bool = False
    options: dict[str, Any] = {}


class TrainedOn(_Part):
    """The checkpoint that was fine-tuned, and one digest of its weight files."""

    path: str
    weights_sha256: str


class HeldOutLoss(_Part):
    """The cross-entropy of held-out text, in nats a token; and the `teacher`'s own, if any."""

    before: FiniteFloat
    after: FiniteFloat
    teacher: FiniteFloat | None = None


class Training(_Part):
    """How it was fine-tuned; those of `finetune.settings.FinetuneSettings`."""

    method: str


class Step(_Part):
    """A row of the learning curve, in nats a token; a step has the one loss, or the other."""

    step: int
    loss: FiniteFloat | None = None
    eval_loss: FiniteFloat | None = None


class Finetuning(_Part):
    """What a fine-tuning did. `tokens`: that it read; `teacher`: the dense model, if any.

    `tokens_per_second`: in its steps, evaluations left out. `processes`: how many shared it.
    """

    checkpoint: TrainedOn
    settings: Training
    teacher: str | None
    steps: int
    seconds: FiniteFloat
    tokens: int
    tokens_per_second: FiniteFloat | None = None
    processes: int = 1
    held_out_loss: HeldOutLoss
    curve: tuple[Step, ...]


class CheckpointManifest(Manifest):
    """A checkpoint that was pruned, fine-tuned, or both.

    `source`: the model that was pruned, with its own manifest if it had one. `weights`: how many
    there are in the blocks. `spent`: of a budget. `recipe`: the file that the settings came from,
    with its digest. `processes`: how many pruned it together, by which sums are rounded.
    """

    USE = "It is a checkpoint: owl prune, owl export, owl eval and owl finetune take it."

    kind: Literal["checkpoint"] = "checkpoint"
    command: tuple[str, ...] = ()
    source: str = ""
    source_manifest: dict[str, Any] | None = None
    settings: Pruning = Pruning()
    calibration: dict[str, Any] | None = None
    device: str = ""
    dtype: str = ""
    weights: int = 0
    sparsity: Shares = Shares()
    blocks: tuple[Block, ...] = ()
    head: Block | None = None
    spent: Spent | None = None
    wall_seconds: FiniteFloat = 0.0
    peak_memory_bytes: int = 0
    peak_device_memory_bytes: int | None = None
    recipe: dict[str, Any] | None = None
    resumed: bool = False
    processes: int = 1
    finetune: Finetuning | None = None

    @property
    def linears(self) -> dict[str, Linear]:
        """What is told of the blocks' Linears, by their names in the model."""
        return {
            f"{block.name}.{name}": one
            for block in self.blocks
            for name, one in block.linears.items()
        }


class AdapterManifest(Manifest):
    """A LoRA adapter, in PEFT's format."""

    USE = (
        "It is an adapter: owl eval CHECKPOINT --adapter takes it. To deploy it, train with owl "
        "finetune --merge masked, or merge it with PEFT's merge_and_unload: owl export takes what "
        "either saves."
    )

    kind: Literal["adapter"] = "adapter"
    finetune: Finetuning | None = None


class File(_Part):
    """A file of a deployment, as it was exported."""

    sha256: str
    bytes: int | None = None


class Weight(_Part):
    """A weight of two axes or more: how many values it has, and how many that are not zero."""

    kind: str
    shape: tuple[int, ...]
    values: int
    nonzeros: int


class Source(_Part):
    """The checkpoint that was exported, the short fields of its manifest, and of its blocks."""

    path: str = ""
    model_type: str = ""
    parameters: int = 0
    manifest: dict[str, Any] | None = None
    blocks: tuple[BlockShares, ...] = ()


class Parity(_Part):
    """How far a deployment is from PyTorch: by run (an engine and its way of computing), the
    largest difference over the largest logit, and the share of tokens that are the same.

    `tolerance`: of that difference; None where it was only told.
    """

    tolerance: FiniteFloat | None = None
    greedy_tokens: int = 0
    runs: dict[str, dict[str, int | FiniteFloat]] = {}


class DeploymentManifest(Manifest):
    """A deployment: what it was exported from, what is in it, and how near to PyTorch it is.

    `total`, `nonzeros` and `sparsity` are over the weights of the linear layers, the head among
    them. `weights` and `files`: by name. `max_context`: in tokens. `calibration`: the text that
    what was rounded was weighed by, if there was one.
    """

    USE = "It is a deployment: owl generate, owl eval and owl bench take it."

    kind: Literal["deployment"] = "deployment"
    target: str | None = None
    precision: str = "unknown"
    engine: str | None = None
    graph: str = ""
    max_context: int | None = None
    note: str = ""
    source: Source = Source()
    parity: Parity = Parity()
    nodes: dict[str, int] = {}
    weights: dict[str, Weight] = {}
    calibration: dict[str, Any] | None = None
    total: int = 0
    nonzeros: int = 0
    sparsity: FiniteFloat | None = None
    quantization: dict[str, int] | None = None
    files: dict[str, File] = {}
    bytes: int = 0
    seconds: FiniteFloat = 0.0


class BenchmarkManifest(Manifest):
    """A benchmark's folder, whose result.json has a model of its own (`bench.result.Result`)."""

    USE = "It is a benchmark's result: owl report takes it."

    kind: Literal["benchmark"] = "benchmark"
    created: str = ""


class DemoInputManifest(Manifest):
    """The demo's model and texts; `version` is that of their conversion."""

    kind: Literal["demo input"] = "demo input"
    version: int = 0


_KINDS: dict[str, type[Manifest]] = {
    "checkpoint": CheckpointManifest,
    "adapter": AdapterManifest,
    "deployment": DeploymentManifest,
    "benchmark": BenchmarkManifest,
    "demo input": DemoInputManifest,
}
_Kind = TypeVar("_Kind", bound=Manifest)


def read_manifest(folder: Path, kind: type[_Kind]) -> _Kind | None:
    """The manifest in `folder`; None where there is none, or one of another `kind`.

    Raises `BadInput` when there is one that cannot be read, or that a later version wrote.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    content = _upgraded(read_object(path, _AGAIN), str(path))
    try:
        model = _KINDS.get(str(content.get("kind")), Manifest)
        manifest = model.model_validate(content)
    except ValidationError as error:
        raise invalid(str(path), error, _AGAIN) from error
    return manifest if isinstance(manifest, kind) else None


def refuse_newer(content: dict[str, Any], newest: int, what: str) -> None:
    """Raise `BadInput` where `content`, read from `what`, has a format later than `newest`."""
    found = content.get("schema_version")
    if isinstance(found, int) and found > newest:
        raise BadInput(
            f"{what} has format {found}, and this version of owl ({__version__}) reads formats up "
            f"to {newest}.",
            "Update owl-deploy, or make the artefact again with this version.",
        )


def _upgraded(content: dict[str, Any], what: str) -> dict[str, Any]:
    """`content` in the current format, from that or any earlier one."""
    refuse_newer(content, VERSION, what)
    if "schema_version" in content:
        return content
    # 0.1.0.dev numbered no format.
    content = dict(content)
    # A deployment that other tools made over may have lost its kind; no checkpoint has a target.
    ours = {"target", "files"} & content.keys()
    content.setdefault("kind", "deployment" if ours else "checkpoint")
    packed = content.pop("values", None)  # for owl, beside a "precision" that was fp32 always
    if packed is not None:
        content["precision"] = packed
    kept = {name: content.pop(name) for name in ("perplexity", "tasks") if name in content}
    if kept:
        content["measured"] = kept
    if content["kind"] == "benchmark":
        content.pop("schema", None)
    return content


def what_it_is(folder: Path) -> str:
    """A sentence for who gave `folder` to the wrong verb: what it is, and which verbs take it."""
    manifest = read_manifest(folder, Manifest)
    if manifest is not None and type(manifest) is not CheckpointManifest:
        return manifest.USE
    for file, kind in (
        ("model.onnx", DeploymentManifest),
        ("result.json", BenchmarkManifest),
        ("adapter_config.json", AdapterManifest),
        ("config.json", CheckpointManifest),
    ):
        if (folder / file).is_file():
            return kind.USE
    return manifest.USE if manifest else ""


def versions() -> dict[str, str]:
    """The versions that decide what an artefact holds, for its manifest."""
    found = {"owl-deploy": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime-genai"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
