from pathlib import Path

import pytest

pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from ray.exceptions import RayTaskError, TaskCancelledError, WorkerCrashedError

from owl_deploy.distributed.cluster import run
from owl_deploy.distributed.cluster.job import Job
from owl_deploy.distributed.cluster.needs import Need, Node
from owl_deploy.distributed.cluster.run import execute, log_of, sources
from owl_deploy.distributed.pipeline import Evaluate, do
from owl_deploy.distributed.sweep import SweepPlan, tasks
from owl_deploy.utils.record import Record, keep, kept
from tests.unit.distributed.test_pipeline import Join


@pytest.fixture
def swept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model/config.json", "c.txt", "p.txt"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    return tasks(Path("model"), Path("out"), SweepPlan(sparsities=(0.5,)), "c.txt", "p.txt")


def test_what_every_node_has_to_see_is_what_the_plan_does_not_make(swept):
    assert sources(swept) == [Path("model"), Path("c.txt"), Path("p.txt")]
    quality = [task for task in swept if isinstance(task, Evaluate)]
    named = [task.model_copy(update={"text": "wikitext"}) for task in quality]
    assert sources(named) == []  # a name of something elsewhere; deployments that are not there


def test_each_task_has_a_log_of_its_own(swept):
    logs = [log_of(task, Path("out")) for task in swept]
    assert len(set(logs)) == len(logs)
    assert {log.parent for log in logs} == {Path("out/logs").absolute()}
    names = [log.name for log in logs]
    assert names[0] == "checkpoints-wanda-fisher-50"
    assert "deployments-wanda-fisher-50-onnxruntime-fp32-measured-perplexity" in names


def test_a_name_with_dots_has_a_record_of_its_own(swept):
    folder = swept[0].output.parent
    outputs = [folder / name for name in ("wanda-62.5", "wanda-62.25", "wanda.llama.cpp")]
    tasks = [swept[0].model_copy(update={"output": output}) for output in outputs]
    (Path("out") / "logs").mkdir(parents=True)
    for task in tasks:
        keep(log_of(task, Path("out")), Record(state="done", title=task.output.name))
    found = [kept(log_of(task, Path("out"))) for task in tasks]
    assert [one and one.title for one in found] == [output.name for output in outputs]


def test_a_plan_that_is_done_needs_no_cluster(tmp_path, monkeypatch):
    (tmp_path / "word").write_text("owl")
    plan = [Join(title="j", output=tmp_path / "made" / "j", parts=(tmp_path / "word",))]
    do(plan[0])
    monkeypatch.setattr(run.nodes, "joined", None)
    execute(plan, tmp_path, "127.0.0.1:1", {}, 0)
    with pytest.raises(TypeError):
        execute([plan[0].model_copy(update={"upper": True})], tmp_path, "127.0.0.1:1", {}, 0)


def test_why_ray_gave_a_task_up():
    def reason(error):
        return run._reason(error, Need(2))

    assert reason(TaskCancelledError()) == "no node that is left has 2 cpu"
    assert reason(RayTaskError("f", "", OSError("full"))) == "OSError: full"
    assert reason(WorkerCrashedError()).startswith("its worker died, and did so again 3 times")


def test_a_task_whose_node_is_lost_runs_no_more(tmp_path, monkeypatch):
    plan = [Join(title="Joining", output=tmp_path / "j", parts=())]
    asked = Job(tmp_path, tmp_path / "log", cores=2, alone=False, versions={}, command=[])
    mine = run._Run(plan, {0: asked}, {"join": Need(2)}, pending={"reference": 0})
    keep(asked.log, Record(state="running", title="Joining", node="n1"))
    there = [Node("n1", "one", Need(2))]
    monkeypatch.setattr(run.nodes, "alive", lambda: there)
    cancelled = []
    monkeypatch.setattr(run.ray, "cancel", cancelled.append)
    monkeypatch.setattr(run, "PATIENCE_S", -1.0)
    mine._give_up_stuck(mine._running())
    assert cancelled == []
    there[:] = [Node("n2", "two", Need(1))]
    mine._give_up_stuck(mine._running())
    assert cancelled == ["reference"]


def test_a_task_whose_worker_died_is_not_said_to_run(tmp_path, monkeypatch):
    plan = [Join(title="Joining", output=tmp_path / "j", parts=())]
    asked = Job(tmp_path, tmp_path / "log", cores=2, alone=False, versions={}, command=[])
    mine = run._Run(plan, {0: asked}, {"join": Need(2)}, pending={"reference": 0})
    keep(asked.log, Record(state="running", title="Joining", node="n1", started=5.0))

    def lost(reference):
        raise WorkerCrashedError

    monkeypatch.setattr(run.ray, "get", lost)
    record = mine._end(0, "reference")
    assert kept(asked.log) == record
    assert (record.state, record.code, record.node, record.started) == ("failed", 4, "n1", 5.0)
    assert record.ended > 5
