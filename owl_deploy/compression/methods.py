"""The table of pruning methods: a row says all of one; its function is imported when it runs.

The table can be read without torch: recipes and the command line are made from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from owl_deploy.errors import BadInput, unknown_name

Statistic = Literal["nothing", "norms", "hessian"]  # of a Linear's inputs


ROUNDS_ONLY = "none"  # the method of `owl quantize`, and of no other verb
_ROUNDING = ("awq", "gptq", "rtn")  # what people ask for by name, and which removes nothing


class Options(BaseModel):
    """The options of a method: none here; a subclass has a field for each, with a description.

    They are `owl prune`'s options of the same names, and the `options` of `PruneSettings`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")


class SparseGPTOptions(Options):
    """`block_size`: columns whose updates are delayed together, and whose weights are compared.

    `dampening`: what is added to the Hessian's diagonal, as a share of its mean. `preserve_mask`:
    weights that are zero already stay so, and count.
    """

    block_size: int = Field(
        default=128, ge=1, description="columns whose updates are applied together"
    )
    dampening: float = Field(
        default=0.01,
        gt=0,
        allow_inf_nan=False,
        description="added to the Hessian's diagonal, as a share of its mean",
    )
    preserve_mask: bool = Field(
        default=False, description="weights that are zero already stay zero"
    )


class ALPSOptions(Options):
    """`dampening`: what is added to the diagonal of the scaled X^T X, which is one.

    `iterations`: of ADMM; with more the support gets a little better.
    """

    dampening: float = Field(
        default=0.05,
        gt=0,
        allow_inf_nan=False,
        description="added to the diagonal, as a share of it",
    )
    iterations: int = Field(default=20, ge=1, description="iterations of the choice of weights")


@dataclass(frozen=True)
class Modifier:
    """What prunes like a method in SparseML: the modifier's `name`.

    `arguments`: its arguments' names, by those of the method's options. `form`: how it is told the
    sparsities: "layerwise", of many targets at once, or "training", where each target has a
    modifier of its own, run by a schedule. `remark`: how it differs, for the head of a recipe.
    """

    name: str
    arguments: Mapping[str, str] = field(default_factory=dict)
    form: Literal["layerwise", "training"] = "layerwise"
    remark: str = ""


@dataclass(frozen=True)
class Method:
    """One way to prune a Linear.

    `prune`: "module:function", which maps (weight [out, in] float32, inputs, sparsity, group,
    options) to the pruned weight; `pruning/by_score.py` has the types. `needs`: the statistic of
    the inputs that it asks for. `options`: the type of its own. `modifier`: SparseML's, or None
    where nothing there does the same; then no recipe can be written that reproduces it. `joint`: a
    function that is given a `prune.grid.Grid` as well, and rounds what it leaves in the same pass;
    without it what `prune` leaves is rounded. `removes`: whether anything goes. `refits`: whether
    the values that it leaves need no refit.
    """

    prune: str
    needs: Statistic
    options: type[Options] = Options
    modifier: Modifier | None = None
    joint: str | None = None
    removes: bool = True
    refits: bool = False


# Of methods with the same modifier the first is what a recipe with it means.
METHODS: dict[str, Method] = {
    "magnitude": Method(
        "owl_deploy.compression.pruning.by_score:magnitude",
        "nothing",
        modifier=Modifier(
            "MagnitudePruningModifier",
            form="training",
            remark="SparseML knows magnitude in training only, from its first step, and no N:M.",
        ),
    ),
    "wanda": Method(
        "owl_deploy.compression.pruning.by_score:wanda",
        "norms",
        modifier=Modifier("WandaPruningModifier"),
    ),
    "wanda-variant": Method(
        "owl_deploy.compression.pruning.by_score:wanda_variant",
        "norms",
        modifier=Modifier(
            "WandaPruningModifier",
            remark="SparseML knows plain Wanda only: these layers, another choice of weights.",
        ),
    ),
    "sparsegpt": Method(
        "owl_deploy.compression.pruning.sparsegpt:prune",
        "hessian",
        SparseGPTOptions,
        Modifier(
            "SparseGPTModifier",
            {
                "block_size": "block_size",
                "dampening": "dampening_frac",
                "preserve_mask": "preserve_sparsity_mask",
            },
        ),
        joint="owl_deploy.compression.pruning.sparsegpt:joint",
    ),
    "alps": Method(
        "owl_deploy.compression.pruning.alps:prune",
        "hessian",
        ALPSOptions,
        Modifier(
            "SparseGPTModifier",
            remark="SparseML knows no ALPS: SparseGPT for these layers, another choice of weights.",
        ),
        refits=True,
    ),
    ROUNDS_ONLY: Method("owl_deploy.compression.pruning.by_score:none", "nothing", removes=False),
}

PRUNING = tuple(name for name, row in METHODS.items() if row.removes)


def unknown_method(name: str) -> BadInput:
    """The error for a `name` that is no method's, with the way to what it may mean."""
    if name.lower() in _ROUNDING:
        return BadInput(
            f"{name!r} is no way to prune.", "To round as GPTQ does: owl quantize --bits 4."
        )
    return unknown_name("method", name, PRUNING)
