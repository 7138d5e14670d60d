"""Pruning settings in their form as a SparseML recipe: the only place that knows both.

A *resolved* recipe names every block with its sparsity, which is the only form that prunes to the
same layer sparsities in every library: SparseML, llm-compressor and the paper's code each measure
outliers a little differently. SparseML's `mask_structure` "n:m" says how many of m weights are
removed; `structure` here says, as the field does, how many are kept.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from owl_deploy.compression.allocation.rules import ALLOCATIONS, check_not_gone
from owl_deploy.compression.methods import METHODS, Modifier, Options
from owl_deploy.compression.settings import (
    UNSTRUCTURED,
    PruneSettings,
    in_group,
    kept,
    parse_structure,
)
from owl_deploy.errors import BadInput, first_line, invalid, option, unknown_name
from owl_deploy.models.families import FAMILIES, heads
from owl_deploy.utils.artefact import sha256

RESOLVED = "recipe.yaml"  # in a checkpoint
_DENSE_MASK = "0:0"  # SparseML's word for unstructured
_ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear")  # the last is llm-compressor's
_SAME = 1e-6  # of sparsities
_WEIGHT_NAMES = ("a.weight", "b.9.c.weight")  # a pattern that takes both takes every weight


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parents[1]
    folder = package / "recipes"  # in a wheel
    if not folder.is_dir():
        folder = package.parent / "recipes"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """A recipe's file: `name` is a path, a checkpoint with one, or the name of a shipped recipe."""
    known = shipped()
    if Path(name).is_file():
        return Path(name)
    if str(name) in known:
        return known[str(name)]
    if not Path(name).is_dir():
        raise unknown_name("recipe", str(name), known)
    if not (Path(name) / RESOLVED).is_file():
        raise BadInput(
            f"{name} holds no {RESOLVED}.",
            "What owl prune wrote has one, if SparseML has a modifier that prunes as its method "
            "does.",
        )
    return Path(name) / RESOLVED


def merged(recipe: str | Path | None, overrides: dict[str, Any]) -> PruneSettings:
    """The settings of a recipe (see `find`) with `overrides` put over them.

    A recipe's options of a method, and the numbers of its allocation, go with it when another is
    asked for.
    """
    values = load(find(recipe)) if recipe else {}
    if strange := [name for name in overrides if not isinstance(name, str)]:
        raise BadInput(f"The settings name {strange[0]!r}, which is no name.")
    if overrides.get("method", values.get("method")) != values.get("method"):
        values.pop("options", None)
    if overrides.get("allocation", values.get("allocation")) != values.get("allocation"):
        for name in ("spread", "outlier_multiple"):
            values.pop(name, None)
    check_not_gone(overrides.get("allocation"))
    options = overrides.get("options", {})
    if isinstance(options, Mapping):  # else it is refused with the rest
        options = {**values.get("options", {}), **options}
    group = parse_structure(values.get("structure", UNSTRUCTURED))
    if group and overrides.get("structure") == UNSTRUCTURED and overrides.get("budget") is None:
        values["sparsity"] = 1 - group[0] / group[1]  # which the structure alone has said
    if "layers" in values:
        _check_removes(recipe, overrides)
        _check_list(recipe, values, overrides)
    if "layers" in values:  # still: it has no sparsity for what the recipe skips
        overrides = _with_skipped(values.get("skip", ()), overrides)
    if parse_structure(overrides.get("structure", UNSTRUCTURED)):
        values.pop("sparsity", None)
    found = PruneSettings.checked(**(values | overrides | {"options": options}))
    row = ALLOCATIONS[found.allocation]
    for name, means in (("spread", row.spread), ("outlier_multiple", row.counts_outliers)):
        if overrides.get(name) is not None and not means:
            raise BadInput(
                f"{option(name)} means nothing to the allocation {found.allocation}.",
                "Leave it out, or give another --allocation.",
            )
    return found


def _check_removes(recipe: str | Path | None, overrides: dict[str, Any]) -> None:
    """Raise `BadInput` where a list of sparsities is to go with what has a use for none."""
    why, method = "", METHODS.get(overrides.get("method", ""))
    if overrides.get("budget") is not None:
        why = "a budget finds that out itself"
    elif method is not None and not method.removes:
        why = f"the method {overrides['method']} removes nothing"
    if why:
        raise BadInput(
            f"{recipe} lists what to remove of each layer, and {why}.", "Leave out --recipe."
        )


