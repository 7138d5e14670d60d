"""What to prune and how: `PruneSettings`, and what its structures and budgets mean."""

import math
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from owl_deploy.compression.allocation.rules import ALLOCATIONS, DEFAULT, GONE, check_not_gone
from owl_deploy.compression.methods import METHODS, Options, Statistic, unknown_method
from owl_deploy.errors import BadInput, invalid, unknown_name
from owl_deploy.models.families import heads

UNSTRUCTURED = "unstructured"
_SAID_AS = 5e-4  # of sparsities: people round 2 of 3 to 0.333
_BITS, _BITS_GROUPS = (8, 4, 3), (32, 64, 128)
_BITS_OF_HEAD = (4, 3)  # a deployment makes 8 of any head


class PruneSettings(BaseModel):
    """What to prune and how.

    `sparsity`: the share of the blocks' weights that is removed, in [0, 1). `structure`:
    "unstructured", or "N:M", N weights kept of every M neighbours, which sets the sparsity; an
    allocation other than uniform then gives each block its own N, and fisher each Linear.
    `outlier_multiple`: OWL's M. `spread`: half the range of the sparsities over the blocks (OWL's
    lambda). `skip`: Linears that stay dense, by their names or the ends of them, or what they lie
    in.
    `head_sparsity`: that of the output head, which stays dense without it. `layers`, for the
    allocation "list": block or Linear name to sparsity. `bits`: what survives is rounded to so
    many, 8, 4 or 3, with one scale for every `bits_group` columns of a row, 32, 64 or 128.
    `budget`: what the weights may take, such as "3.5" (bits each, over those that are pruned),
    "400MB" (of all weights and tables in a deployment) or "1.5x" (so many times as fast as dense
    int8 on this machine); the allocation "budget" then finds a sparsity and the bits for each
    Linear.
    `head_bits`: the output head is rounded too, to 4 or 3 bits; else it is not, unless a budget of
    a size finds that 4 are worth it, or it is pruned and `bits` round what is left.
    `options`: the method's own, of the type that its row in `METHODS` names, or a mapping of their
    names to values. `refit`: whether the weights that are left get the values that suit them best;
    ALPS does it in any case. `reconstruct`: epochs for which each half of a pruned block is trained
    to give the dense one's output. `asymmetric`: whether each Linear makes up for what those before
    it have lost as well (`gptaq.py`), of a method whose weights make up for others; None
    stands for yes where weights are rounded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "wanda"
    allocation: str = DEFAULT
    sparsity: float = 0.5
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
    asymmetric: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: dict[str, Any]) -> dict[str, Any]:
        """What follows from other values: N:M's sparsity, the allocation's spread, the options."""
        if not isinstance(values, Mapping):
            return values
        if values.get("budget") is not None:
            values = _with_budget(values)
        asked = values.get("allocation")
        values = {"method": "wanda", "allocation": DEFAULT} | values
        if values["allocation"] in GONE and values.get("layers") is not None:
            values["allocation"] = "list"  # as an earlier version resolved it
        check_not_gone(values["allocation"])
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
                said = isinstance(given, int | float) and abs(given - implied) <= _SAID_AS
                if not said:  # NaN is neither
                    raise BadInput(
                        f"A sparsity of {given} contradicts the structure {left}:{size}, "
                        f"which keeps {left} of {size} weights: {implied:.4g}.",
                        "Give one of the two.",
                    )
                values["sparsity"] = implied
            # No head has another sparsity than one of M weights can have.
            values["head_sparsity"] = in_group(values.get("head_sparsity"), size)
            # The paper's mixed N:8 spans 2 weights (lambda = 2): half of that, over 8.
            values.setdefault("spread", min(0.5, 1 / size) if allocation.counts_outliers else None)
        if values.get("spread") is None:
            values["spread"] = allocation.spread
        if values.get("asymmetric") is None:
            values["asymmetric"] = rounds  # what is only pruned is so as published, and as SparseML
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
                    "It is the share of weights to remove: from 0 to below 1, such as 0.5.",
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
        if self.asymmetric and self.needs != "hessian":
            raise BadInput(
                "--asymmetric is of methods whose weights make up for others, and "
                f"{self.method} leaves them as they are.",
                "Give another --method, or --bits or --refit as well.",
            )
        return self

    def _check_bits(self) -> None:
        if not METHODS[self.method].removes:
            if not self.rounds:
                raise BadInput(f"The method {self.method} only rounds.", "Give --bits.")
            if self.head_sparsity or self.refit:
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

    @classmethod
    def checked(cls, **values: Any) -> Self:  # noqa: ANN401 - checked by the model
        """The settings of these `values`, pydantic's complaints as one `BadInput` sentence."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise invalid("the settings", error) from error

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
        measures = allocation.counts_outliers or allocation.losses
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


def in_group(sparsity: Any, size: int) -> Any:  # noqa: ANN401 - checked by the model
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


def kept(sparsity: float, size: int) -> int:
    """The N of N:`size` that a sparsity means."""
    return round((1 - sparsity) * size)
