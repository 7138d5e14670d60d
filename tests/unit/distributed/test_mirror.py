import json
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="pip install 'owl-deploy[ray]'")

from owl_deploy.bench.plan import BenchPlan
from owl_deploy.distributed.cluster import mirror
from owl_deploy.distributed.cluster.mirror import Mirror, Share, perform
from owl_deploy.distributed.cluster.store import Store
from owl_deploy.distributed.cluster.stored import StoredPlan
from owl_deploy.distributed.pipeline import Bench, Evaluate, do
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.utils.artefact import sha256
from owl_deploy.utils.record import Record
from tests.unit.distributed.test_pipeline import Join, chain


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """The driver's working folder, in which we are; the cache is a node's."""
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "word").write_text("owl")
    monkeypatch.chdir(folder)
    node(tmp_path, monkeypatch, "node")
    return folder


def node(tmp_path, monkeypatch, name):
    """From now on this process is the node `name`."""
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / name))
    return tmp_path / name / "store"


def shares(store, plan, driver):
    os.chdir(driver)  # a task leaves its node's process elsewhere
    numbers = range(len(plan))
    return StoredPlan(store, plan, Path("out")).shares(numbers, [f"log{n}" for n in numbers])


def plan_in(driver):
    return chain(Path("word"), Path("out"))


