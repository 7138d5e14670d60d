import subprocess
import sys

import pytest

pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from owl_deploy.distributed.cluster import job
from owl_deploy.distributed.cluster.job import Job, logged, perform
from owl_deploy.distributed.cluster.needs import Need, Node
from owl_deploy.distributed.pipeline import Evaluate, Task, state
from owl_deploy.errors import BadInput
from owl_deploy.utils.record import Record, keep, kept
from tests.unit.distributed.test_pipeline import Join

NODE = Node("n1", "one", Need(2))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A job on a node that is this process."""

    class Context:
        def get_node_id(self):
            return NODE.id

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job.ray, "get_runtime_context", Context)
    monkeypatch.setattr(job, "alive", lambda: [NODE])
    monkeypatch.setattr(sys, "argv", sys.argv)
    told = {"versions": job.versions(), "command": ["owl", "sweep"]}
    marker = tmp_path / ".owl-shared-token"
    marker.touch()
    return Job(tmp_path, tmp_path / "log", cores=2, alone=False, marker=marker, **told)


def joining(tmp_path, *parts):
    return Join(title="Joining", output=tmp_path / "made" / "out", parts=parts)


def test_a_task_is_done_once_and_leaves_a_record(here, tmp_path):
    (tmp_path / "word").write_text("owl")
    task = joining(tmp_path, tmp_path / "word")
    record = perform(task, here)
    assert (record.state, record.node, record.title) == ("done", "n1", "Joining")
    assert record.ended >= record.started > 0
    assert kept(here.log) == record
    assert sys.argv == ["owl", "sweep"]
    assert state(task) == "done"
    made = task.proof.stat().st_mtime_ns
    assert perform(task, here, record).state == "done"  # as after a worker's end
    assert task.proof.stat().st_mtime_ns == made


def test_what_fails_is_told_and_what_needs_it_is_skipped(here, tmp_path):
    failed = perform(joining(tmp_path, tmp_path / "none"), here)
    assert (failed.state, failed.code) == ("failed", 70)
    assert failed.said.startswith("FileNotFoundError: ")
    assert "Traceback" in here.log.with_suffix(".log").read_text()
    second = perform(joining(tmp_path), here, Record(state="done", title="other"), failed)
    assert (second.state, second.said) == ("skipped", "it needs what failed: Joining")
    third = perform(joining(tmp_path), here, second)
    assert third.said == second.said  # the one that failed is told
    assert not (tmp_path / "made").exists() or not list((tmp_path / "made").iterdir())


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [(BadInput("No.", "Do."), 2, "No. Do."), (MemoryError(), 4, "not enough memory")],
)
def test_an_error_keeps_its_sentence_and_exit_code(here, tmp_path, monkeypatch, error, code, words):
    def run(self):
        raise error

    monkeypatch.setattr(Join, "run", run)
    record = perform(joining(tmp_path), here)
    assert record.code == code
    assert words in record.said


def test_a_node_that_joined_later_is_looked_at(here, tmp_path, monkeypatch):
    task = joining(tmp_path)
    other = Job(**vars(here) | {"versions": here.versions | {"torch": "9.9"}})
    assert "A node joined that has torch" in perform(task, other).said
    larger = Node("n1", "one", Need(4))
    monkeypatch.setattr(job, "alive", lambda: [larger])
    assert "would not be alone" in perform(task, Job(**vars(here) | {"alone": True})).said
    assert perform(task, here).state == "done"


@pytest.mark.parametrize("there", [None, ".owl-shared-by-another-run"])
def test_a_node_that_sees_another_folder_leaves_nothing_there(here, tmp_path, there):
    here.marker.unlink()
    if there:
        here.marker.with_name(there).touch()
    before = sorted(tmp_path.iterdir())
    record = perform(joining(tmp_path), here)
    assert (record.state, record.code) == ("failed", 4)
    assert record.said == "A node joined that does not share the output folder with this machine."
    assert sorted(tmp_path.iterdir()) == before


def test_a_log_takes_what_a_child_prints(tmp_path, capfd):
    file = tmp_path / "log"
    for word in ("one", "two"):
        with logged(file):
            print(word)
            subprocess.run([sys.executable, "-c", "print('child')"], check=True)
    print("after")
    assert sorted(file.read_text().split()) == ["child", "child", "one", "two"]
    assert capfd.readouterr().out == "after\n"


def test_a_record_that_is_none_is_no_record(tmp_path):
    assert kept(tmp_path / "log") is None
    (tmp_path / "log.json").write_text("{")
    assert kept(tmp_path / "log") is None
    keep(tmp_path / "log", Record(state="running", title="t"))
    assert kept(tmp_path / "log") == Record(state="running", title="t")


def test_an_evaluation_has_as_many_threads_as_cores(tmp_path):
    task = Evaluate(title="v", output=tmp_path, model=tmp_path, text="t")
    assert job._with_threads(task, 3).threads == 3
    asked: Task = task.model_copy(update={"threads": 1})
    assert job._with_threads(asked, 3) is asked
    other = joining(tmp_path)
    assert job._with_threads(other, 3) is other
