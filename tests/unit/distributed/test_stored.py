import json
import os
from pathlib import Path

import pytest

pytest.importorskip("fsspec", reason="pip install 'owl-deploy[ray]'")

from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import read_result, write_result
from owl_deploy.distributed.cluster.mirror import perform
from owl_deploy.distributed.cluster.store import Store, contents_of
from owl_deploy.distributed.cluster.stored import ADDRESSES, StoredPlan
from owl_deploy.distributed.pipeline import Bench, digest
from owl_deploy.utils.record import Record
from tests.unit.bench import made
from tests.unit.distributed.test_pipeline import Join, chain


@pytest.fixture
def plan(tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("word").write_text("owl")
    return chain(Path("word"), Path("out"))


def do(store, plan, numbers):
    here = Path.cwd()
    told = StoredPlan(store, plan, Path("out")).shares(numbers, [str(n) for n in numbers])
    for number in numbers:
        perform(plan[number], told[number], here)
    os.chdir(here)


def survey(store, plan):
    return StoredPlan(store, plan, Path("out")).survey()


def test_markers_say_what_is_done(store, plan, tmp_path):
    assert survey(store, plan) == ["to do", "to do"]
    do(store, plan, [0])
    assert survey(store, plan) == ["done", "to do"]
    do(store, plan, [1])
    assert survey(store, plan) == ["done", "done"]
    assert not Path("out").exists()
    Path("word").write_text("OWL")
    assert survey(store, plan) == ["outdated", "outdated"]
    do(store, plan, [0])
    assert survey(store, plan) == ["done", "outdated"]
    other = chain(Path("word"), Path("out"), upper=True)
    assert survey(store, other) == ["outdated", "outdated"]  # what another plan has left
    store.remove("made/first/stored.json")
    assert survey(store, plan) == ["to do", "outdated"]


def test_inputs_are_stored_once(store, plan, capsys):
    model = Path("model")
    (model / "within").mkdir(parents=True)
    for name in ("weights", "config.json", "within/other"):
        (model / name).write_text(name)
    tasks = [
        Join(title="j", output=Path("out/j"), parts=(model, Path("word"))),
        Join(title="k", output=Path("out/k"), parts=(model, Path("nowhere"), Path("out/j"))),
    ]
    told = StoredPlan(store, tasks, Path("out")).shares([0, 1], ["j", "k"])
    assert "3 of 3 input files are stored now, 0.0 MB" in capsys.readouterr().err
    of_model, of_word = (known for _, known in told[0].reads)
    assert sorted(of_model.files) == ["config.json", "weights"]  # what a model's digest is of
    assert of_model.digest == digest(model)
    assert store.read(of_word.files["word"].key) == "owl"
    assert [known for _, known in told[1].reads] == [of_model, None, "j"]
    assert [name for name, _ in told[1].reads] == ["model", "nowhere", "out/j"]
    first = store.sizes("inputs")
    store.write(next(iter(first)), "cut off")  # as a copy to a folder may be
    StoredPlan(store, tasks, Path("out")).shares([0], ["j"])
    assert "1 of 3 input files are stored now" in capsys.readouterr().err
    assert store.sizes("inputs") == first


def test_results_are_copied_and_addresses_left(store, plan, tmp_path, capsys):
    do(store, plan, [0])
    bench = Bench(title="b", output=Path("out/bench"), plan=BenchPlan(candidates=(Path("x"),)))
    result = made.result()
    write_result(result, tmp_path / "made")
    contents = contents_of(tmp_path / "made", (tmp_path / "made").iterdir())
    store.publish(
        "bench", tmp_path / "made", contents, is_folder=True, digest="d", asked={"a": "b"}
    )
    for _ in range(2):
        StoredPlan(store, (*plan, bench), Path("out")).take_results()
        assert sorted(path.name for path in Path("out").iterdir()) == ["bench", ADDRESSES]
        assert read_result(Path("out/bench")) == result
        places = json.loads(Path("out", ADDRESSES).read_text())
        assert list(places) == ["made/first"]
        first = store.stored("made/first")
        assert places["made/first"] == f"{store.address}/made/first/{first.version}"
        assert f"lie in {store.address}" in " ".join(capsys.readouterr().err.split())


def test_what_runs_is_read_from_the_records(store, plan, monkeypatch):
    mine = StoredPlan(store, plan, Path("out"))
    running = Record(state="running", title="first")
    store.write("logs/old.json", running.model_dump_json())
    mine.forget(["old", "none"])
    assert store.sizes("logs") == {}
    store.write("logs/a.json", running.model_dump_json())
    store.write("logs/b.json", Record(state="done", title="second").model_dump_json())
    store.write("logs/c.json", "{")
    logs = {0: "a", 1: "b", 2: "c", 3: "d"}
    assert mine.running(logs) == {0: running}
    assert mine.running({1: "b"}) == {}
    monkeypatch.setattr(Store, "sizes", None)  # nobody looks again so soon
    assert mine.running(logs) == {0: running}


def test_a_log_is_kept_beside_its_record(store, plan):
    mine = StoredPlan(store, plan, Path("out"))
    Path("logs").mkdir()
    record = Record(state="done", title="first")
    mine.take_log(Path("logs/a"), record)
    assert not Path("logs/a.log").exists()
    store.write("logs/a.log", "said")
    mine.take_log(Path("logs/a"), record)
    assert Path("logs/a.log").read_text() == "said"
    assert Record.model_validate_json(Path("logs/a.json").read_text()) == record
