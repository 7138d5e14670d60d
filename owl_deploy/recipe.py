"""Pruning settings, and their form as a SparseML recipe: the only place that knows both.

A *resolved* recipe names every block with its sparsity, which is the only form that prunes to the
same layer sparsities in every library: SparseML, llm-compressor and the paper's code each measure
outliers a little differently. SparseML's `mask_structure` "n:m" says how many of m weights are
removed; `structure` here says, as the field does, how many are kept.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from owl_deploy.errors import BadInput, unknown_name

METHODS = ("wanda", "magnitude")
ALLOCATIONS = ("owl", "uniform", "list")
UNSTRUCTURED = "unstructured"
_DENSE_MASK = "0:0"  # SparseML's word for unstructured


class PruneSettings(BaseModel):
    """What to prune and how.

    `sparsity`: the share of the blocks' weights that is removed, in [0, 1). `outlier_multiple` and
    `spread` are OWL's M and lambda. `layers`, for the allocation `list`: block name to sparsity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "wanda"
    allocation: str = "owl"
    sparsity: float = 0.7
    structure: str = UNSTRUCTURED
    outlier_multiple: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    spread: float = Field(default=0.08, ge=0, le=0.5, allow_inf_nan=False)
    layers: dict[str, float] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.method not in METHODS:
            raise unknown_name("method", self.method, METHODS)
        if self.allocation not in ALLOCATIONS:
            raise unknown_name("allocation", self.allocation, ALLOCATIONS)
        if (self.allocation == "list") != (self.layers is not None):
            raise BadInput("The allocation 'list' needs one sparsity a layer, from a recipe.")
        for value in (self.sparsity, *(self.layers or {}).values()):
            if not (math.isfinite(value) and 0 <= value < 1):
                raise BadInput(
                    f"A sparsity of {value} is impossible.",
                    "It is the share of weights to remove: from 0 to below 1, such as 0.7.",
                )
        return self


def settings(**values: Any) -> PruneSettings:  # noqa: ANN401 - checked by the model
    """`PruneSettings`, with pydantic's complaints as one `BadInput` sentence."""
    try:
        return PruneSettings(**values)
    except ValidationError as error:
        raise _one_sentence("settings", error) from error


# --- SparseML's grammar ---------------------------------------------------------------------------


