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
from types import MappingProxyType
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    model_validator,
)

from owl_deploy.allocation import ALLOCATIONS, DEFAULT, SEARCHED
from owl_deploy.artefact import sha256
from owl_deploy.errors import BadInput, first_line, invalid, option, unknown_name
from owl_deploy.families import FAMILIES, heads
from owl_deploy.methods import METHODS, Modifier, Options, Statistic, unknown_method

UNSTRUCTURED = "unstructured"
RESOLVED = "recipe.yaml"  # in a checkpoint
_DENSE_MASK = "0:0"  # SparseML's word for unstructured
_ALL = ("__ALL__", "__ALL_PRUNABLE__", "Linear")  # the last is llm-compressor's
_SAME = 1e-6  # of sparsities
_SAID_AS = 5e-4  # people round: 0.333 for two of three
_WEIGHT_NAMES = ("a.weight", "b.9.c.weight")  # a pattern that takes both takes every weight
_BITS, _BITS_GROUPS = (8, 4, 3), (32, 64, 128)
_BITS_OF_HEAD = (4, 3)  # a deployment makes 8 of any head


class PruneSettings(BaseModel):
    """What to prune and how.

    `sparsity`: the share of the blocks' weights that is removed, in [0, 1). `structure`:
    "unstructured", or "N:M", N weights kept of every M neighbours, which sets the sparsity; an
    allocation other than uniform then gives each block its own N, and fisher and owl-per-linear
    each Linear. `outlier_multiple`: OWL's M. `spread`: half the range of the sparsities over the
    blocks (OWL's lambda, DLP's alpha). `skip`: Linears that stay dense, by their names or the ends
    of them, or what they lie in.
    `head_sparsity`: that of the output head, which stays dense without it. `layers`, for the
    allocation "list": block or Linear name to sparsity. `bits`: what survives is rounded to so
    many, 8, 4 or 3, with one scale for every `bits_group` columns of a row, 32, 64 or 128.
    `budget`: what the weights may take, such as "3.5" (bits each, over those that are pruned),
    "400MB" (of all that a deployment packs) or "1.5x" (so many times as fast as dense int8 on this
    machine); the allocation "budget" then finds a sparsity and the bits for each Linear.
    `head_bits`: the output head is rounded too, to 4 or 3 bits; else it is not, unless a budget of
    a size finds that 4 are worth it. `options`: the method's own, of the type that its row in
    `METHODS` names, or a mapping of their names to values. `refit`: whether the weights that are
    left get the values that suit them best; ALPS does it in any case. `reconstruct`: epochs for
    which each half of a pruned block is trained to give the dense one's output.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "wanda"
    allocation: str = DEFAULT
    sparsity: float = 0.7
    structure: str = UNSTRUCTURED
    outlier_multiple: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    spread: float = Field(default=0.08, ge=0, le=0.5, allow_inf_nan=False)
    skip: tuple[str, ...] = ()
    head_sparsity: float | None = None
    layers: dict[str, float] | None = None
    bits: int | None = None
    bits_group: int | None = None
    budget: str | None = None
    head_bits: int | None = None
    options: SerializeAsAny[Options] = Options()
    refit: bool = False
    reconstruct: int | None = Field(default=None, ge=1)

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What follows from other values: N:M's sparsity, the allocation's spread, the options."""
        if values.get("budget") is not None:
            values = _with_budget(values)
        asked = values.get("allocation")
        values = {"method": "wanda", "allocation": DEFAULT} | values
        for what, table in (("method", METHODS), ("allocation", ALLOCATIONS)):
            if not isinstance(values[what], str) or values[what] not in table:
                name = str(values[what])
                raise unknown_method(name) if what == "method" else unknown_name(what, name, table)
        values["options"] = _options(values["method"], values.get("options", {}))
        if not METHODS[values["method"]].removes:
            if values.get("sparsity") or values.get("structure", UNSTRUCTURED) != UNSTRUCTURED:
                raise BadInput(
                    f"The method {values['method']} removes nothing.", "Give another method."
                )
            values["sparsity"] = 0.0
            if values.get("budget") is None:
                if asked not in (None, "uniform"):
                    raise BadInput(
                        f"The method {values['method']} removes nothing for the allocation {asked} "
                        "to divide.",
                        "Leave it out, or give another method.",
                    )
                values["allocation"] = "uniform"
        rounds = values.get("bits") is not None or values.get("budget") is not None
        if rounds and values.get("bits_group") is None:
            values["bits_group"] = _BITS_GROUPS[0]
        allocation = ALLOCATIONS[values["allocation"]]
        group = parse_structure(values.get("structure", UNSTRUCTURED))
        if group is not None:
            left, size = group
            implied = 1 - left / size
            given = values.setdefault("sparsity", implied)
            if values.get("layers") is None:
                if not isinstance(given, int | float) or abs(given - implied) > _SAID_AS:
                    raise BadInput(
                        f"A sparsity of {given} contradicts the structure {left}:{size}, "
                        f"which keeps {left} of {size} weights: {implied:.4g}.",
                        "Give one of the two.",
                    )
                values["sparsity"] = implied
            # No head has another sparsity than one of M weights can have.
            values["head_sparsity"] = _in_group(values.get("head_sparsity"), size)
            # The paper's mixed N:8 spans 2 weights (lambda = 2): half of that, over 8.
            values.setdefault("spread", min(0.5, 1 / size) if allocation.counts_outliers else None)
        if values.get("spread") is None:
            values["spread"] = allocation.spread
        return values

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.allocation == "list") != (self.layers is not None):
            raise BadInput(
                "The allocation 'list' and a list of layers come together, from a recipe.",
                "Give --recipe, or another --allocation without a recipe.",
            )
        if self.allocation == "budget" and self.budget is None:
            raise BadInput("The allocation 'budget' needs one.", "Give --budget.")
        for value in (self.sparsity, self.head_sparsity, *(self.layers or {}).values()):
            if value is not None and not (math.isfinite(value) and 0 <= value < 1):
                raise BadInput(
                    f"A sparsity of {value} is impossible.",
                    "It is the share of weights to remove: from 0 to below 1, such as 0.7.",
                )
            if self.group and value is not None and kept(value, self.group[1]) == 0:
                raise BadInput(
                    f"A sparsity of {value:g} keeps none of {self.group[1]} weights.",
                    "Give less, or another structure.",
                )
        if self.changes_head and heads() & set(self.skip):
            how = "--head-sparsity prunes" if self.head_bits is None else "--head-bits rounds"
            raise BadInput(f"--skip names the head, and {how} it.", "Drop one.")
        self._check_bits()
        return self

    def _check_bits(self) -> None:
        if not METHODS[self.method].removes:
            if not self.rounds:
                raise BadInput(f"The method {self.method} only rounds.", "Give --bits.")
            if self.head_sparsity:
                raise BadInput(f"The method {self.method} removes nothing.", "Give another method.")
        for given, value in (("--group", self.bits_group), ("--head-bits", self.head_bits)):
            if not self.rounds and value is not None:
                raise BadInput(f"{given} is of --bits.", "Give --bits as well.")
        for given, value, known in (
            ("--bits", self.bits, _BITS),
            ("--head-bits", self.head_bits, _BITS_OF_HEAD),
            ("--group", self.bits_group, _BITS_GROUPS),
        ):
            if value is not None and value not in known:
                raise BadInput(
                    f"{given} {value} is not possible.",
                    f"There are: {', '.join(map(str, known))}.",
                )
        if self.group and self.bits_group:
            short, long = sorted((self.group[1], self.bits_group))
            if long % short:
                raise BadInput(
                    f"Groups of {self.group[1]} weights do not fit those of --group "
                    f"{self.bits_group}.",
                    "One must divide the other.",
                )

    def searched(self) -> Self:
        """These, where a search has found each Linear's sparsity, which no rule then gives."""
        return self.model_copy(update={"allocation": SEARCHED, "spread": 0.0})

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the structure N:M; None when unstructured."""
        return parse_structure(self.structure)

    @property
    def rounds(self) -> bool:
        """Whether what survives is rounded: all of it to `bits`, or as a `budget` finds."""
        return self.bits is not None or self.budget is not None

    @property
    def found(self) -> set[str]:
        """The names of what a pruning by these finds out, and then has as settings of its own."""
        if self.budget is None:
            return set()
        return {"sparsity"} | ({"head_bits"} if self.head_bits is None else set())

    @property
    def changes_head(self) -> bool:
        """Whether the output head is pruned, or rounded."""
        return self.head_sparsity is not None or self.head_bits is not None

    @property
    def calibrates(self) -> bool:
        """Whether method, allocation or reconstruction look at a text."""
        allocation = ALLOCATIONS[self.allocation]
        measures = allocation.statistic is not None or allocation.losses
        return self.needs != "nothing" or measures or self.reconstruct is not None

    @property
    def needs(self) -> Statistic:
        """The statistic of a Linear's inputs that the method asks for, or what comes after it."""
        return "hessian" if self.refit or self.rounds else METHODS[self.method].needs


