"""Tasks of EleutherAI's lm-evaluation-harness, on checkpoints and on deployments as they run."""

import contextlib
import difflib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from owl_deploy import __version__
from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput, OwlError, with_type
from owl_deploy.evaluate.kept import KeptAnswers
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.shared import SharedModel
from owl_deploy.evaluate.subject import (
    deciding,
    engine_of,
    is_deployment,
    keep,
    load_model,
    no_model_has,
    refuse_adapter,
)
from owl_deploy.inference import Deployment, EngineProcess, get_engine, open_deployment, software
from owl_deploy.inference.deployment import seen_of
from owl_deploy.inference.drivers.onnxruntime import runs_whole
from owl_deploy.models import digests
from owl_deploy.models.checkpoint import open_checkpoint, stored_dtype
from owl_deploy.models.manifest import versions
from owl_deploy.models.measurements import JUDGED_BY, by_document
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.hardware import find_device, find_dtype, name_of
from owl_deploy.utils.progress import bar
from owl_deploy.utils.ranks import ALONE, Ranks, leads

PAPER = ("boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
_PLACES = 8  # texts that are written side by side
_BOOTSTRAP = 1000  # draws for the standard errors that have no formula: perplexities, F1


@dataclass(frozen=True)
class Metric:
    """A task's figure, with its standard error where there is one."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What one task gave: `documents` of it were run, with `few_shot` examples before each.

    `every`: 1 where they are all or the first ones, 4 where every fourth was taken; `limit`: the
    most that were asked for, if anything was.
    `window`: the tokens that the model saw at most; `by`: the engine, or the dtype in PyTorch.
    `answers`: of a task whose answers are programs, each with what came of it. `right`: of another
    with a metric of `JUDGED_BY`, whether each document was answered right, by its number.
    `questions_sha256`: of all that was asked, and what is right; a program's is each model's own.
    """

    metrics: dict[str, Metric]
    documents: int
    few_shot: int
    task_version: str
    harness: str
    window: int
    by: str
    every: int = 1
    limit: int | None = None
    answers: list[dict[str, Any]] = field(default_factory=list)
    right: dict[str, bool] = field(default_factory=dict)
    questions_sha256: str = ""

    @property
    def by_document(self) -> dict[str, bool]:
        """Whether each document was answered right; empty where the task does not say so."""
        return by_document(self.right, self.answers)


@dataclass(frozen=True)
class Tasks:
    """Tasks that the harness has loaded; `own` says that they are a user's, not the harness's."""

    loaded: dict[str, Any]
    own: bool


@contextlib.contextmanager
def _one_speaks() -> Iterator[None]:
    """Keep the harness's and its libraries' progress bars to the process that speaks."""
    if leads():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


def require_harness() -> None:
    """Prepare the harness."""
    # Read when these are imported: a metric from the Hub would be code from the Hub.
    os.environ.update(HF_EVALUATE_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")
    import lm_eval.caching.cache  # noqa: F401 - is it there?

    for name in ("lm_eval", "huggingface_hub", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _requests_folder(tasks: Iterable[Any]) -> Path:
    """Where requests for the documents of `tasks` are kept, which the harness does by name alone.

    Data of the same name may be others another day: revised, or shuffled as they were loaded.
    """
    documents = [
        [[*task.eval_docs], [*task.fewshot_docs()] if task.get_config("num_fewshot") else []]
        for task in tasks
    ]
    digest = digests.of_json([version("lm_eval"), documents])
    return cache_dir() / "eval" / f"requests-{digest[:16]}"


@_one_speaks()
def load_tasks(
    names: Sequence[str], path: str | Path | None = None, allow_code: bool = False
) -> Tasks:
    """The tasks called `names`, with their data; "paper" is the paper's seven.

    `path`: a folder with task files (YAML) of one's own. `allow_code`: HumanEval may run the
    programs that the model writes. Raises `BadInput` for a name that is unknown, with near ones,
    and for data that cannot be had; `EnvironmentFailed` where programs cannot be run safely.
    """
    require_harness()
    from lm_eval.tasks import TaskManager

    from owl_deploy.evaluate.humaneval import NAME, humaneval

    if path is not None and not Path(path).is_dir():
        raise BadInput(f"There is no folder {path}.", "Give one with task files (YAML).")
    wanted = list(
        dict.fromkeys(one for name in names for one in (PAPER if name == "paper" else (name,)))
    )
    if not wanted:
        raise BadInput("--tasks names no task.")
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    if NAME in wanted:
        wanted.remove(NAME)
        loaded["tasks"][NAME] = humaneval(allow_code)
    if not wanted:
        return Tasks(loaded, own=True)
    with bar("Reading the harness's tasks", 1) as advance:
        manager = TaskManager(include_path=path and str(path), include_defaults=False)
        own = all(name in manager.all_tasks for name in wanted)
        if not own:  # reading some ten thousand files takes seconds
            manager = TaskManager(include_path=path and str(path))
        advance(1)
    for name in wanted:
        if name not in manager.all_tasks:
            raise _unknown(name, manager.all_tasks, path)
    with bar("Loading the tasks' data", len(wanted)) as advance:
        for name in wanted:
            for key, found in _load(manager, name).items():
                loaded[key] |= found
            advance(1)
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return Tasks(loaded, own or path is not None)


def _unknown(name: str, known: Sequence[str], path: str | Path | None) -> BadInput:
    near = difflib.get_close_matches(name, known, n=4, cutoff=0.6)
    hint = f"Near it: {', '.join(near)}." if near else "`lm_eval ls tasks` lists the harness's."
    own = "" if path else " For a task of your own give --tasks-path."
    return BadInput(f"Unknown task {name!r}.", hint + own)


def _load(manager: Any, name: str) -> dict[str, Any]:  # noqa: ANN401 - the harness has no types
    try:
        found: dict[str, Any] = manager.load([name])
    except Exception as error:  # no network, no such file, a wrong YAML: many types
        raise BadInput(
            f"The data of the task {name!r} cannot be had ({with_type(error)}).",
            "The harness's come from the Hugging Face Hub: run it once where there is a network.",
        ) from error
    return found


@_one_speaks()
def evaluate_tasks(
    folder: Path, tasks: Tasks, asked: EvaluationSettings, ranks: Ranks = ALONE
) -> dict[str, TaskResult]:
    """Run `tasks` on a checkpoint, or on a deployment as it runs; results by task name.

    Contexts longer than the window are cut on the left. Beside a folder that owl wrote lie its
    results without an adapter. Of several `ranks` each answers for its documents, by a checkpoint.
    Raises `BadInput` for what cannot be run, and for ranks that are asked different things.
    """
    if not folder.is_dir():  # a name of the Hub
        folder = open_checkpoint(folder).folder
    adapter = None if asked.adapter is None else Path(asked.adapter)
    measured = digests.state_of(folder)
    with _opened(folder, tasks, asked, ranks) as opened:
        by = [__version__, opened.by, opened.software, opened.window]
        # What the answers are for as well: an evaluation of other tasks does not forget them.
        key = [measured, adapter and digests.state_of(adapter), *by]
        key += [sorted(tasks.loaded["tasks"]), asked.limit, asked.every]
        kept = KeptAnswers(opened.model, key, ranks.rank)
        model = SharedModel(kept, ranks)
        results: dict[str, TaskResult] = {}
        for group in _groups(tasks, opened, ranks):
            found = _run(model, group, asked, opened)
            if adapter is None and ranks.leads:  # each when it is there: the next may fail
                told = {name: asdict(one) for name, one in found.items()}
                keep(folder, "tasks", told, add=True, measured=measured)
            results |= found
    ranks.gathered(None)  # nobody reads or writes answers any more
    kept.forget()
    return results


@dataclass(frozen=True)
class _Group:
    """Tasks that are asked in one way: `chat` puts them into the model's chat template.

    `own`: a user's, whose YAML may fail at any document. `cached`: the harness may keep the
    requests that it builds, by the task's name.
    """

    loaded: dict[str, Any]
    chat: bool = False
    own: bool = False
    cached: bool = False


def _groups(tasks: Tasks, opened: "_Opened", ranks: Ranks) -> list[_Group]:
    """HumanEval is asked by chat where the model has a template for that; the others never.

    Each task alone, so that its result is kept before the next begins, but where a group's mean is
    asked for.
    """
    from owl_deploy.evaluate.humaneval import HumanEval

    every = tasks.loaded["tasks"]
    code = {name: task for name, task in every.items() if isinstance(task, HumanEval)}
    chat = opened.model.tokenizer.chat_template is not None
    for task in code.values():
        task.for_model(chat, opened.window, ranks)
    others = {name: task for name, task in every.items() if name not in code}
    each = [others] if tasks.loaded.get("groups") else [{name: others[name]} for name in others]
    # One's own files change under the same name.
    own = tasks.own
    found = [
        _Group(tasks.loaded | {"tasks": some}, own=own, cached=not own) for some in each if some
    ]
    return found + ([_Group({"tasks": code}, chat)] if code else [])


def _run(
    model: Any,  # noqa: ANN401 - the harness has no types
    group: _Group,
    asked: EvaluationSettings,
    opened: "_Opened",
) -> dict[str, TaskResult]:
    """The results of a group; raises `BadInput` where the harness refuses, or a YAML is wrong."""
    try:
        return _asked(model, group, asked, opened)
    except (OwlError, MemoryError, OSError):
        raise
    except (ValueError, AssertionError, ArithmeticError) as error:
        raise BadInput(
            f"The harness could not run these tasks ({with_type(error)}).",
            "Is --window large enough for their continuations?",
        ) from error
    except Exception as error:
        if not group.own:
            raise
        names = ", ".join(group.loaded["tasks"])
        raise BadInput(
            f"The task {names} could not be run ({with_type(error)}).",
            "Its YAML, and the functions that it names, must be right for every document.",
        ) from error


def _asked(
    model: Any,  # noqa: ANN401
    group: _Group,
    asked: EvaluationSettings,
    opened: "_Opened",
) -> dict[str, TaskResult]:
    import lm_eval.caching.cache
    from lm_eval.evaluator import evaluate

    limit, every = asked.limit, asked.every
    tasks = group.loaded["tasks"]
    for task in tasks.values():
        task.set_fewshot_seed(seed=1234)  # the harness's own; each model gets the same examples
    cached = group.cached and every == 1  # every other document is no part of a name
    if cached:
        lm_eval.caching.cache.PATH = str(_requests_folder(tasks.values()))
    samples = None
    if every > 1:
        samples = {n: [*range(0, len(t.eval_docs), every)][:limit] for n, t in tasks.items()}
    found = evaluate(
        lm=model,
        task_dict=group.loaded,
        limit=limit if samples is None else None,
        samples=samples,
        cache_requests=cached,
        apply_chat_template=group.chat,
        bootstrap_iters=_BOOTSTRAP,
        log_samples=True,
    )
    answers = {
        name: [asdict(one) for one in getattr(task, "answers", [])] for name, task in tasks.items()
    }
    return {
        name: TaskResult(
            metrics=_metrics(name, row),
            documents=int(row["sample_len"]),
            few_shot=int(found["n-shot"].get(name) or 0),
            task_version=str(found["versions"].get(name)),
            harness=version("lm_eval"),
            window=opened.window,
            by=opened.by,
            every=every,
            limit=limit,
            answers=answers[name],
            right={} if answers[name] else _right(found["samples"][name]),
            questions_sha256="" if answers[name] else _questions(found["samples"][name]),
        )
        for name, row in found["results"].items()
        if name in tasks
    }


@dataclass(frozen=True)
class _Opened:
    """A folder as a `model` of the harness, what computes it (`by`, and its `software`), and how
    many tokens it sees (`window`).
    """

    model: Any
    by: str
    software: dict[str, Any]
    window: int


@contextlib.contextmanager
def _opened(
    folder: Path, tasks: Tasks, asked: EvaluationSettings, ranks: Ranks
) -> Iterator[_Opened]:
    if is_deployment(folder):
        refuse_adapter(asked.adapter)
        from owl_deploy.evaluate.harness import DeploymentLM

        deployment = open_deployment(folder, trust_library=asked.trust_library)
        name = engine_of(deployment, asked.engine)
        places = _places(tasks, deployment, name)
        seen = seen_of(folder, asked.window)
        tokenizer = load_tokenizer(folder)
        context = get_engine(name).context_for(seen)
        with EngineProcess(
            name,
            folder,
            threads=asked.threads,
            trust_library=asked.trust_library,
            context=context,
            all_logits=not places,
            places=places,
        ) as process:
            model = DeploymentLM(process, tokenizer, seen, places, deployment.ends)
            yield _Opened(model, name, software(name, deployment.library), seen)
        return
    from owl_deploy.evaluate.hugging_face import CheckpointLM

    checkpoint, hardware = open_checkpoint(folder), asked.hardware
    device = find_device(hardware.device)
    dtype = find_dtype(hardware.dtype, stored_dtype(checkpoint.config), device, exact=True)
    seen = seen_of(checkpoint.folder, asked.window)
    if ranks.size > 1:  # before a model is loaded for nothing; what is asked: `SharedModel`
        alike = {"tasks": [*tasks.loaded["tasks"]], "--window": seen, "--limit": asked.limit}
        alike |= {"--every": asked.every, **deciding(checkpoint, asked.adapter, dtype, device)}
        ranks.check_alike(alike)
    model = CheckpointLM(
        load_model(checkpoint, dtype, device, asked.adapter),
        load_tokenizer(checkpoint.folder),
        seen,
        hardware.batch_size or 1,
    )
    yield _Opened(model, name_of(dtype), versions(), seen)


def _places(tasks: Tasks, deployment: Deployment, engine: str) -> int:
    """How many texts an engine writes side by side for the `tasks`: several where they ask for
    nothing else, and a row of a batch says what it says alone, as in this package's operators.
    """
    only_texts = all(one.OUTPUT_TYPE == "generate_until" for one in tasks.loaded["tasks"].values())
    opens = "model" in deployment.folder.settings and not runs_whole(deployment.path)
    return _PLACES if only_texts and opens and get_engine(engine).operators else 0


def _questions(samples: Sequence[Mapping[str, Any]]) -> str:
    """A digest of documents, prompts and what is right: a task of one's own changes by its name."""
    kinds = ("doc_hash", "prompt_hash", "target_hash")
    return digests.of_json(sorted({tuple(one[kind] for kind in kinds) for one in samples}))


def _right(samples: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether each document was answered right, by its number; of several filters by the first.

    Empty where no metric says so of every document.
    """
    first = [one for one in samples if one["filter"] == samples[0]["filter"]]
    judged = {
        str(one["doc_id"]): next((one[name] for name in JUDGED_BY if name in one), None)
        for one in first
    }
    if not all(value in (0, 1) for value in judged.values()):
        return {}
    return {document: bool(value) for document, value in judged.items()}


def _metrics(task: str, row: Mapping[str, Any]) -> dict[str, Metric]:
    """The figures of one task, from keys such as "acc,none" and "acc_stderr,none"."""
    found = {}
    for key, value in row.items():
        name, _, chosen = key.partition(",")
        if not chosen or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        if not math.isfinite(value):
            raise no_model_has(f"{name} of the task {task!r} is {value}")
        stderr = row.get(f"{name}_stderr,{chosen}")
        label = name if chosen == "none" else f"{name} ({chosen})"
        known = isinstance(stderr, int | float) and math.isfinite(stderr)
        found[label] = Metric(float(value), float(stderr) if known and stderr is not None else None)
    return found


def means(results: Mapping[str, TaskResult]) -> dict[str, Metric]:
    """Of each accuracy that two tasks at least have: its mean over those tasks."""
    found = {}
    for name in ("acc", "acc_norm"):
        own = [one.metrics[name] for one in results.values() if name in one.metrics]
        if len(own) > 1:
            errors = [metric.stderr for metric in own if metric.stderr is not None]
            whole = len(errors) == len(own)
            stderr = math.sqrt(sum(error**2 for error in errors)) / len(own) if whole else None
            found[name] = Metric(sum(metric.value for metric in own) / len(own), stderr)
    return found
