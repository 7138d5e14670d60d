"""`owl bench` as one call: check, measure, write."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape

from owl_deploy.bench import baseline, decision, gate
from owl_deploy.bench.gate import Verdict
from owl_deploy.bench.measure import Progress, run_bench
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import Result, write_result
from owl_deploy.errors import BadInput, OwlError
from owl_deploy.utils import artefact
from owl_deploy.utils.progress import error_console


@dataclass(frozen=True)
class Outcome:
    """What a run came to; `verdicts` when it was a check, whose `result` may not be needed."""

    result: Result | None
    verdicts: tuple[Verdict, ...] | None = None

    def exit_code(self, strict: bool = False) -> int:
        """0 to 4, as documented for `owl bench`."""
        if self.verdicts is not None:
            return gate.exit_code(gate.overall(self.verdicts), strict)
        return 4 if self.result is not None and self.result.failures else 0

    def to_json(
        self, max_loss: float | None = None, quality_metric: str | None = None
    ) -> dict[str, object]:
        """The result with what to deploy, and the verdicts if there are any, as JSON values.

        `max_loss`, `quality_metric`: as in decision.py.
        """
        value: dict[str, object] = {}
        if self.result is not None:
            judged = decision.judge(self.result, quality_metric)
            value = self.result.model_dump(mode="json")
            value["decision"] = decision.to_json(judged, max_loss)
        if self.verdicts is not None:
            value["verdict"] = gate.overall(self.verdicts)
            value["verdicts"] = [vars(verdict) for verdict in self.verdicts]
        return value


def bench(plan: BenchPlan, output: str | Path | None = None, force: bool = False) -> Result:
    """Measure what `plan` asks for, and write it to the folder `output` (`force` replaces one).

    Latencies in the result are in ms; a comparison's ratio is the baseline's over the candidate's,
    above 1 where the candidate is faster. An engine that fails is named in `Result.failures`.
    Shows its progress on stderr. Raises as `run_bench` does, and `BadInput` for an output folder
    that cannot be written, before anything is measured.
    """
    output = None if output is None else Path(output)
    if output is not None:
        _check_output(plan, output, force)
    with _shown() as progress:
        return run_bench(plan, progress, keep=_keeping(output, force))


def _keeping(output: Path | None, force: bool) -> Callable[[Result], None]:
    """What writes a result to the folder `output`, if there is one."""

    def keep(result: Result) -> None:
        if output is not None:
            write_result(result, output, force)

    return keep


def run_gate(
    plan: BenchPlan,
    *,
    save: str | Path | None = None,
    check: str | Path | None = None,
    margin: float | None = None,
    output: str | Path | None = None,
    force: bool = False,
    summary: str | Path | None = None,
    prepare: Callable[[], None] = lambda: None,
) -> Outcome:
    """As `bench`, and save a baseline file or check against one.

    `margin` is the share of time that may be lost, kept in the saved file [0.05]; `summary` a file
    that the verdicts, or the reason why there are none, are appended to as markdown. A check takes
    its rounds up to `gate.LOOKS` times where the plan does not say how often. `prepare` makes what
    is to be measured, once all is looked at that can be wrong before. Raises `BadInput` for a file
    that is no baseline, and for one to be saved that would replace another thing, unless `force`.
    """
    save, check, output, summary = (
        None if one is None else Path(one) for one in (save, check, output, summary)
    )
    if summary and not check:
        raise BadInput("--summary is for the verdicts of --check.", "Give both, or neither.")
    _check_distinct({"--save-baseline": save, "--check": check, "-o": output, "--summary": summary})
    if check and plan.looks is None:
        plan = plan.model_copy(update={"looks": gate.LOOKS})
    _append(summary, "")  # what cannot be written is said before anything is measured
    try:
        _check_gate(plan, save, check, margin, output, force)
        prepare()
        outcome = _measured(plan, save, check, margin, _keeping(output, force))
    except OwlError as error:
        _append(summary, baseline.no_verdict(str(error)))
        raise
    if outcome.verdicts is not None:
        _append(summary, baseline.markdown(outcome.verdicts, outcome.result))
    return outcome


def _check_distinct(given: Mapping[str, Path | None]) -> None:
    """Refuse two uses for one path: what is written last would replace the other."""
    seen: dict[Path, str] = {}
    for name, path in given.items():
        if path is None:
            continue
        artefact.check_path(path)
        other = seen.setdefault(path.resolve(), name)
        if other != name:
            raise BadInput(f"{other} and {name} are one path, {path}.", "Give another for one.")


def _check_gate(
    plan: BenchPlan,
    save: Path | None,
    check: Path | None,
    margin: float | None,
    output: Path | None,
    force: bool,
) -> None:
    """Raise `BadInput` for what can be known to be wrong before anything is made or measured."""
    plan.described()
    if save and check:
        raise BadInput("--save-baseline and --check exclude each other.", "Check first, then save.")
    if plan.draft and (save or check):
        raise BadInput("A draft is compared with none, not with a file.", "Leave out --draft.")
    if margin is not None and not save:
        raise BadInput("--margin is for --save-baseline, whose file keeps it.", "Leave it out.")
    if margin is not None and not 0 < margin < 1:
        raise BadInput(f"--margin {margin} is not between 0 and 1.", "0.05 is five per cent.")
    if save or check:
        baseline.one_of_each(plan)
    if save:
        baseline.check_save(save, plan, force)
    if check:
        baseline.read(check)
        baseline.check_rounds(plan)
    if output is not None:
        _check_output(plan, output, force)


def _check_output(plan: BenchPlan, output: Path, force: bool) -> None:
    """Refuse a folder for the result that may not be written, or that is measured."""
    draft = [plan.draft] if plan.draft else []
    artefact.check_apart(output, *plan.candidates, *plan.baselines, *draft)
    artefact.check_output(output, force)


def _append(file: Path | None, text: str) -> None:
    if file is None:
        return
    try:
        with file.open("a", encoding="utf-8") as opened:
            opened.write(text)
    except OSError as error:
        raise BadInput(f"The summary {file} cannot be written ({error.strerror}).") from error


def _measured(
    plan: BenchPlan,
    save: Path | None,
    check: Path | None,
    margin: float | None,
    keep: Callable[[Result], None],
) -> Outcome:
    with _shown() as progress:
        if save:
            margin = gate.Margins.time if margin is None else margin
            return Outcome(baseline.save(save, plan, progress, margin, keep))
        if check:
            verdicts, result = baseline.check(check, plan, progress, keep)
            return Outcome(result, tuple(verdicts))
        return Outcome(run_bench(plan, progress, keep=keep))


@contextlib.contextmanager
def _shown() -> Iterator[Progress]:
    """Show lines of progress on stderr: one that changes on a terminal, else one after another."""
    console = error_console()
    try:
        with console.status("Looking at the deployments") as status:
            if console.is_terminal:
                yield lambda line: status.update(escape(line))
            else:
                yield lambda line: console.print(line)
    except KeyboardInterrupt as error:
        going_on = "the same command goes on with the samples that were taken"
        raise KeyboardInterrupt(going_on) from error
