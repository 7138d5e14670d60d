"""One training by the transformers Trainer, with our clock, our bar and our checkpoints' marks."""

import contextlib
import itertools
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import Dataset
from transformers import TrainerCallback

from owl_deploy.errors import BadInput
from owl_deploy.finetune.settings import LARGEST_LOSS, FinetuneSettings
from owl_deploy.finetune.shard import Shards
from owl_deploy.finetune.trainee import Trainee
from owl_deploy.models.sparse_linear import groups
from owl_deploy.utils.artefact import all_to_disk
from owl_deploy.utils.ending import on_interrupt
from owl_deploy.utils.progress import Advance, bar
from owl_deploy.utils.ranks import ALONE, Ranks, talking

_COMPLETE = "complete"  # a file in every checkpoint that was written to its end
_EVALUATIONS = 4  # along the way and at the end, besides the one at the start
_EVALUATING = 0.1  # of a time limit, at most, unless one at the end takes more
_SAVE_SECONDS = 300.0
_WARM = 10  # steps in which the learning rate rises, at least, where the time limits them
KEPT_CHECKPOINTS = 2  # the last one stays whole while the next is written


@dataclass(frozen=True)
class Schedule:
    """How long a training goes: so many steps, or so many seconds if those are over first."""

    steps: int
    seconds: float | None

    def progress(self, steps: int, seconds: float) -> float:
        """The share of the training that is done."""
        by_time = seconds / self.seconds if self.seconds else 0.0
        return max(steps / self.steps, by_time)


def train(
    trainee: Trainee,
    windows: tuple[torch.Tensor, torch.Tensor],
    settings: FinetuneSettings,
    schedule: Schedule,
    folder: Path,
    description: str,
    ranks: Ranks = ALONE,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
    check: Callable[[], object] = lambda: None,
) -> list[dict[str, Any]]:
    """Train `trainee` in place on `windows` (to train on, held out), resuming from `folder`.

    All `ranks` call it with the same, and end with the same weights: each takes a batch in turn.

    Returns the learning curve: one row a step (`step`, `seconds`, `tokens` read so far, `loss`,
    `learning_rate`) or a held-out evaluation (`step`, `seconds`, `tokens`, `eval_loss`), losses in
    nats a token. With a time limit the learning rate falls with the time, so only a training by
    steps resumes to the same losses. Ctrl-C ends a step, after which the training is saved, with
    `KeyboardInterrupt`; one in the last evaluation is obeyed once what was trained is safe by
    `keep`, which gets the curve, and not at all without. The leader calls `check` before anything
    that was trained is written, along the way or by whoever called this.
    """
    before = ranks.from_leader(lambda: _cleared(folder))
    total = 100.0 if schedule.seconds else float(schedule.steps)
    speed = _Speed()
    with bar(description, total, speed.note) as advance:
        rate = settings.learning_rate or 0.0
        clock = _Clock(
            schedule, trainee, lambda share: advance(share * total), ranks, speed, rate, check
        )
        trainer = _trainer(trainee, windows, settings, clock, folder, fresh=before is None)
        with clock.interruptible(), talking():
            trainer.train(resume_from_checkpoint=None if before is None else str(before))
    if clock.interrupted:
        raise KeyboardInterrupt
    wanted = ("step", "seconds", "loss", "learning_rate", "eval_loss")
    curve = [
        {key: row[key] for key in wanted if key in row} | {"tokens": row["num_input_tokens_seen"]}
        for row in trainer.state.log_history
        if "loss" in row or "eval_loss" in row
    ]
    if keep is not None:
        keep(curve)
        if clock.told_late:
            raise KeyboardInterrupt
    return curve


def _cleared(folder: Path) -> Path | None:
    """`last_checkpoint`, alone: the Trainer keeps the highest numbers, whole or not."""
    last = last_checkpoint(folder)
    for found in folder.glob("checkpoint-*"):
        if not (found / _COMPLETE).exists():
            shutil.rmtree(found)
    return last