def _check_list(
    recipe: str | Path | None, values: dict[str, Any], overrides: dict[str, Any]
) -> None:
    """Take a recipe's list of sparsities out of its `values` where a rule is put over it.

    Raises `BadInput` where what is put over it does not say enough, or means another list.
    """
    if "allocation" in overrides or "sparsity" in overrides:
        del values["layers"], values["allocation"]
        both = values | overrides
        group = parse_structure(both.get("structure", UNSTRUCTURED))
        if not group and not {"sparsity", "budget"} & both.keys():
            raise BadInput(
                f"The recipe {recipe} lists each layer's sparsity, and --allocation divides one.",
                "Give --sparsity as well.",
            )
    elif parse_structure(overrides.get("structure", UNSTRUCTURED)) and (
        overrides["structure"] != values.get("structure")
    ):
        raise BadInput(
            f"The recipe {recipe} lists each layer's sparsity, and the structure "
            f"{overrides['structure']} is another.",
            "Give --allocation as well, for one that divides it anew.",
        )


def _with_skipped(skip: tuple[str, ...], overrides: dict[str, Any]) -> dict[str, Any]:
    """The `overrides`, which leave dense what they name and what the recipe does, its `skip`."""
    given = overrides.get("skip")
    if not isinstance(given, (tuple, list)):
        return overrides
    return overrides | {"skip": tuple(dict.fromkeys((*skip, *given)))}