class _Modifier(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: list[str] | str = ["__ALL__"]


class _LayerwiseModifier(_Modifier):
    sparsity: float | list[float]
    sparsity_profile: Literal["owl"] | None = None
    owl_m: float | None = None
    owl_lmbda: float | None = None
    mask_structure: str = _DENSE_MASK
    sequential_update: bool = True


class _WandaPruningModifier(_LayerwiseModifier):
    pass


class _MagnitudePruningModifier(_Modifier):
    init_sparsity: float
    final_sparsity: float
    start: float = 0.0
    end: float = 0.0
    update_scheduler: str = "cubic"
    mask_structure: str = UNSTRUCTURED


_MODIFIERS: dict[str, tuple[str, type[_Modifier]]] = {
    "WandaPruningModifier": ("wanda", _WandaPruningModifier),
    "MagnitudePruningModifier": ("magnitude", _MagnitudePruningModifier),
}


def dump_resolved(method: str, layers: Mapping[str, float], comment: str = "") -> str:
    """A resolved recipe as YAML that SparseML 1.8 reads: `layers` is block name to sparsity.

    `layers` must be in model order, since SparseML applies the list in that order.
    """
    if method == "magnitude":
        stage = {
            f"block_{number}_modifiers": {
                "MagnitudePruningModifier": {
                    "init_sparsity": sparsity,
                    "final_sparsity": sparsity,
                    "start": 0.0,
                    "end": 0.0,
                    "mask_structure": UNSTRUCTURED,
                    "targets": [rf"re:{re.escape(name)}\..*_proj\.weight$"],
                }
            }
            for number, (name, sparsity) in enumerate(layers.items())
        }
    else:
        modifier = next(name for name, (ours, _) in _MODIFIERS.items() if ours == method)
        arguments = {
            "sparsity": list(layers.values()),
            "mask_structure": _DENSE_MASK,
            "sequential_update": True,
            "targets": list(layers),
        }
        stage = {"pruning_modifiers": {modifier: arguments}}
    heading = "".join(f"# {line}\n" for line in comment.splitlines())
    return heading + yaml.safe_dump({"oneshot_stage": stage}, sort_keys=False)


def load(source: Path) -> dict[str, Any]:
    """Read a recipe in SparseML's grammar, as keyword arguments of `settings`.

    Raises `BadInput` for what SparseML would drop in silence: unknown keys and arguments, a recipe
    without a stage, top-level keys that are no stage.
    """
    try:
        content = yaml.safe_load(source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"The recipe {source} cannot be read ({error}).") from error
    except yaml.YAMLError as error:
        raise BadInput(f"The recipe {source} is not valid YAML ({error}).") from error
    return _from_modifiers(source, _modifiers(source, content))


def _modifiers(source: Path, content: Any) -> list[tuple[str, _Modifier]]:  # noqa: ANN401
    """Every modifier of the recipe with our method's name, in order."""
    found = []
    stages = content if isinstance(content, dict) else {}
    for stage_name, stage in stages.items():
        if not str(stage_name).endswith("_stage") or not isinstance(stage, dict):
            raise BadInput(
                f"The recipe {source} has a key {stage_name!r} that is no stage.",
                "Only NAME_stage stands at the top of a recipe.",
            )
        for group_name, group in stage.items():
            if group_name == "run_type" and group == "oneshot":
                continue
            if not str(group_name).endswith("_modifiers") or not isinstance(group, dict):
                raise BadInput(
                    f"The recipe {source} has a key {group_name!r} in {stage_name}.",
                    "Only NAME_modifiers stands in a stage.",
                )
            found += [_modifier(source, name, values) for name, values in group.items()]
    if not found:
        raise BadInput(f"The recipe {source} holds no modifier.", "See `owl recipes ls`.")
    return found


def _modifier(source: Path, name: str, values: Any) -> tuple[str, _Modifier]:  # noqa: ANN401
    if name not in _MODIFIERS:
        raise unknown_name(f"modifier in {source}:", name, _MODIFIERS)
    method, kind = _MODIFIERS[name]
    try:
        return method, kind.model_validate(values)
    except ValidationError as error:
        raise _one_sentence(f"{name} in {source}", error) from error


def _from_modifiers(source: Path, found: Sequence[tuple[str, _Modifier]]) -> dict[str, Any]:
    methods = {method for method, _ in found}
    if len(methods) > 1:
        raise BadInput(f"The recipe {source} mixes the methods {', '.join(sorted(methods))}.")
    values: dict[str, Any] = {"method": methods.pop()}
    layers: dict[str, float] = {}
    for _, modifier in found:
        targets = [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets
        if isinstance(modifier, _MagnitudePruningModifier):
            sparsity: float | list[float] = modifier.final_sparsity
        else:
            assert isinstance(modifier, _LayerwiseModifier)
            sparsity = modifier.sparsity
            if modifier.sparsity_profile == "owl":
                values |= _owl_arguments(source, modifier)
        if isinstance(sparsity, list):
            if len(sparsity) != len(targets):
                raise BadInput(
                    f"The recipe {source} has {len(sparsity)} sparsities, {len(targets)} targets."
                )
            layers |= dict(zip(targets, sparsity, strict=True))
        elif len(found) > 1:
            layers |= {_block_of(source, target): sparsity for target in targets}
        else:
            values.setdefault("allocation", "uniform")
            values["sparsity"] = sparsity
    if layers:
        values |= {"allocation": "list", "layers": layers}
    return values


def _owl_arguments(source: Path, modifier: _LayerwiseModifier) -> dict[str, Any]:
    if modifier.owl_m is None or modifier.owl_lmbda is None or isinstance(modifier.sparsity, list):
        raise BadInput(f"The profile owl in {source} needs owl_m, owl_lmbda and one sparsity.")
    return {
        "allocation": "owl",
        "outlier_multiple": modifier.owl_m,
        "spread": modifier.owl_lmbda,
    }


def _block_of(source: Path, target: str) -> str:
    r"""The block that a target of ours means: re:model\.layers\.3\..* -> model.layers.3."""
    match = re.match(r"(?:re:)?((?:\w+\.)+\d+)", target.replace("\\", ""))
    if match is None:
        raise BadInput(f"The recipe {source} has a target {target!r} that names no block.")
    return match[1]


def _one_sentence(what: str, error: ValidationError) -> BadInput:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return BadInput(f"Unknown key {place!r} in {what}.", "Unknown keys are never ignored.")
    return BadInput(f"{what}: {place}: {first['msg']}.")