def test_two_nodes_share_nothing_but_the_store(store, driver, tmp_path, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    first = node(tmp_path, monkeypatch, "one")
    perform(plan[0], told[0], driver)
    (driver / "word").unlink()
    shutil.rmtree(first)
    node(tmp_path, monkeypatch, "two")
    perform(plan[1], told[1], driver)
    stored = store.stored("made/second")
    assert store.read(stored.files["text"].key) == "owlowl"
    assert sorted(stored.files) == ["measured/task.json", "owl.json", "text"]
    assert list(driver.iterdir()) == []


def test_the_same_as_without_a_store(store, driver, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    for number, task in enumerate(plan):
        perform(task, told[number], driver)
    os.chdir(driver)
    for number, task in enumerate(plan):
        do(task)
        stored = store.stored(told[number].name)
        assert stored.digest == mirror.digest(task.output)
        assert stored.asked == task.asked()
        for name, file in stored.files.items():
            if "task.json" not in name:  # which has seconds
                assert file.sha256 == sha256(task.output / name)
    assert StoredPlan(store, plan, Path("out")).survey() == ["done", "done"]


def test_what_is_there_is_not_done_again(store, driver, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    perform(plan[0], told[0], driver)
    marker = store.stored("made/first")
    monkeypatch.setattr(mirror, "do", None)
    perform(plan[0], told[0], driver)
    assert store.stored("made/first") == marker


def test_what_is_not_whole_is_published_and_done_again(store, driver, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    with monkeypatch.context() as patch:  # as a benchmark in which an engine failed
        patch.setattr(Join, "is_whole", lambda self: False)
        perform(plan[0], told[0], driver)
    os.chdir(driver)
    stored = StoredPlan(store, plan, Path("out"))
    assert (store.stored("made/first").is_whole, stored.survey()[0]) == (False, "to do")
    perform(plan[0], told[0], driver)
    os.chdir(driver)
    assert (store.stored("made/first").is_whole, stored.survey()[0]) == (True, "done")


def test_what_was_fetched_is_not_fetched_again(store, driver, tmp_path, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    fetched = []
    fetch = Store.fetch

    def noting(self, file, path, way_out):
        fetched.append(file.key)
        fetch(self, file, path, way_out)

    monkeypatch.setattr(Store, "fetch", noting)
    for number, task in enumerate(plan):
        perform(task, told[number], driver)
    assert fetched == [f"inputs/{sha256(driver / 'word')}"]  # its own output, it has
    assert list((tmp_path / "node" / "store" / "work").iterdir()) == []
    node(tmp_path, monkeypatch, "other")
    store.remove("made/second/stored.json")
    perform(plan[1], told[1], driver)
    assert len(fetched) == 1 + 3  # the first's text is the word


def test_what_was_left_before_it_was_published_is_only_published(store, driver, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)

    def gone(*_):
        raise EnvironmentFailed("gone")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "put", gone)
        with pytest.raises(EnvironmentFailed):
            perform(plan[0], told[0], driver)
    assert store.stored("made/first") is None
    with monkeypatch.context() as patch:
        patch.setattr(mirror, "do", None)
        perform(plan[0], told[0], driver)
    assert store.stored("made/first") is not None


def test_a_damaged_input_is_said_with_a_way_out(store, driver):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    key = f"inputs/{sha256(driver / 'word')}"
    store.write(key, "OWL")
    with pytest.raises(BadInput, match=r"is damaged.* Delete it: .* stores it again"):
        perform(plan[0], told[0], driver)
    store.remove(key)
    shares(store, plan, driver)
    perform(plan[0], told[0], driver)
    stored = store.stored("made/first")
    store.write(stored.files["text"].key, "OWL")
    shutil.rmtree(os.environ["OWL_CACHE"])
    with pytest.raises(BadInput, match=r"is damaged.* Delete .*/first/stored.json: .*makes it aga"):
        perform(plan[1], told[1], driver)


def test_what_is_not_there_any_more_or_has_no_room(store, driver, monkeypatch):
    plan = plan_in(driver)
    told = shares(store, plan, driver)
    with pytest.raises(EnvironmentFailed, match="made/first is not there any more"):
        perform(plan[1], told[1], driver)

    class Disk:
        free = 2

    monkeypatch.setattr("owl_deploy.utils.artefact.shutil.disk_usage", lambda _: Disk)
    with pytest.raises(BadInput, match=r"What made/first reads needs .* set OWL_CACHE"):
        perform(plan[0], told[0], driver)


def test_paths_are_the_drivers_in_what_is_published(tmp_path):
    at = Mirror(tmp_path / "root", Path("/home/me"))
    assert at.local("sweep") == tmp_path / "root" / "home" / "me" / "sweep"
    assert at.local("../out") == tmp_path / "root" / "home" / "out"
    assert at.local("/models/a") == tmp_path / "root" / "models" / "a"
    plan = BenchPlan(candidates=(Path("/d/a"), Path("b")), pairs=3)
    moved = at.moved(Bench(title="b", output=Path("/d/out"), plan=plan))
    assert moved.output == tmp_path / "root" / "d" / "out"
    assert moved.plan.candidates == (tmp_path / "root" / "d" / "a", Path("b"))
    assert moved.plan.model_fields_set == {"candidates", "pairs"}  # which say what was asked
    quality = Evaluate(title="e", output=tmp_path / "p.json", model=Path("m"), text="wikitext")
    assert at.moved(quality).text == "wikitext"
    folder = tmp_path / "root" / "d" / "out"
    folder.mkdir(parents=True)
    for name in ("owl.json", "other.json"):
        (folder / name).write_text(json.dumps({"path": str(folder / "x"), "rel": "d/a"}))
    at.told(Join(title="j", output=folder, parts=()))
    assert json.loads((folder / "owl.json").read_text()) == {"path": "/d/out/x", "rel": "d/a"}
    assert str(tmp_path) in (folder / "other.json").read_text()  # is none of owl's


def test_a_record_and_its_log_go_to_the_store(store, driver):
    share = Share(store.address, "made/first", "made-first", ())
    log = share.own("logs").with_suffix(".log")
    log.write_text("said")
    share.tell(Record(state="running", title="t"))
    assert Record.model_validate_json(store.read("logs/made-first.json")).state == "running"
    assert store.read("logs/made-first.log") is None
    share.tell(Record(state="done", title="t"))
    assert store.read("logs/made-first.log") == "said"
    assert not log.exists()
    Share("nowhere", "a", "a", ()).tell(Record(state="done", title="t"))  # says nothing


def test_a_path_by_way_of_a_folder_that_is_not_here(tmp_path):
    mirrored = Mirror(tmp_path / "root", tmp_path / "driver")
    plan = BenchPlan(candidates=(Path("scripts/../a"), Path("../b"), Path("/c/d/../e")))
    moved = mirrored.moved(Bench(title="b", output=Path("out"), plan=plan))
    assert moved.plan.candidates == (Path("a"), Path("../b"), Path(f"{tmp_path}/root/c/e"))


def test_a_cache_behind_a_link_is_not_told(store, driver, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    node(tmp_path, monkeypatch, "linked")
    seen = []
    monkeypatch.setattr(mirror, "do", lambda task, tell: seen.append(mirror.Path.cwd()))
    monkeypatch.setattr(mirror, "_publish", lambda *_: None)
    monkeypatch.setattr(mirror.Mirror, "moved", lambda self, task: seen.append(self.root) or task)
    perform(plan_in(driver)[0], shares(store, plan_in(driver), driver)[0], driver)
    root, folder = seen
    assert folder.is_relative_to(root)


def test_a_relative_cache_is_one_wherever_a_task_works(store, driver, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", f"cache-of-{tmp_path.name}")
    plan = plan_in(driver)
    for task, share in zip(plan, shares(store, plan, driver).values(), strict=True):
        perform(task, share, driver)  # which ends in another folder than it began
    found = [path.relative_to(driver) for path in driver.rglob("store")]
    assert found == [Path(f"cache-of-{tmp_path.name}", "store")]
    kept = {path.name for path in (driver / found[0] / "files").iterdir()}
    assert sha256(driver / "word") in kept
