"""`--save-baseline` and `--check`: a benchmark as a gate; the verdicts come from gate.py."""

import datetime
import json
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from owl_deploy import __version__
from owl_deploy.bench import counters, gate
from owl_deploy.bench.gate import Margins, Side, Verdict
from owl_deploy.bench.measure import Progress, asked_of, fitted, run_bench
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import Result, paired
from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.inference import (
    Deployment,
    EngineProcess,
    installed_version,
    software,
    threads_for,
)
from owl_deploy.models import digests
from owl_deploy.utils import artefact

SCHEMA = 1
PROBE_TOKENS, PROBE_STEPS, PROBE_COLUMNS = 32, 16, 64
# The same kernels give the same logits, but those of another version may add up in another order,
# which quantized models amplify: of SmolLM2 other kernels' differ by up to 4.4e-2 in int4 and
# 7.4e-2 in int3, and those of int3 with the rows of two matrices permuted by 1.4e-1.
LOGITS_MARGIN = {
    "fp32": 1e-3,
    "bf16": 1e-2,
    **dict.fromkeys(("int8", "Q8_0"), 2e-2),
    **dict.fromkeys(("int4", "Q4_K_M", "Q4_0", "IQ4_XS"), 5e-2),
    **dict.fromkeys(("int3", "Q3_K_M", "IQ3_M", "Q2_K", "IQ2_M"), 8e-2),
}
_OF_OTHERS = max(LOGITS_MARGIN.values())


def one_of_each(plan: BenchPlan) -> None:
    """Refuse a plan that is no gate: it needs one deployment and a reference to time it by."""
    both = [path.absolute().resolve() for path in (*plan.candidates, *plan.baselines)]
    if len(plan.candidates) != 1 or len(plan.baselines) != 1 or both[0] == both[1]:
        raise BadInput(
            "A gate judges one deployment against one reference.",
            "Give one deployment, and --baseline with another that runs beside it.",
        )
    if len(plan.engines) > 1:
        raise BadInput("A gate runs in one engine.", "Give --engine once, or not at all.")


def check_save(path: Path, plan: BenchPlan, force: bool) -> None:
    """Raise `BadInput` for too few rounds, and for a file that is to stay."""
    if plan.pairs < gate.MIN_ROUNDS:
        raise BadInput(f"A baseline needs --pairs {gate.MIN_ROUNDS} or more.")
    artefact.check_parent(path)
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is no file.", "Give --save-baseline the name of one.")
    artefact.check_apart(path, *plan.candidates, *plan.baselines)
    if path.exists() and not force:
        try:
            read(path)
        except BadInput as error:
            raise BadInput(
                f"{path} is there, and is no baseline.", "Give another name, or --force."
            ) from error


def check_rounds(plan: BenchPlan) -> None:
    """Raise `BadInput` for rounds of which all looks together can come to no verdict."""
    pairs, looks = plan.pairs, plan.most_looks
    if pairs * looks < gate.MIN_ROUNDS:
        most = "1 look" if looks == 1 else f"{looks} looks"
        raise BadInput(
            f"{most} of {pairs} rounds can tell nothing: a check needs {gate.MIN_ROUNDS} in all.",
            f"Give --pairs {math.ceil(gate.MIN_ROUNDS / looks)} or more.",
        )


def save(
    path: Path,
    plan: BenchPlan,
    progress: Progress,
    margin: float,
    keep: Callable[[Result], None],
) -> Result:
    """Measure, and write what later runs are checked against; returns the benchmark's result.

    Here and in `check` that is given to `keep` before its samples are forgotten.
    """
    side = still_side(plan)
    if not math.isfinite(side.probe["scale"]):
        raise EngineFailed(
            "The logits of the deployment are infinite, or no numbers.",
            "No baseline was written: export the model again, or look for what is wrong with it.",
        )

    def write(result: Result) -> None:
        if not result.failures:
            _write(path, timed_side(side, result), result, margin)
        keep(result)

    result = run_bench(plan, progress, keep=write)
    if result.failures:
        raise EngineFailed(result.failures[0], "No baseline was written.")
    return result


