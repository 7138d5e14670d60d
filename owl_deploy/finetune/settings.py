"""What a fine-tuning is asked to do."""

import math
import sys
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from owl_deploy.errors import BadInput, invalid, option, unknown_name

_SEEDS = 2**31 - 1  # the largest that every library takes

METHODS = ("lora", "masked")
MERGES = ("masked",)
LARGEST_LOSS = math.log(sys.float_info.max)  # nats a token: of more there is no perplexity
DTYPES = ("auto", "float32", "bfloat16")
# LoRA's are the paper's. A masked run's is a share of the size of each tensor's weights.
_LEARNING_RATES = {"lora": 1e-4, "masked": 0.0013}
_LORA = {"rank": 8, "alpha": 16, "dropout": 0.05}


class FinetuneSettings(BaseModel):
    """What decides the result of a fine-tuning, besides the model and the text.

    `merge`: "masked" folds a LoRA adapter into the weights that pruning left. `learning_rate`: of
    Adam at its highest; masked, as a share of the root mean square of each tensor's weights.
    `batch_size` windows of `sequence_length` tokens go through the model at once,
    `gradient_accumulation` such batches before a step. `max_steps`: None is one pass over the text,
    or with `max_minutes`, which end a run, four at most. `warmup`: share of the run in which the
    learning rate rises; then it falls linearly to 0.
    `block_group`: blocks trained at a time (masked), all when None. `temperature`,
    `teacher_weight` (the distillation loss's share) and `feature_weight` (of the squared errors of
    the blocks' outputs, each over its square; none when None) need a teacher, as does
    `teacher_top`: so many of its likeliest tokens count each for itself, all when None, and are
    kept on disk where windows come again. `rank`, `alpha`, `dropout`, `target_modules`: LoRA's; no
    modules: the attention's query and value. `dtype`: what the matrix products are computed in;
    what is trained is float32. `shard`: divide the model over the processes, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str = "lora"
    merge: str | None = None
    learning_rate: float | None = None
    batch_size: int = 1
    sequence_length: int = 1024
    gradient_accumulation: int = 1
    max_steps: int | None = None
    max_minutes: float | None = None
    warmup: float = 0.05
    seed: int = 0
    block_group: int | None = None
    temperature: float | None = None
    teacher_weight: float | None = None
    feature_weight: float | None = None
    teacher_top: int | None = None
    rank: int | None = None
    alpha: int | None = None
    dropout: float | None = None
    target_modules: tuple[str, ...] | None = None
    dtype: str = "auto"
    shard: bool = False

    @property
    def writes_weights(self) -> bool:
        """Whether the result is a sparse checkpoint, and not an adapter beside one."""
        return self.method == "masked" or self.merge is not None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for what, name, known in (
            ("method", self.method, METHODS),
            ("merge", self.merge, MERGES),
            ("dtype", self.dtype, DTYPES),
        ):
            if name is not None and name not in known:
                raise unknown_name(what, name, known)
        self._check_ranges()
        return self

    def _check_ranges(self) -> None:
        least: dict[str, float] = {
            "learning_rate": 0,
            "batch_size": 1,
            "sequence_length": 2,
            "gradient_accumulation": 1,
            "max_steps": 1,
            "max_minutes": 0,
            "block_group": 1,
            "temperature": 0.001,
            "feature_weight": 0,
            "teacher_top": 1,
            "rank": 1,
            "alpha": 1,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            too_small = value is not None and (value < bound or (bound == 0 and value == 0))
            if value is not None and (too_small or not math.isfinite(value)):
                limit = f"at least {bound}" if bound else "above 0"
                raise BadInput(f"{option(name)} must be {limit}.")
        most = {"max_minutes": 1e6, "temperature": 1e3, "alpha": 1e6}
        for name, bound in most.items():
            if (getattr(self, name) or 0) > bound:
                raise BadInput(f"{option(name)} must be at most {bound:g}.")
        if not 0 <= self.seed <= _SEEDS:
            raise BadInput(f"--seed must be between 0 and {_SEEDS}.")
        for name in ("warmup", "teacher_weight", "dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise BadInput(f"{option(name)} is a share: from 0 to 1.")


def resolved(values: FinetuneSettings | dict[str, Any], teacher: bool) -> FinetuneSettings:
    """The settings that `values` (those given) mean, with each method's own defaults filled in.

    Raises `BadInput` for values that are impossible, or belong to what was not asked for.
    """
    try:
        asked = FinetuneSettings.model_validate(values)
    except ValidationError as error:
        known = FinetuneSettings.model_fields
        raise invalid("the settings of a fine-tuning", error, known=known) from error
    filled: dict[str, Any] = {"learning_rate": _LEARNING_RATES[asked.method]}
    if asked.method == "lora":
        filled |= _LORA
        _refuse(asked, ("block_group",), "belongs to --method masked.")
    else:
        _refuse(asked, ("merge", *_LORA, "target_modules"), "belongs to --method lora.")
    if asked.shard and asked.block_group is not None:
        raise BadInput(
            "--shard divides all blocks over the processes, --block-group takes some at a time.",
            "Leave one of them out.",
        )
    if asked.shard and asked.teacher_top is not None:
        raise BadInput(
            "--teacher-top asks the teacher where a window is new, and with --shard all processes "
            "have to ask it together.",
            "Leave one of them out.",
        )
    if asked.teacher_top is not None and asked.feature_weight is not None:
        raise BadInput(
            "--teacher-top keeps what the teacher says, and --feature-weight asks for its blocks' "
            "outputs in every step.",
            "Leave one of them out.",
        )
    if teacher:
        filled |= {"temperature": 1.0, "teacher_weight": 0.5}
    else:
        needing = ("temperature", "teacher_weight", "feature_weight", "teacher_top")
        _refuse(asked, needing, "needs a --teacher.")
    given = {name: value for name, value in asked.model_dump().items() if value is not None}
    return FinetuneSettings(**(filled | given))


def _refuse(asked: FinetuneSettings, names: tuple[str, ...], why: str) -> None:
    for name in names:
        if getattr(asked, name) is not None:
            raise BadInput(f"{option(name)} {why}")
