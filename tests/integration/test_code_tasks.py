"""`owl eval --tasks humaneval`, whole: what a deployment answers is what PyTorch answers."""

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from owl_deploy.cli import app
from owl_deploy.distributed.pipeline import RunTasks, do, state
from owl_deploy.errors import EnvironmentFailed
from owl_deploy.evaluate import humaneval, kept, zero_shot
from owl_deploy.export.targets import export
from owl_deploy.models.measurements import measurement, measurement_file
from owl_deploy.runtime import library_path
from tests import tiny

pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        for module in (zero_shot, kept):
            patch.setattr(module, "cache_dir", lambda *_: folder)
        yield folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint and a deployment of it, with a chat template."""
    folder = tmp_path_factory.mktemp("humaneval")
    checkpoint = tiny.write_llama(folder / "model", hidden_size=128, intermediate_size=336)
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE)
    export(checkpoint, folder / "deployment", target="onnxruntime", precision="fp32")
    return checkpoint, folder / "deployment"


def run(*arguments: object):
    line = ["eval", *map(str, arguments), "--tasks", "humaneval", "--json"]
    return CliRunner().invoke(app, line)


@needs_bwrap
def test_a_deployment_answers_as_pytorch_does(folders) -> None:
    line = (*folders, "--allow-code", "--limit", 3, "--window", 512, "--dtype", "float32")
    answer = run(*line)
    assert answer.exit_code == 0, answer.output
    of_checkpoint, of_deployment = (
        one["tasks"]["humaneval"] for one in json.loads(answer.stdout)["models"]
    )
    assert of_checkpoint["documents"] == of_deployment["documents"] == 3
    assert of_checkpoint["answers"] == of_deployment["answers"]
    assert [one["problem"] for one in of_checkpoint["answers"]] == [
        f"HumanEval/{number}" for number in range(3)
    ]
    assert all(one["answer"] and one["why"] for one in of_checkpoint["answers"])
    assert of_deployment["metrics"]["pass@1"]["value"] == 0  # random weights write no programs
    assert measurement(folders[1], "tasks")["humaneval"] == of_deployment
    assert of_deployment["by"] == "onnxruntime"


@needs_bwrap
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_texts_written_together_are_those_written_alone(
    folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """Six problems, in four places."""
    try:
        library_path()
    except EnvironmentFailed as error:
        pytest.skip(str(error))
    checkpoint, _ = folders
    deployment = tmp_path / "deployment"
    export(checkpoint, deployment, target="owl", precision=precision)
    line = ("--allow-code", "--every", 25, "--limit", 6, "--window", 512)
    monkeypatch.setattr(zero_shot, "_PLACES", 4)
    together = json.loads(run(deployment, *line).stdout)["tasks"]["humaneval"]
    monkeypatch.setattr(zero_shot, "_PLACES", 0)
    alone = json.loads(run(deployment, *line).stdout)["tasks"]["humaneval"]
    assert together["answers"] == alone["answers"]
    assert len({one["answer"] for one in together["answers"]}) > 1
    if precision == "fp32":
        whole = json.loads(run(checkpoint, *line, "--dtype", "float32").stdout)
        assert together["answers"] == whole["tasks"]["humaneval"]["answers"]


@needs_bwrap
def test_a_model_without_a_template_goes_on_from_the_prompt(folders, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(folders[0], tmp_path / "model"))
    (checkpoint / "chat_template.jinja").unlink()
    found = json.loads(run(checkpoint, "--allow-code", "--limit", 1, "--window", 512).stdout)
    (answer,) = found["tasks"]["humaneval"]["answers"]
    in_chat = json.loads(run(folders[0], "--allow-code", "--limit", 1, "--window", 512).stdout)
    assert answer != in_chat["tasks"]["humaneval"]["answers"][0]


@needs_bwrap
def test_a_run_that_was_killed_goes_on(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    _, deployment = folders
    line = (deployment, "--allow-code", "--limit", 3, "--window", 512)
    whole = json.loads(run(*line).stdout)["tasks"]["humaneval"]
    harness = __import__("owl_deploy.evaluate.harness", fromlist=["DeploymentLM"])
    asked = []
    write = harness.DeploymentLM._write

    def two_at_most(self, text):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(text)
        write(self, text)

    with monkeypatch.context() as patch:
        patch.setattr(harness.DeploymentLM, "_write", two_at_most)
        assert run(*line).exit_code != 0
        asked.pop()  # so that one more is let through
        again = run(*line)
    assert json.loads(again.stdout)["tasks"]["humaneval"] == whole
    assert len(asked) == 2


@needs_bwrap
def test_a_right_answer_passes(folders, monkeypatch: pytest.MonkeyPatch) -> None:
    _, deployment = folders
    harness = __import__("owl_deploy.evaluate.harness", fromlist=["DeploymentLM"])
    solutions = {one["prompt"]: one for one in humaneval.problems()}

    def solve(self, requests):
        for number, request in enumerate(requests):
            (one,) = (one for prompt, one in solutions.items() if prompt in request.args[0])
            right = one["canonical_solution"] if one["task_id"] != "HumanEval/1" else "    pass"
            yield number, f"Here it is:\n```python\n{one['prompt']}{right}\n"

    monkeypatch.setattr(harness.DeploymentLM, "answers", solve)
    found = json.loads(run(deployment, "--allow-code", "--limit", 4, "--window", 512).stdout)
    metric = found["tasks"]["humaneval"]["metrics"]["pass@1"]
    assert metric["value"] == 0.75
    assert metric["stderr"] == pytest.approx(0.25)
    quick = run(deployment, "--allow-code", "--limit", 2, "--window", 512)
    told = " ".join(quick.stderr.split())
    assert "humaneval on 2 documents replaces what was kept, on 4 documents." in told


def test_nothing_runs_unasked(folders) -> None:
    answer = run(folders[1])
    assert answer.exception.exit_code == 2
    assert "--allow-code" in str(answer.exception)


@needs_bwrap
def test_a_plan_s_task_leaves_them_beside_the_deployment(folders, tmp_path: Path) -> None:
    deployment = Path(shutil.copytree(folders[1], tmp_path / "deployment"))
    task = RunTasks(
        title="HumanEval",
        output=measurement_file(deployment, "tasks"),
        model=deployment,
        names=("humaneval",),
        limit=1,
        window=512,
        allow_code=True,
    )
    (task.output).unlink(missing_ok=True)
    assert state(task) == "to do"
    do(task)
    assert state(task) == "done"
    assert state(task.model_copy(update={"limit": 2})) == "outdated"
    assert measurement(deployment, "tasks")["humaneval"]["documents"] == 1
    spread = task.model_copy(update={"limit": 2, "every": 50})
    assert state(spread) == "outdated"
    do(spread)
    assert (state(spread), state(task)) == ("done", "outdated")
    kept = measurement(deployment, "tasks")["humaneval"]
    assert [one["problem"] for one in kept["answers"]] == ["HumanEval/0", "HumanEval/50"]
    spread.receipt.unlink()
    assert (state(spread), state(task)) == ("done", "outdated")  # as the measurement says itself