def _write(path: Path, side: Side, result: Result, margin: float) -> None:
    precision = result.subjects[0].precision
    margins = Margins(time=margin, logits=LOGITS_MARGIN.get(precision, _OF_OTHERS))
    content = {
        "schema_version": SCHEMA,
        "created": result.created,
        "owl_version": __version__,
        "margins": asdict(margins),
        "side": asdict(side),
    }
    artefact.write_json(path, {**content, "digest": digests.of_json(content)})


def check(
    path: Path, plan: BenchPlan, progress: Progress, keep: Callable[[Result], None]
) -> tuple[list[Verdict], Result | None]:
    """The verdicts on a run against the baseline file at `path`; the file is never changed.

    The result is None when the answer was there before anything had to be timed. An engine that
    fails in the checks before is an `EngineFailed`.
    """
    saved, margins = read(path)
    progress("Checking what needs no timing")
    now = still_side(plan, saved)
    verdicts = gate.check_setting(saved, now)
    if verdicts:
        return verdicts, None
    verdicts = gate.check_probe(saved, now, margins)
    verdicts += gate.check_counters(saved, now, margins)
    if gate.overall(verdicts) in ("REGRESSED", "INCOMPARABLE"):
        return verdicts, None
    return _check_times(
        saved,
        now,
        margins,
        verdicts,
        plan.most_looks,
        partial(run_bench, plan, progress, keep=keep),
    )


def _check_times(
    saved: Side,
    now: Side,
    margins: Margins,
    verdicts: list[Verdict],
    looks: int,
    run: Callable[..., Result],
) -> tuple[list[Verdict], Result]:
    """Time the plan's rounds, up to `looks` times, while the answer is inconclusive."""

    def timed(result: Result) -> list[Verdict]:
        side = timed_side(now, result)
        found = gate.check_memory(saved, side, margins)
        return found + gate.check_time(saved, side, margins, looks)

    def decided(result: Result) -> bool:
        return bool(result.failures) or gate.overall(timed(result)) != "INCONCLUSIVE"

    result = run(decided=decided)
    if result.failures:
        return verdicts + _failed(result), result
    return verdicts + timed(result), result


def _failed(result: Result) -> list[Verdict]:
    """What failures come to: the deployment's own are its fault; others leave nothing to judge."""
    candidate, *others = result.subjects
    return [Verdict("engine", "REGRESSED", failure) for failure in candidate.failures] + [
        Verdict("reference", "INCOMPARABLE", f"{other.name}, which it is timed by, failed: {why}")
        for other in others
        for why in other.failures
    ]


def still_side(plan: BenchPlan, saved: Side | None = None) -> Side:
    """All of a run that needs no timing: its setting, logits and counters.

    `saved`: what it is to be checked against, some of whose logits are looked up.
    """
    from owl_deploy.bench.machine import look

    plan, entries, _ = fitted(plan)
    (subject, deployment), (reference, other) = entries[:2]
    here = look(0.1)
    threads = threads_for(plan.threads)
    setting = {
        "schema": SCHEMA,
        "engine": subject.engine,
        "engine version": installed_version(subject.engine),
        "precision": subject.precision,
        "reference": f"{reference.engine} {reference.precision}, {other.size_bytes} bytes",
        gate.REFERENCE_ENGINE: _runs(reference.engine),
        gate.REFERENCE_MODEL: digests.of_json(counters.count(other))[:16],
        "threads": threads,
        "instruction set": list(here.isa),
        "scenarios": [scenario.model_dump(mode="json") for scenario in plan.described()],
        **_told(plan, subject.engine),
    }
    tokens = saved.probe["tokens"] if saved else None
    probe = _probe(plan, subject.engine, deployment, threads, tokens)
    return Side(setting, here.cpu, probe, counters.count(deployment), 0, {})


def _runs(engine: str) -> str:
    """An engine's version, and what decides its times besides: the reference's, too, are half of
    every ratio. Of the operators' library as `_told` says.
    """
    by = software(engine)
    beneath = [f"{name} {by[name]}" for name in ("onnxruntime", "kernels") if name in by]
    return ", ".join([str(by["version"]), *beneath])


