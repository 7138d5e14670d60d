"""`owl eval --tasks`: the harness's own class for checkpoints, and our adapter for deployments."""

import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from owl_deploy import inference
from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.evaluate import zero_shot
from owl_deploy.evaluate.perplexity import checkpoint_perplexity, deployment_perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.export.targets import export
from owl_deploy.models.measurements import measurement
from owl_deploy.runtime import library_path
from tests import tiny

harness = pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")

TASKS = Path("tests/tasks")
NAMES = ("owl_sentences", "owl_texts", "owl_endings")
WINDOW = 64


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Nothing of these tests stays in the user's caches."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zero_shot, "cache_dir", lambda: folder)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "datasets")
        yield folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.write_llama(
        tmp_path_factory.mktemp("tasks") / "model", hidden_size=128, intermediate_size=336
    )


@pytest.fixture(scope="module")
def deployment(tmp_path_factory, checkpoint):
    """Made at the first use, once for each target."""
    folder = tmp_path_factory.mktemp("deployments")

    def made(target):
        if not (folder / target).exists():
            options = {"precision": "fp32"} if target == "owl" else {}
            export(checkpoint, folder / target, target=target, **options)
        return folder / target

    return made


@pytest.fixture(scope="module")
def tasks():
    return zero_shot.load_tasks(NAMES, TASKS)


def responses(tasks):
    """What the model answered in the last run: per task, each request with its response."""
    return {
        name: [(one.args, one.resps[0]) for one in task.instances]
        for name, task in tasks.loaded["tasks"].items()
    }


def missing(target, engine):
    if engine == "deepsparse" and not inference.is_installed("deepsparse"):
        return "owl engines install deepsparse"
    try:
        library_path() if target == "owl" else None
    except EnvironmentFailed as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("target", "engine"),
    [
        ("onnxruntime", None),
        ("owl", None),
        ("deepsparse", None),
        ("deepsparse", "deepsparse"),
    ],
)
def test_a_deployment_answers_as_the_checkpoint(checkpoint, deployment, tasks, target, engine):
    if reason := missing(target, engine):
        pytest.skip(reason)
    wanted = zero_shot.evaluate_tasks(checkpoint, tasks, EvaluationSettings(window=WINDOW))
    by_torch = responses(tasks)
    folder = deployment(target)
    found = zero_shot.evaluate_tasks(
        folder, tasks, EvaluationSettings(window=WINDOW, engine=engine)
    )
    by_engine = responses(tasks)

    assert by_torch.keys() == by_engine.keys() == set(NAMES)
    for (request, expected), (same, answer) in zip(
        by_torch["owl_sentences"], by_engine["owl_sentences"], strict=True
    ):
        assert request == same
        assert answer[0] == pytest.approx(expected[0], abs=1e-3)
        assert answer[1] == expected[1]
    for (_, expected), (_, answer) in zip(
        by_torch["owl_texts"], by_engine["owl_texts"], strict=True
    ):
        assert answer == pytest.approx(expected, abs=1e-3)
    assert by_torch["owl_endings"] == by_engine["owl_endings"]
    for name in NAMES:
        assert found[name].documents == wanted[name].documents
        assert found[name].questions_sha256 == wanted[name].questions_sha256 != ""
        for metric, value in wanted[name].metrics.items():
            assert found[name].metrics[metric].value == pytest.approx(value.value, rel=1e-4)
    assert found["owl_sentences"].metrics["acc"] == wanted["owl_sentences"].metrics["acc"]

    assert found["owl_sentences"].right == wanted["owl_sentences"].right
    assert (
        sum(found["owl_sentences"].right.values()) / 10
        == found["owl_sentences"].metrics["acc"].value
    )
    assert found["owl_texts"].right == {}
    recorded = measurement(folder, "tasks")["owl_sentences"]
    assert recorded["right"] == found["owl_sentences"].right
    assert recorded["by"] == (engine or ("onnxruntime" if target == "deepsparse" else target))
    assert recorded["metrics"]["acc"]["value"] == found["owl_sentences"].metrics["acc"].value
    assert (recorded["window"], recorded["documents"]) == (WINDOW, 10)


def test_the_context_is_cut_and_empty_somewhere(checkpoint):
    """Or the test above would say nothing of these."""
    rows = [json.loads(line) for line in (TASKS / "sentences.json").read_text().splitlines()]
    lengths = [len(load_tokenizer(checkpoint)(row["start"])["input_ids"]) for row in rows]
    assert min(lengths) == 0
    assert max(lengths) > WINDOW


