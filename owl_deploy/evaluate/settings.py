"""What `owl eval` can be asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.errors import BadInput
from owl_deploy.utils.hardware import ANY_HARDWARE, Hardware


@dataclass(frozen=True)
class EvaluationSettings:
    """What to evaluate by: a text (SOURCE), names of tasks (or one), or both; on how much of them.

    `window`: tokens a window of the text, and what the model sees at most of a task's; `windows`
    and `limit`: at most so many windows, and documents of a task, of which each `every`-th is
    taken: the first may be the easier ones. `divergence`: of the text, also how far each model's
    predictions are from the first's. `tasks_path`: a folder with task files of one's own;
    `allow_code`: run the programs that the model writes for HumanEval.
    `hardware`, `blockwise` (one block in memory at a time; None: if memory is short) and `adapter`
    (LoRA's, in PEFT's format) are for checkpoints; `engine` (None: the one it is made for),
    `threads` (None: the physical cores) and `trust_library` (run operators that the folder brings)
    for deployments.
    """

    text: str | Path | None = None
    tasks: str | Sequence[str] = ()
    tasks_path: str | Path | None = None
    allow_code: bool = False
    window: int = 2048
    windows: int | None = None
    divergence: bool = False
    limit: int | None = None
    every: int = 1
    hardware: Hardware = ANY_HARDWARE
    blockwise: bool | None = None
    engine: str | None = None
    threads: int | None = None
    trust_library: bool = False
    adapter: str | Path | None = None

    def __post_init__(self) -> None:
        # A lone name is a sequence as well, of its letters.
        tasks = (self.tasks,) if isinstance(self.tasks, str) else tuple(self.tasks)
        object.__setattr__(self, "tasks", tasks)
        if self.window < 2:  # tokens, of which the first predicts the second
            raise BadInput(f"--window {self.window} is too small.", "It must be 2 or more.")
        for option in ("windows", "limit", "every"):
            number = getattr(self, option)
            if number is not None and number < 1:
                raise BadInput(f"--{option} must be at least 1.")