# What a budget decides, and so cannot be given beside it; the value that says nothing.
_DECIDED: Mapping[str, object] = MappingProxyType(
    {
        "bits": None,
        "structure": UNSTRUCTURED,
        "layers": None,
        "head_sparsity": None,
        "allocation": "budget",
        "sparsity": None,
    }
)


def _with_budget(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a pruning to a budget, whose sparsity is known when its plan is made."""
    budget = str(values["budget"])
    parse_budget(budget)
    # A plan's settings come with the sparsity that was found.
    planned = {"sparsity"} if values.get("allocation") == "budget" else set()
    for name, nothing in _DECIDED.items():
        if name not in planned and values.get(name, nothing) not in (None, nothing):
            raise BadInput(
                "A budget chooses each Linear's bits and sparsity, and the settings say "
                f"{name.replace('_', ' ')} as well.",
                "Give one of the two.",
            )
    decided = {"budget": budget, "allocation": "budget"}
    return {"method": "sparsegpt", "sparsity": 0.0} | values | decided


def parse_budget(budget: str) -> tuple[float, Literal["bits", "bytes", "times"]]:
    """A budget's number and unit.

    "3.5" is in bits a weight, "400MB" (kB, MB, GB) in bytes, "1.5x" how many times as fast. Raises
    `BadInput` for what is none of these, or no gain.
    """
    match = re.fullmatch(r"(\d+(?:\.\d*)?|\.\d+) ?([kmg]b|x)?", budget.strip().lower())
    if match is None or not 0 < float(match[1]) < math.inf:
        raise BadInput(
            f"The budget {budget!r} is none.",
            "It is in bits a weight, such as 3.5, a size in kB, MB or GB, such as 400MB, or a gain "
            "in speed over int8, such as 1.5x.",
        )
    if match[2] == "x":
        if float(match[1]) <= 1:
            raise BadInput(
                f"The budget {budget} is no gain over dense int8, which takes no pruning.",
                "Give more than 1x, or export the model as it is.",
            )
        return float(match[1]), "times"
    if match[2] is None:
        return float(match[1]), "bits"
    return float(match[1]) * {"kb": 1e3, "mb": 1e6, "gb": 1e9}[match[2]], "bytes"


def _in_group(sparsity: Any, size: int) -> Any:  # noqa: ANN401 - checked by the model
    """The sparsity of N:`size` that a `sparsity` means; what is impossible stays, to be refused."""
    if not isinstance(sparsity, float) or not 0 <= sparsity < 1 or kept(sparsity, size) == 0:
        return sparsity
    return 1 - kept(sparsity, size) / size


def _options(method: str, given: Options | Mapping[str, Any]) -> Options:
    """The options of a method, or `BadInput` for one that it does not have, or a wrong value."""
    kind = METHODS[method].options
    if not isinstance(given, (Options, Mapping)):
        raise BadInput(f"The options of {method} are {given!r}, which names none.")
    values = given.model_dump() if isinstance(given, Options) else given
    strange = [name for name in values if name not in kind.model_fields]
    if strange:
        raise BadInput(
            f"The method {method} has no option {strange[0]!r}.",
            f"It has: {', '.join(kind.model_fields) or 'none'}.",
        )
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(f"the options of {method}", error) from error


def is_named(linear: str, ending: str) -> bool:
    """Whether `ending`, as in `skip`, is the Linear's whole name, its last parts, or a module that
    it lies in."""
    return f".{linear}.".endswith(f".{ending}.") or linear.startswith(f"{ending}.")


def parse_structure(structure: object) -> tuple[int, int] | None:
    """(N, M) of "N:M", N kept of M; None for "unstructured". Raises `BadInput` otherwise."""
    if structure == UNSTRUCTURED:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(structure), re.ASCII)
    if match is None or not 0 < int(match[1]) < int(match[2]):
        raise BadInput(
            f"The structure {structure!r} is neither 'unstructured' nor N:M.",
            "N:M keeps N weights of every M neighbours, 0 < N < M, such as 2:4.",
        )
    return int(match[1]), int(match[2])


def settings(**values: Any) -> PruneSettings:  # noqa: ANN401 - checked by the model
    """`PruneSettings`, with pydantic's complaints as one `BadInput` sentence."""
    try:
        return PruneSettings(**values)
    except ValidationError as error:
        raise invalid("the settings", error) from error


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    package = Path(__file__).parent
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
    if overrides.get("method", values.get("method")) != values.get("method"):
        values.pop("options", None)
    if overrides.get("allocation", values.get("allocation")) != values.get("allocation"):
        for name in ("spread", "outlier_multiple"):
            values.pop(name, None)
    options = {**values.get("options", {}), **overrides.get("options", {})}
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
    found = settings(**(values | overrides | {"options": options}))
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
        layers = {target: _in_group(value, group[1]) for target, value in layers.items()}
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


def kept(sparsity: float, size: int) -> int:
    """The N of N:`size` that a sparsity means."""
    return round((1 - sparsity) * size)


def _describe(settings: PruneSettings, modifier: Modifier) -> list[str]:
    lines = [
        f"Resolved by owl prune: {settings.method}, {settings.allocation}, {settings.structure}, "
        f"{settings.sparsity:.4g} of the weights removed."
    ]
    if ALLOCATIONS[settings.allocation].counts_outliers:
        lines.append(f"Outlier multiple (M) {settings.outlier_multiple:g}.")
    if settings.spread:
        lines.append(f"Spread (lambda, alpha) {settings.spread:g}.")
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
    if settings.reconstruct:
        lines.append("Then reconstructed, half a block at a time, which SparseML does not know.")
    return lines


def load(source: Path) -> dict[str, Any]:
    """Read a recipe in SparseML's grammar, as keyword arguments of `settings`.

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
        found["skip"] = tuple(name.removeprefix("re:.*") for name in modifier.ignore)
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
    return found


def _layer_of(target: str) -> str | None:
    r"""The layer that a target means, None if it means many.

    re:model\.layers\.3(\..*)?\.weight$ -> model.layers.3
    """
    plain = target.removesuffix(_WEIGHTS).replace("\\", "").removeprefix("re:").removesuffix("$")
    plain = plain.removesuffix(".weight").removesuffix("(..*)?")
    return plain if plain in heads() or re.fullmatch(r"(\w+\.)+\d+(\.\w+)*", plain) else None