def origin(recipe: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a manifest says of settings that a recipe gave: which, and what was put over it."""
    file = find(recipe)
    return {"file": file.name, "sha256": sha256(file), "overrides": overrides}


# --- SparseML's grammar ---------------------------------------------------------------------------


class _Modifier(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: list[str] | str = "__ALL__"
    ignore: list[str] = []  # llm-compressor has it, SparseML 1.8 passes over it
    mask_structure: str = _DENSE_MASK
    # SparseML knows the profile for Wanda and SparseGPT; here it goes with magnitude as well.
    sparsity_profile: Literal["owl"] | None = None
    owl_m: float | None = None
    owl_lmbda: float | None = None


class _LayerwiseModifier(_Modifier):
    sparsity: float | list[float]
    sequential_update: Literal[True] = True


class _TrainingModifier(_Modifier):
    init_sparsity: float
    final_sparsity: float
    start: float = 0.0
    end: float = 0.0
    update_scheduler: str = "cubic"


_FORMS: Mapping[str, type[_Modifier]] = MappingProxyType(
    {"layerwise": _LayerwiseModifier, "training": _TrainingModifier}
)


def _grammar() -> dict[str, tuple[str, type[_Modifier]]]:
    """SparseML's modifiers by name: the method that each means, and what it may hold."""
    found: dict[str, tuple[str, type[_Modifier]]] = {}
    for method, row in METHODS.items():
        if row.modifier is not None and row.modifier.name not in found:
            found[row.modifier.name] = method, _grammar_of(row.modifier, row.options)
    return found


def _grammar_of(modifier: Modifier, options: type[Options]) -> type[_Modifier]:
    fields: dict[str, Any] = {}
    for ours, theirs in modifier.arguments.items():
        one = options.model_fields[ours]
        fields[theirs] = (one.annotation, one)
    return create_model(modifier.name, __base__=_FORMS[modifier.form], **fields)


def dump_resolved(settings: PruneSettings, layers: Mapping[str, float]) -> str:
    """A resolved recipe as YAML that SparseML 1.8 reads.

    `layers`: target (a block, or a Linear) to sparsity, in model order, since SparseML applies a
    list in that order. Each modifier stands once in a group, so targets with different N:M, and
    those of magnitude, which takes no list, have a group each. What was skipped is no target: a
    target of sparsity 0 may be rounded, refitted or trained, and SparseML's SparseGPT takes some
    weights of it.
    """
    modifier = METHODS[settings.method].modifier
    if modifier is None:
        raise BadInput(
            f"SparseML has nothing that prunes as {settings.method} does.",
            "A recipe that reproduces it cannot be written.",
        )
    group = settings.group
    options = {theirs: getattr(settings.options, our) for our, theirs in modifier.arguments.items()}
    if skip := [name for name in settings.skip if name not in heads()]:  # a head is dense unnamed
        options["ignore"] = skip
    if group is not None:
        layers = {target: in_group(value, group[1]) for target, value in layers.items()}
    stage: dict[str, Any] = {}
    if modifier.form == "training":
        for number, (target, sparsity) in enumerate(layers.items()):
            own = None if group is None else (kept(sparsity, group[1]), group[1])
            values = _dump_training(target, sparsity, own) | options
            stage[f"layer_{number}_modifiers"] = {modifier.name: values}
    elif group is None:
        values = _dump_layerwise(layers, None) | options
        stage["pruning_modifiers"] = {modifier.name: values}
    else:
        for number in sorted({kept(value, group[1]) for value in layers.values()}):
            same = {name: s for name, s in layers.items() if kept(s, group[1]) == number}
            values = _dump_layerwise(same, (number, group[1])) | options
            stage[f"keep_{number}_of_{group[1]}_modifiers"] = {modifier.name: values}
    heading = "".join(f"# {line}\n" for line in _describe(settings, modifier))
    return heading + yaml.safe_dump({"oneshot_stage": stage}, sort_keys=False)


def _dump_layerwise(layers: Mapping[str, float], group: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "sparsity": list(layers.values()),
        "mask_structure": mask_structure(group),
        "sequential_update": True,
        "targets": list(layers),
    }


_WEIGHTS = r"\.(?!.*norm)(.*\.)?weight$"  # a target names tensors here: norms have weights too


def _dump_training(target: str, sparsity: float, group: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "init_sparsity": sparsity,
        "final_sparsity": sparsity,
        "start": 0.0,
        "end": 1.0,  # SparseML never starts a modifier whose end is no later than its start
        "mask_structure": UNSTRUCTURED if group is None else mask_structure(group),
        "targets": [rf"re:{re.escape(target)}{_WEIGHTS}"],
    }


def mask_structure(group: tuple[int, int] | None) -> str:
    """SparseML's name for a structure: "0:0", or how many are *removed* of how many."""
    return _DENSE_MASK if group is None else f"{group[1] - group[0]}:{group[1]}"


def _describe(settings: PruneSettings, modifier: Modifier) -> list[str]:
    lines = [
        f"Resolved by owl prune: {settings.method}, {settings.allocation}, {settings.structure}, "
        f"{settings.sparsity:.4g} of the weights removed."
    ]
    if ALLOCATIONS[settings.allocation].counts_outliers:
        lines.append(f"Outlier multiple (M) {settings.outlier_multiple:g}.")
    if settings.spread:
        lines.append(f"Spread (lambda) {settings.spread:g}.")
    if settings.rounds:
        bits = settings.bits or "8, 4 or 3"
        head = f", the output head to {settings.head_bits}" if settings.head_bits else ""
        lines.append(f"Rounded to {bits} bits as well{head}, which SparseML does another way.")
    if settings.head_sparsity is not None:
        lines.append(f"Of the output head {settings.head_sparsity:.4g}.")
    if modifier.remark:
        lines.append(modifier.remark)
    if settings.refit:
        lines.append("SparseML knows no refit of the weights that are left.")
    if settings.asymmetric:
        lines.append("Each layer made up for what those before it lost, too: not so in SparseML.")
    if settings.reconstruct:
        lines.append("Then reconstructed, half a block at a time, which SparseML does not know.")
    return lines


def load(source: Path) -> dict[str, Any]:
    """Read a recipe in SparseML's grammar, as keyword arguments of `PruneSettings`.

    Raises `BadInput` for what SparseML would drop in silence: unknown keys and arguments, a recipe
    without a stage, top-level keys that are no stage.
    """
    return _from_modifiers(source, _modifiers(source, read_yaml(source)))


def read(path: Path) -> str:
    """The text of a file; raises `BadInput` for one that cannot be read, or is none."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadInput(f"{path} cannot be read ({error.strerror}).", "Check the path.") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} cannot be read (it is not UTF-8).", "Save it as UTF-8.") from error


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any YAML value
    """The content of a YAML file; raises `BadInput` for one that cannot be read."""
    text = read(path)
    try:
        return yaml.safe_load(text)
    except Exception as error:  # dates, numbers, depth: PyYAML raises many types beside its own
        raise BadInput(f"{path} is not valid YAML ({first_line(error)}).") from error


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
    known = _grammar()
    if name not in known:
        raise unknown_name(f"modifier in {source}:", str(name), known)
    method, kind = known[name]
    try:
        return method, kind.model_validate(values)
    except ValidationError as error:
        raise invalid(f"{name} in {source}", error) from error


def _from_modifiers(source: Path, found: Sequence[tuple[str, _Modifier]]) -> dict[str, Any]:
    methods = {method for method, _ in found}
    if len(methods) > 1:
        raise BadInput(f"The recipe {source} mixes the methods {', '.join(sorted(methods))}.")
    values: dict[str, Any] = {"method": methods.pop()}
    layers: dict[str, float] = {}
    # A head's own does not count: it stays dense mostly.
    of_blocks = [one for _, one in found if not heads().issuperset(map(_layer_of, _targets(one)))]
    groups = {_group_of(modifier.mask_structure) for modifier in of_blocks}
    arguments = [_arguments(source, method, modifier) for method, modifier in found]
    if any(one != arguments[0] for one in arguments):
        raise BadInput(f"The modifiers of the recipe {source} differ in more than sparsities.")
    values |= arguments[0]
    for _, modifier in found:
        targets, sparsity = _targets(modifier), _sparsity(modifier)
        _check_modifier(source, modifier)
        if isinstance(sparsity, list):
            layers |= dict(zip(targets, sparsity, strict=True))
        elif all(_layer_of(target) for target in targets):
            layers |= {str(_layer_of(target)): sparsity for target in targets}
        elif len(found) > 1:
            raise BadInput(
                f"The recipe {source} has several modifiers, one of which names no layers.",
                "Several modifiers need targets such as model.layers.3 each.",
            )
        else:
            _check_whole(source, targets)
            values.setdefault("allocation", "uniform")
            if None in groups:
                values["sparsity"] = sparsity
    of_head = [layers.pop(name) for name in sorted(heads() & layers.keys())]
    if of_head and not layers:
        raise BadInput(
            f"The recipe {source} names the head alone.",
            "Name the blocks as well, or use --head-sparsity with another recipe.",
        )
    if of_head:
        values["head_sparsity"] = of_head[0]
    if layers:
        if any(modifier.sparsity_profile for modifier in of_blocks):
            raise BadInput(
                f"The recipe {source} names layers, and lets OWL divide their sparsity.",
                "Leave out sparsity_profile, owl_m and owl_lmbda, or say __ALL__ for the targets.",
            )
        values |= {"allocation": "list", "layers": layers}
    return values | _structure(source, groups)


def _check_modifier(source: Path, modifier: _Modifier) -> None:
    """Raise `BadInput` where targets and sparsities do not match, or contradict the N:M."""
    targets, sparsity = _targets(modifier), _sparsity(modifier)
    if not targets:
        raise BadInput(f"A modifier of the recipe {source} has no targets.")
    each = sparsity if isinstance(sparsity, list) else [sparsity] * len(targets)
    if len(each) != len(targets):
        raise BadInput(f"The recipe {source} has {len(each)} sparsities, {len(targets)} targets.")
    group = _group_of(modifier.mask_structure)
    if group is None:
        return
    left, size = group
    for target, one in zip(targets, each, strict=True):
        # Earlier versions wrote a head's as it was asked for, beside the N:M nearest to it.
        slack = 0.5 / size if _layer_of(target) in heads() else 0.0
        if abs(one - (1 - left / size)) > slack + _SAME:
            raise BadInput(
                f"The recipe {source} has a sparsity of {one:g}, which contradicts its structure, "
                f"{size - left} removed of {size}."
            )


def _check_whole(source: Path, targets: Sequence[str]) -> None:
    """Raise `BadInput` where a modifier without layers means not all."""
    for target in targets:
        if not _means_all(target):
            raise BadInput(
                f"The recipe {source} has the target {target!r}, which is neither a layer nor all.",
                "Name layers, such as model.layers.3.mlp.up_proj, or say __ALL__.",
            )


def _means_all(target: str) -> bool:
    """Whether a target is a word for all, or a pattern that matches all blocks, or all weights."""
    if not target.startswith("re:"):
        return target in _ALL
    try:
        pattern = re.compile(target.removeprefix("re:"))
    except re.error:
        return False
    blocks = {family.blocks for family in FAMILIES.values()}
    # With every first and every second digit, since a match may end anywhere.
    several = [[f"{name}.{index}" for index in range(100)] for name in blocks]
    return any(all(map(pattern.match, names)) for names in (*several, _WEIGHT_NAMES))


def _targets(modifier: _Modifier) -> list[str]:
    return [modifier.targets] if isinstance(modifier.targets, str) else modifier.targets


def _sparsity(modifier: _Modifier) -> float | list[float]:
    if isinstance(modifier, _TrainingModifier):
        return modifier.final_sparsity
    assert isinstance(modifier, _LayerwiseModifier)
    return modifier.sparsity


def _group_of(structure: str) -> tuple[int, int] | None:
    """(kept, size) of a `mask_structure`, which says removed:size."""
    if structure in (_DENSE_MASK, UNSTRUCTURED):
        return None
    # Of a mixed N:M, a dense part.
    if match := re.fullmatch(r"0:(0*[1-9]\d{0,8})", structure, re.ASCII):
        return int(match[1]), int(match[1])
    removed, size = parse_structure(structure) or (0, 0)
    return size - removed, size


def _structure(source: Path, groups: set[tuple[int, int] | None]) -> dict[str, Any]:
    """One structure for all modifiers; mixed N:M is named by the N nearest to its mean."""
    known = [group for group in groups if group is not None]
    if not known:
        return {}
    if len({size for _, size in known}) > 1 or None in groups:
        raise BadInput(f"The recipe {source} mixes structures with different M.")
    mean, size = round(sum(left for left, _ in known) / len(known)), known[0][1]
    if all(left == size for left, _ in known):
        raise BadInput(
            f"The recipe {source} removes nothing: its mask_structure is 0:{size}.",
            f"It says how many of {size} are removed.",
        )
    return {"structure": f"{min(mean, size - 1)}:{size}"}


def _arguments(source: Path, method: str, modifier: _Modifier) -> dict[str, Any]:
    """The settings that a modifier holds besides its sparsity."""
    row = METHODS[method].modifier
    assert row is not None
    found: dict[str, Any] = {}
    if row.arguments:
        found["options"] = {
            ours: getattr(modifier, theirs) for ours, theirs in row.arguments.items()
        }
    if modifier.ignore:
        found["skip"] = tuple(
            name.removeprefix("re:.*").removesuffix("$") for name in modifier.ignore
        )
    if modifier.sparsity_profile == "owl":
        if (
            modifier.owl_m is None
            or modifier.owl_lmbda is None
            or isinstance(_sparsity(modifier), list)
        ):
            raise BadInput(f"The profile owl in {source} needs owl_m, owl_lmbda and one sparsity.")
        found["allocation"] = "owl"
        found["outlier_multiple"] = modifier.owl_m
        found["spread"] = modifier.owl_lmbda
    elif modifier.owl_m is not None or modifier.owl_lmbda is not None:
        raise BadInput(
            f"owl_m and owl_lmbda in {source} do nothing without OWL's profile.",
            "Add sparsity_profile: owl, or leave them out.",
        )
    return found


def _layer_of(target: str) -> str | None:
    r"""The layer that a target means, None if it means many.

    re:model\.layers\.3(\..*)?\.weight$ -> model.layers.3
    """
    plain = target.removesuffix(_WEIGHTS).replace("\\", "").removeprefix("re:").removesuffix("$")
    plain = plain.removesuffix(".weight").removesuffix("(..*)?")
    return plain if plain in heads() or re.fullmatch(r"(\w+\.)+\d+(\.\w+)*", plain) else None