@pytest.mark.parametrize("engine", ["onnxruntime", "deepsparse"])
def test_perplexity_of_a_deployment_is_the_checkpoints(checkpoint, deployment, text_file, engine):
    if reason := missing("deepsparse", engine):
        pytest.skip(reason)
    folder = deployment("deepsparse" if engine == "deepsparse" else "onnxruntime")
    options = {"window": 128, "windows": 4}
    wanted = checkpoint_perplexity(checkpoint, EvaluationSettings(str(text_file), **options))
    found = deployment_perplexity(
        folder, EvaluationSettings(str(text_file), **options, engine=engine)
    )
    assert found.value == pytest.approx(wanted.value, rel=1e-3)
    assert measurement(folder, "perplexity")["engine"] == engine


def test_requests_are_built_once_for_the_harnesss_own_tasks(checkpoint, caches, tasks, monkeypatch):
    theirs = zero_shot.Tasks(tasks.loaded, own=False)
    first = zero_shot.evaluate_tasks(checkpoint, theirs, EvaluationSettings(window=WINDOW))
    assert len(list((caches / "eval").glob("*/*"))) == len(NAMES)
    for task in tasks.loaded["tasks"].values():
        monkeypatch.setattr(task, "fewshot_context", None)  # what builds them
    again = zero_shot.evaluate_tasks(checkpoint, theirs, EvaluationSettings(window=WINDOW, limit=3))
    assert again["owl_texts"].documents == 3
    assert zero_shot.evaluate_tasks(checkpoint, theirs, EvaluationSettings(window=WINDOW)) == first


def test_answers_to_other_tasks_are_not_forgotten(checkpoint, tasks, monkeypatch):
    """One that ends forgets what it was told, and not what another has told so far."""
    keys = []

    class Noted(zero_shot.KeptAnswers):
        def __init__(self, model, key, rank=0):
            keys.append(json.dumps(key, default=str))
            super().__init__(model, key, rank)

    monkeypatch.setattr(zero_shot, "KeptAnswers", Noted)
    every = tasks.loaded["tasks"]
    one = zero_shot.Tasks(tasks.loaded | {"tasks": {NAMES[0]: every[NAMES[0]]}}, own=True)
    for some, asked in ((tasks, {}), (one, {}), (one, {"every": 2}), (one, {"limit": 1})):
        zero_shot.evaluate_tasks(checkpoint, some, EvaluationSettings(window=WINDOW, **asked))
    assert len(set(keys)) == len(keys) == 4


def test_requests_of_other_documents_lie_elsewhere(tasks):
    task = tasks.loaded["tasks"][NAMES[0]]
    documents = list(task.eval_docs)

    def folder(documents, shown=()):
        get_config = {"num_fewshot": len(shown)}.get
        told = SimpleNamespace(
            eval_docs=documents, get_config=get_config, fewshot_docs=lambda: shown
        )
        return zero_shot._requests_folder([told])

    assert folder(documents) == folder(documents)
    others = [documents[::-1], documents[1:], [documents[0] | {"more": 1}, *documents[1:]]]
    found = [folder(documents), *map(folder, others), folder(documents, documents[:1])]
    assert len(set(found)) == 5


def test_other_questions_have_another_digest():
    one = {"doc_hash": "a", "prompt_hash": "b", "target_hash": "c"}
    samples = [one, one | {"doc_hash": "d"}]
    found = [
        zero_shot._questions(samples),
        *(zero_shot._questions([one | {kind: "x"}, samples[1]]) for kind in one),
        zero_shot._questions(samples[:1]),
    ]
    assert len(set(found)) == 5
    assert zero_shot._questions(samples[::-1]) == found[0]


def test_the_command_line_shows_models_side_by_side(owl, checkpoint, deployment, text_file):
    folder = deployment("onnxruntime")
    arguments = ("eval", checkpoint, folder, "--tasks", "owl_sentences,owl_texts")
    arguments += ("--tasks-path", TASKS, "--limit", 4, "-p", text_file, "--window", 64)
    code, out, err = owl(*arguments, "--windows", 2, "--batch-size", 3)
    assert code == 0, err
    assert "model: perplexity" in out
    assert "onnxruntime: perplexity" in out
    (accuracy,) = (line.split() for line in out.splitlines() if line.startswith("owl_sentences"))
    assert accuracy[:3] == ["owl_sentences", "4", "acc"]
    assert accuracy[3:6] == accuracy[6:9]
    assert accuracy[4] == "±"
    assert out.splitlines()[-1] == (
        "onnxruntime beside model, owl_sentences: no difference in 4 documents."
    )
    assert max(map(len, out.splitlines()[2:])) <= 80
    code, out, err = owl(*arguments, "--windows", 2, "--json")
    assert code == 0, err
    first, second = json.loads(out)["models"]
    assert first["tasks"]["owl_texts"]["documents"] == 4
    assert second["value"] == pytest.approx(first["value"], rel=1e-3)
    alike = {"documents": 4, "lost": 0, "won": 0, "p_value": 1.0}
    assert second["beside_first"] == {"owl_sentences": alike}
    assert "beside_first" not in first