def _told(plan: BenchPlan, engine: str) -> dict[str, Any]:
    """What else decides the times: the runtime beneath, the kernels of our own operators, and the
    prompts answered.

    The operators' library is none of it: whether that got slower is what a gate is asked.
    """
    told = {"onnxruntime": "onnxruntime version", "kernels": "kernels"}
    by = software(engine)
    found: dict[str, Any] = {told[name]: by[name] for name in told if name in by}
    if prompts := asked_of(plan):
        found["prompts"] = digests.of_json({"prompts": prompts})
    return found


def _probe(
    plan: BenchPlan,
    engine: str,
    deployment: Deployment,
    threads: int,
    saved: Sequence[int] | None,
) -> dict[str, Any]:
    """What the deployment answers to a fixed prompt: tokens, and some of the logits behind them.

    Among these the ones of the tokens that a `saved` probe chose.
    """
    generator = np.random.default_rng(0)
    prompt = [int(token) for token in generator.integers(0, deployment.vocab, PROBE_TOKENS)]
    columns = np.sort(generator.permutation(deployment.vocab)[:PROBE_COLUMNS])
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "logits.npy"
        with EngineProcess(
            engine,
            deployment.path,
            threads=threads,
            context=64,
            trust_library=plan.trust_library,
        ) as process:
            answer = process.request(
                "greedy", tokens=prompt, count=PROBE_STEPS, logits_file=str(file)
            )
        logits = np.load(file)
    found = {
        "tokens": answer["tokens"],
        "scale": float(np.abs(logits).max()),
        "logits": _rounded(logits[:, columns]),
        "largest": _rounded(logits.max(axis=1)),
    }
    if saved is not None:
        pairs = zip(logits, saved, strict=False)
        # A token beyond a smaller vocabulary has no chance.
        found["of_saved"] = [
            _rounded(row[token]) if token < len(row) else -math.inf for row, token in pairs
        ]
    return found


def _rounded(logits: np.ndarray) -> Any:  # noqa: ANN401 - a number, or lists of them
    return np.round(logits.astype(float), 6).tolist()


def timed_side(side: Side, result: Result) -> Side:
    """`side` with the times and the memory of `result`."""
    candidate, reference = result.subjects[:2]
    ratios = {}
    for key in result.statistics:
        now, then = paired(candidate, reference, key)
        ratios[key] = [float(value) for value in np.log(now) - np.log(then)]
    peak = candidate.peak_bytes if candidate.samples else 0
    return replace(side, ratios=ratios, peak_bytes=peak)


def read(path: Path) -> tuple[Side, Margins]:
    """Read a baseline file; raises `BadInput` for one that is missing, damaged or edited."""
    hint = "Make it again with --save-baseline."
    try:
        content = dict(json.loads(path.read_text(encoding="utf-8")))
        digest = content.pop("digest")
        if digest != digests.of_json(content):
            raise BadInput(f"The baseline file {path} was edited or damaged.", hint)
        return Side(**content["side"]), Margins(**content["margins"])
    except OSError as error:
        raise BadInput(f"The baseline file {path} cannot be read ({error.strerror}).") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is not a baseline file, or a damaged one.", hint) from error


def markdown(verdicts: Sequence[Verdict], result: Result | None) -> str:
    """The verdicts as a summary for a pull request."""
    word = gate.overall(verdicts)
    lines = [f"## owl bench: {word}", "", "| metric | verdict | why |", "|---|---|---|"]
    lines += [f"| {_cell(v.metric)} | {v.word} | {_cell(v.why)} |" for v in verdicts]
    if result is not None:
        lines += ["", f"{result.machine.name}, {result.threads} threads, {result.pairs} rounds."]
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes")
    return "\n".join([*lines, "", f"owl-deploy {__version__}, {now}", ""])


def no_verdict(why: str) -> str:
    """The summary of a check that ended in an error."""
    return f"## owl bench: no verdict\n\n{_cell(why)}\n"


def _cell(text: str) -> str:
    """Text that stays within a cell of a table, and is no markup."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
