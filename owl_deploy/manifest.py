"""What `owl.json` says, checked once where it is read: the fields that anything of owl reads.

A manifest may hold more than that, and less: those of other versions are read as well.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from owl_deploy.errors import invalid


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Block(_Part):
    name: str
    achieved: FiniteFloat
    sparsity: FiniteFloat | None = None
    outlier_ratio: FiniteFloat | None = None


class _Pruning(_Part):
    skip: list[str] = []


class _Perplexity(_Part):
    value: FiniteFloat


class _Checkpoint(_Part):
    path: str
    weights_sha256: str


class _Loss(_Part):
    before: FiniteFloat
    after: FiniteFloat


class _Method(_Part):
    method: str


class _Step(_Part):
    step: int
    loss: FiniteFloat = 0.0
    eval_loss: FiniteFloat = 0.0


class _Finetuning(_Part):
    checkpoint: _Checkpoint
    settings: _Method
    teacher: str | None
    steps: int
    seconds: FiniteFloat
    tokens: int
    held_out_loss: _Loss
    curve: list[_Step]


class _Artefact(_Part):
    """What every artefact may say: checkpoint, adapter, deployment, benchmark, demo input."""

    kind: str | None = None
    perplexity: _Perplexity | None = None
    tasks: dict[str, Any] = {}
    settings: _Pruning = _Pruning()
    blocks: list[_Block] = []
    finetune: _Finetuning | None = None


class _Source(_Part):
    path: str = ""


class _File(_Part):
    sha256: str


class _Deployment(_Artefact):
    target: str | None = None
    precision: str = "fp32"
    values: str | None = None
    sparsity: FiniteFloat | None = None
    source: _Source = _Source()
    files: dict[str, _File] = {}


def check(manifest: dict[str, Any], what: str, way_out: str) -> None:
    """Raise `BadInput`, with `way_out`, when a field of `manifest`, read from `what`, is wrong."""
    # A deployment that other tools made over may have lost its kind; no checkpoint has a target.
    ours = manifest.get("kind") == "deployment" or {"target", "files"} & manifest.keys()
    try:
        (_Deployment if ours else _Artefact).model_validate(manifest)
    except ValidationError as error:
        raise invalid(what, error, way_out) from error