def last_checkpoint(folder: Path) -> Path | None:
    """The newest of the Trainer's checkpoints in `folder` that was written to its end."""
    found = [mark.parent for mark in folder.glob(f"checkpoint-*/{_COMPLETE}")]
    return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _trainer(
    trainee: Trainee,
    windows: tuple[torch.Tensor, torch.Tensor],
    settings: FinetuneSettings,
    clock: "_Clock",
    folder: Path,
    *,
    fresh: bool,
) -> transformers.Trainer:
    on_gpu = torch.cuda.is_available()
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=clock.schedule.steps,
        per_device_train_batch_size=settings.batch_size,
        # Where the last batch is filled up with other windows, which count then, batches of one.
        per_device_eval_batch_size=1 if clock.ranks.size > 1 else settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        seed=settings.seed,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        eval_on_start=fresh,
        prediction_loss_only=True,
        logging_steps=1,
        include_num_input_tokens_seen="all",
        logging_nan_inf_filter=False,  # a loss that is no number ends the run
        save_strategy="no",  # the clock says when
        save_total_limit=KEPT_CHECKPOINTS,
        disable_tqdm=True,
        report_to="none",
        ddp_find_unused_parameters=False,
    )
    arguments._n_gpu = 1  # else all that it sees, by nn.DataParallel, with as many times the batch
    optimizer = _optimizer(trainee, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate(settings.warmup))
    callbacks: list[TrainerCallback] = [clock]
    if settings.shard:
        callbacks.insert(0, Shards(trainee, optimizer))  # before the clock marks what is written
    trainer = transformers.Trainer(
        model=trainee,
        args=arguments,
        train_dataset=Windows(windows[0]),
        eval_dataset=Windows(windows[1]),
        data_collator=transformers.default_data_collator,
        optimizers=(optimizer, scheduler),
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # stdout is for results
    return trainer


def _optimizer(trainee: Trainee, settings: FinetuneSettings) -> torch.optim.Optimizer:
    rate, trained = settings.learning_rate or 0.0, trainee.trained().values()
    found: Any = groups(trained, rate) if settings.method == "masked" else trained
    return torch.optim.AdamW(found, lr=rate, weight_decay=0.0, fused=True)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """Windows of a text, int [windows, length], as what the model takes; each read when its turn
    comes, in the order that the Trainer draws by its seed.
    """

    def __init__(self, ids: torch.Tensor) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._ids[index].long()
        return {"input_ids": ids, "labels": ids, "windows": torch.tensor(index)}


class _Speed:
    """The tokens a second of the steps since this process began; evaluations are left out."""

    def __init__(self) -> None:
        self._tokens = 0
        self._seconds = 0.0
        self._since: tuple[int, float] | None = None

    def begin(self, tokens: int) -> None:
        """A step begins; `tokens`: that were read before it."""
        self._since = tokens, time.monotonic()

    def end(self, tokens: int) -> None:
        """The step is over."""
        if self._since is not None:
            self._tokens += tokens - self._since[0]
            self._seconds += time.monotonic() - self._since[1]

    def note(self) -> str:
        """In words, for a progress bar; nothing before the first step."""
        return f"{self._tokens / self._seconds:.0f} tokens/s" if self._seconds else ""


def tokens_per_second(curve: Sequence[Mapping[str, Any]]) -> float:
    """What the steps of a learning curve read, over the time that they took.

    A row's time is that since the row before it: those of evaluations are left out.
    """
    seconds = [
        row["seconds"] - before["seconds"]
        for before, row in itertools.pairwise(({"seconds": 0.0}, *curve))
        if "loss" in row
    ]
    return float(curve[-1]["tokens"] / max(sum(seconds), 1e-3))


class _Clock(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Says when to evaluate, save and stop; keeps the time, that of earlier runs included."""

    def __init__(
        self,
        schedule: Schedule,
        trainee: Trainee,
        advance: Advance,
        ranks: Ranks = ALONE,
        speed: "_Speed | None" = None,
        learning_rate: float = 0.0,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.schedule, self.trainee, self._advance = schedule, trainee, advance
        self._check = check
        self.ranks, self.speed = ranks, speed or _Speed()
        self.interrupted = False  # as the ranks agreed
        self.told_late = False  # so, when the last step was done
        self._told = False  # to this process
        self._done = 0.0  # share
        self.learning_rate = learning_rate  # at its highest
        self._factor = 0.0  # of it, in the last step
        self._evaluations = _EVALUATIONS
        self._began: float | None = None
        self._agreed = 0.0
        self._saved = 0.0

    def seconds(self) -> float:
        """How long the training has gone, without what a kill lost; as the ranks last agreed."""
        return self._agreed if self.ranks.size > 1 else self._own_seconds()

    def _own_seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began

    def _agree(self) -> None:
        """Together: take the leader's time, and whether any process was told to end."""
        of_ranks = self.ranks.gathered((self._own_seconds(), self._told))
        self._agreed = of_ranks[0][0]
        told = any(told for _, told in of_ranks)
        self.interrupted, self.told_late = told and self._done < 1, told and self._done >= 1

    def rate(self, warmup: float) -> Callable[[int], float]:
        """The learning rate's factor by the step: up within the share `warmup`, then down to 0.

        Where time is the limit it rises for `_WARM` steps at least: slow steps use that share up,
        and Adam's first ones are as large as the rate, whatever the gradients.
        """

        def factor(step: int) -> float:
            done = self.schedule.progress(step, self.seconds())
            rise = fall = 1.0
            if warmup:
                rise = (done + 1 / self.schedule.steps) / warmup
                rise = min(rise, (step + 1) / _WARM) if self.schedule.seconds else rise
            if warmup < 1:
                fall = (1 - done) / (1 - warmup)
            return max(0.0, min(1.0, rise, fall))

        return factor

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let the first Ctrl-C end the step and save; the second is as it was.

        Not so in a group: the terminal sends one, and torchrun another.
        """

        def tell() -> None:
            self._told = True

        with on_interrupt(tell, once=self.ranks.size == 1):
            yield

    def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """Go on from where an earlier run's log ends; let dropout differ between ranks."""
        before = state.log_history[-1]["seconds"] if state.log_history else 0.0
        evaluated = next((row for row in state.log_history if "eval_loss" in row), None)
        if evaluated is not None:
            self._make_room(evaluated["seconds"])
        self._began = time.monotonic() - before
        self._agree()
        self._saved = self.seconds()
        if self.ranks.rank:  # the leader's is the seed itself, as where it is alone
            torch.manual_seed(args.seed + self.ranks.rank)
        self._move(state.global_step)

    def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """Start to measure the speed."""
        self.speed.begin(state.num_input_tokens_seen)

    def on_optimizer_step(self, *_: Any, optimizer: Any, **__: Any) -> None:  # noqa: ANN401
        """The survivors have changed: so do the weights they are part of."""
        # Before the scheduler moves on.
        rates = ((one["lr"], one["initial_lr"]) for one in optimizer.param_groups)
        self._factor = next((rate / highest for rate, highest in rates if highest), 0.0)
        self.trainee.refresh()
        self._agree()  # before the learning rate moves with the time

    def on_evaluate(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """The one at the start tells how many a time limit has room for."""
        self._agree()
        if state.global_step == 0:
            self._make_room(self.seconds())

    def _make_room(self, seconds: float) -> None:
        """Evaluate as often as a time limit has room for besides the first, which took this."""
        if self.schedule.seconds:
            room = int(_EVALUATING * self.schedule.seconds / max(seconds, 1e-3))
            self._evaluations = max(1, min(_EVALUATIONS, room - 1))

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Decide what comes after this step."""
        self.speed.end(state.num_input_tokens_seen)
        self._agree()
        evaluated = int(self._done * self._evaluations)
        self._move(state.global_step)
        over = self._done >= 1
        control.should_evaluate = over or int(self._done * self._evaluations) > evaluated
        control.should_training_stop = over or self.interrupted
        due = self.interrupted or self.seconds() - self._saved > _SAVE_SECONDS
        if over:
            self.interrupted = False
        elif due:
            control.should_save = True
        if (over or due) and self.ranks.leads:
            self._check()

    def on_log(self, _args: Any, state: Any, _control: Any, logs: Any, **_: Any) -> None:  # noqa: ANN401
        """Note the time; stop at a loss that is no number, or no perplexity's."""
        self._agree()
        row = state.log_history[-1]
        row["seconds"] = round(self.seconds(), 3)
        if "learning_rate" in row:  # else that of the first tensor
            row["learning_rate"] = self._factor * self.learning_rate
        loss = logs.get("loss", logs.get("eval_loss", 0.0))
        if not loss < LARGEST_LOSS:
            begun = state.global_step > 0
            raise BadInput(
                f"The loss is {loss:.4g} at step {state.global_step}.",
                "Use a smaller --learning-rate."
                if begun
                else "Nothing was trained yet: look for what is wrong with the model's weights.",
            )

    def on_save(self, args: Any, state: Any, _control: Any, **_: Any) -> None:  # noqa: ANN401
        """Mark the checkpoint as whole: a kill may have come while one was written."""
        self._agree()  # all have written their part
        if self.ranks.leads:
            saved = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            all_to_disk(saved)
            (saved / _COMPLETE).touch()
            all_to_disk(saved)
        self._saved = self.seconds()

    def _move(self, steps: int) -> None:
        done = min(1.0, self.schedule.progress(steps, self.seconds()))
        self._advance(done - self._done)
        self._done = done