def test_the_documents_are_numbered_as_the_task_has_them(checkpoint, tasks):
    every = zero_shot.evaluate_tasks(checkpoint, tasks, EvaluationSettings(window=WINDOW))
    third = zero_shot.evaluate_tasks(checkpoint, tasks, EvaluationSettings(window=WINDOW, every=3))
    right = third["owl_sentences"].right
    assert list(right) == ["0", "3", "6", "9"]
    assert right.items() <= every["owl_sentences"].right.items()


def test_means_are_over_the_tasks_that_have_the_metric():
    def result(**metrics):
        return zero_shot.TaskResult(metrics, 10, 0, "1", "0", 64, "float32")

    found = zero_shot.means(
        {
            "a": result(acc=zero_shot.Metric(0.5, 0.3), acc_norm=zero_shot.Metric(1.0, 0.1)),
            "b": result(acc=zero_shot.Metric(0.7, 0.4), word_perplexity=zero_shot.Metric(9, None)),
        }
    )
    assert found.keys() == {"acc"}
    assert found["acc"].value == pytest.approx(0.6)
    assert found["acc"].stderr == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "Nothing says what to evaluate by"),
        (["--tasks", "owl_sentence"], "Unknown task 'owl_sentence'. Near it: owl_sentences"),
        (["--tasks", "owl_sentences", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "owl_sentences", "--window", "1"], "--window 1 is too small"),
        (["--tasks", "owl_sentences", "--window", "2"], "Is --window large enough"),
        (["--tasks", "owl_sentences", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["--tasks", "owl_sentences", "--dtype", "float8"], "Unknown dtype"),
        (["--tasks", ","], "Nothing says"),
        (["--tasks", "half"], "The task half could not be run (UndefinedError"),
        (["--tasks", "broken"], "The data of the task 'broken' cannot be had"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(
    owl, checkpoint, tmp_path, monkeypatch, options, complaint
):
    # Reading the harness's own ten thousand files for a name that is unknown takes seconds.
    own = functools.partial(harness.TaskManager, include_defaults=False)
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager", lambda include_path, **_: own(None, include_path)
    )
    broken = (TASKS / "texts.yaml").read_text().replace("owl_texts", "broken")
    (tmp_path / "broken.yaml").write_text(broken.replace("texts.json", "no.json"))
    for name in ("sentences", "texts"):
        (tmp_path / f"{name}.yaml").write_text((TASKS / f"{name}.yaml").read_text())
    (tmp_path / "half.json").write_text('[{"text": "a b"}, {"text": null}]')  # the first is seen
    half = broken.replace("{{text}}", "{{text.strip()}}").replace("broken", "half", 1)
    (tmp_path / "half.yaml").write_text(half.replace("tests/tasks/texts", str(tmp_path / "half")))
    code, _, err = owl("eval", checkpoint, *options, "--tasks-path", tmp_path)
    assert (code, complaint in err) == (2, True), err


def test_an_engine_that_does_not_open_the_deployment(owl, deployment):
    folder = deployment("onnxruntime")
    code, _, err = owl(
        *("eval", folder, "--tasks", "owl_texts", "--tasks-path", TASKS, "-e", "deepsparse")
    )
    assert (code, "was exported for onnxruntime" in err) == (2, True), err


def test_the_papers_tasks_are_the_harnesss_and_need_the_hub(monkeypatch):
    """Their names are known; where there is no network, one sentence says so."""

    def refuse(*_, **__):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    folder = Path(harness.__file__).parent
    parts = ("super_glue", "glue", "hellaswag", "winogrande", "arc", "openbookqa")
    paths = [folder / one for one in parts]
    known = harness.TaskManager(include_defaults=False, include_path=paths)
    assert set(zero_shot.PAPER) <= set(known.all_tasks)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: known)
    with pytest.raises(BadInput, match=r"'boolq' cannot be had.*Couldn't reach.*Hub: run it once"):
        zero_shot.load_tasks(["paper"])


def test_without_the_harness(owl, checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.caching.cache", None)
    code, _, err = owl("eval", checkpoint, "--tasks", "paper")
    assert code == 4
    assert "pip install 'owl-deploy[eval]'" in err


def test_tasks_run_on_the_threads_asked_for(owl, deployment, loads):
    asked = ("eval", deployment("onnxruntime"), "--tasks", "owl_endings", "--tasks-path", TASKS)
    assert owl(*asked, "--limit", 1, "--window", WINDOW, "--threads", 3)[0] == 0
    assert [load["threads"] for load in loads] == [3]


def test_an_unknown_task_may_be_ones_own():
    known = ["boolq", "piqa"]
    own = "For a task of your own give --tasks-path."
    assert zero_shot._unknown("bolq", known, None).hint == f"Near it: boolq. {own}"
    assert zero_shot._unknown("mine", known, None).hint.endswith(f"lists the harness's. {own}")
    assert zero_shot._unknown("bolq", known, TASKS).hint == "Near it: boolq."
