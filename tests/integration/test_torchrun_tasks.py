"""`owl eval --tasks` in several processes: what one process finds, and nothing is asked twice."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from owl_deploy.evaluate import zero_shot
from owl_deploy.evaluate.run import evaluate
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.utils.hardware import Hardware
from tests import alike, divided, fresh

pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")

FOLDER = Path("tests/tasks")
# Choices, whole texts, continuations, and examples that the harness draws for each document.
NAMES = ("owl_sentences", "owl_texts", "owl_endings", "owl_shots")
CODE = {"tasks": ["humaneval"], "allow_code": True, "window": 128, "every": 20, "limit": 5}


@pytest.fixture(autouse=True)
def caches(monkeypatch, tmp_path):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return tmp_path / "cache" / "eval" / "answers"


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_find_what_one_does(llama, processes):
    line = ("eval", llama, "--tasks", ",".join(NAMES), "--tasks-path", FOLDER, "--window", 64)
    done = fresh.group(processes, fresh.owl, *line, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Loading the tasks' data") == 1
    (one,) = evaluate([llama], EvaluationSettings(tasks=NAMES, tasks_path=FOLDER, window=64))
    assert json.loads(done.stdout) == one.to_json()  # one speaks, to the last bit the same


def test_more_processes_than_documents(llama):
    line = ("eval", llama, "--tasks", "owl_endings", "--tasks-path", FOLDER, "--window", 64)
    done = fresh.group(3, fresh.owl, *line, "--limit", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tasks"]["owl_endings"]["documents"] == 1


def test_every_model_gets_the_same_examples(llama):
    tasks = zero_shot.load_tasks(["owl_shots"], FOLDER)
    (task,) = tasks.loaded["tasks"].values()
    asked = []
    for _ in range(2):
        zero_shot.evaluate_tasks(llama, tasks, EvaluationSettings(window=64))
        asked.append([request.args for request in task.instances])
    assert asked[0] == asked[1]


@pytest.mark.parametrize(
    ("what", "names", "other"),
    [
        ("tasks", ["owl_endings", "owl_texts"], {}),
        ("--window", ["owl_endings"], {"window": 32}),
        ("--limit", ["owl_endings"], {"limit": 1}),
        ("--every", ["owl_endings"], {"every": 2}),
        ("dtype", ["owl_endings"], {"hardware": Hardware(dtype="bfloat16")}),
    ],
)
def test_processes_that_are_asked_different_things_are_refused(
    llama, monkeypatch, what, names, other
):
    asked = EvaluationSettings(window=64)
    of_first, of_second = (zero_shot.load_tasks(some, FOLDER) for some in (["owl_endings"], names))
    said = alike.refused(
        monkeypatch,
        lambda ranks: zero_shot.evaluate_tasks(llama, of_first, asked, ranks),
        lambda ranks: zero_shot.evaluate_tasks(llama, of_second, replace(asked, **other), ranks),
    )
    assert said.startswith(f"Not all processes of this run have the same {what}.")


@needs_bwrap
def test_of_three_one_is_killed_and_others_go_on(llama, caches, tmp_path):
    case = CODE | {"model": str(llama), "output": str(tmp_path / "found.json")}
    # As it gives its answers to the others: by then its own are kept.
    done = divided.in_processes(3, tmp_path, [case | {"killed": [1, 5]}])
    assert done.returncode != 0
    assert done.stderr.count("owl: ") <= 1  # torchrun may end the others before they say it
    assert not (tmp_path / "found.json").exists()
    (file,) = caches.glob("*-1.jsonl")
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps([key, "    return 1"]) + "\n" for key, _ in kept))

    done = divided.in_processes(2, tmp_path, [case])
    assert done.returncode == 0, done.stderr
    answers = json.loads((tmp_path / "found.json").read_text())["tasks"]["humaneval"]["answers"]
    assert [one["problem"] for one in answers] == [f"HumanEval/{n}" for n in range(0, 100, 20)]
    assert [one["answer"] == "    return 1" for one in answers] == [n % 3 == 1 for n in range(5)]
    assert not list(caches.iterdir())


def test_a_deployment_is_refused_in_one_sentence(llama, tmp_path):
    (tmp_path / "model.onnx").touch()
    for by in (("--tasks", "humaneval"), ("--perplexity", "text")):
        done = fresh.group(2, fresh.owl, "eval", llama, tmp_path, *by)
        assert done.returncode != 0
        assert done.stdout == ""
        assert done.stderr.count("owl: ") == 1
        assert "is a deployment, which one process evaluates in its engine" in done.stderr
