"""A plan on a real Ray cluster of two nodes, each with a raylet of its own on this machine."""

import functools
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import ClassVar, Literal

import psutil
import pytest

from owl_deploy.compression.settings import PruneSettings
from owl_deploy.distributed.pipeline import Prune, Task, do, survey
from owl_deploy.errors import BadInput
from owl_deploy.models.manifest import CheckpointManifest
from owl_deploy.utils.artefact import sha256, staged_folder
from owl_deploy.utils.ending import exit_code
from owl_deploy.utils.ranks import leave
from tests import fresh

ray = pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from ray.cluster_utils import Cluster  # noqa: E402

from owl_deploy.distributed.cluster import run  # noqa: E402
from owl_deploy.distributed.cluster.needs import ROWS, Row  # noqa: E402
from owl_deploy.distributed.cluster.nodes import joined  # noqa: E402
from owl_deploy.utils.record import Record, kept  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


class Copy(Task):
    """A task that takes no time: the text of a file, in an artefact."""

    APART: ClassVar = dict.fromkeys(("part", "dies", "alone", "apart", "waits"), True)

    task: Literal["copy", "alone"] = "copy"
    part: Path
    dies: Path | None = None  # kills its worker, unless this file is there
    apart: bool = False  # it sees no folder but those of its node's cache
    waits: bool = False  # for ever, once it has said so

    def reads(self):
        return (self.part,)

    def run(self):
        if self.dies is not None and not self.dies.exists():
            self.dies.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        print("copying", self.part.name)
        if self.apart:
            own = Path(os.environ["OWL_CACHE"], "store", "work")
            for path in (Path.cwd(), self.part.absolute(), self.output.absolute()):
                assert path.is_relative_to(own), path
        text = (self.part if self.part.is_file() else self.part / "text").read_text()
        with staged_folder(self.output, force=True) as folder:
            if self.waits:
                self.output.with_name("waiting").write_text(str(os.getpid()))
                for _ in range(36_000):  # Ray interrupts Python, and no call of the system
                    time.sleep(0.1)
            (folder / "text").write_text(text)
            CheckpointManifest(source=text).write(folder)

    def agrees(self):
        return False


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # else a busy machine leaves workers no time
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # `Copy`, in the workers
        patch.setitem(ROWS, "copy", Row(cores=1))
        patch.setitem(ROWS, "alone", Row(cores=1, alone=True))
        made = started(tmp_path_factory.mktemp("caches"))
        try:
            yield made
        finally:
            made.shutdown()


SMALL = {"num_cpus": 2, "object_store_memory": 100 * 2**20, "memory": 2**31}


def started(caches, attempts=3):
    """Two nodes, each with a cache of its own, in `caches`.

    Ray gives each half a minute to start, which a busy machine may not have.
    """
    first, second = ({"OWL_CACHE": str(caches / name)} for name in ("one", "two"))
    head = {**SMALL, "include_dashboard": False, "env_vars": first}
    try:
        made = Cluster(initialize_head=True, head_node_args=head)
        made.add_node(**SMALL, env_vars=second)
    except Exception:
        if attempts == 1:
            raise
        return started(caches, attempts - 1)
    return made


def plan_in(folder: Path, word: Path, model: Path, **every: object) -> tuple[Task, ...]:
    def copy(name: str, part: Path, **more: object) -> Copy:
        output = folder / "made" / name
        return Copy(title=f"Copying {name}", output=output, part=part, **every, **more)

    first = copy("first", word)
    killed = copy("killed", word, dies=folder / "killed-once")
    absent = copy("absent", folder / "absent")
    after = copy("after", absent.output)
    alone = copy("alone", first.output, task="alone")
    prune = Prune(
        title="Pruning magnitude-50",
        output=folder / "made" / "pruned",
        model=model,
        settings=PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.5),
    )
    return (prune, first, killed, absent, after, alone)


def beside(one: Record, other: Record) -> bool:
    """Whether two tasks were on one node at one time."""
    assert one.ended
    assert other.ended
    return one.node == other.node and one.started < other.ended and other.started < one.ended


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "cannot join a Ray cluster at 127.0.0.1:1: .*refused"),
        ("somewhere", "is no address"),
        ("auto", "Could not find any running Ray instance"),
    ],
)
def test_an_address_where_no_cluster_is(address, words, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    # Another's cluster on this machine, which is found by its processes.
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", functools.cache(set))
    with pytest.raises(BadInput, match=words), joined(address):
        pass


def test_the_command_line_says_it_in_one_sentence(owl, llama, text_file, tmp_path):
    sweep = ("sweep", llama, "-o", tmp_path / "out", "-c", text_file, "-p", text_file)
    sweep += ("--sequence-length", 64, "--window", 64)
    for more, words in (
        (("--ray", "127.0.0.1:1"), "cannot join a Ray cluster at 127.0.0.1:1"),
        (("--ray", "auto", "--needs", "prune=many"), "'many' is not an amount"),
        (("--needs", "prune=1cpu"), "--needs is of the tasks on a cluster"),
        (("--store", "s3://bucket"), "--store is for the nodes of a cluster"),
        (("--ray", "auto", "--store", "bucket"), "--store bucket is no address"),
        (("--ray", "auto", "--store", "s33://b"), "Did you mean 's3'"),
    ):
        code, out, err = owl(*sweep, *more)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert words in err


# Those with a cluster come last: while it runs, `auto` is that one.


def test_nodes_that_share_a_store_alone(cluster, llama, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    word, store = Path("word"), f"file://{tmp_path}/store"
    word.write_text("owl")
    prune, first, killed, _, _, alone = plan_in(Path("out"), word, llama, apart=True)
    plan = (prune, first, killed, alone)
    with pytest.raises(BadInput, match=r"does not share memory://nowhere with this machine"):
        run.execute(plan, Path("out"), cluster.address, {}, 0, "memory://nowhere")

    def execute():
        return run.execute(plan, Path("out"), cluster.address, {}, 0, store)

    assert execute() == {}
    assert sorted(path.name for path in Path("out").iterdir()) == ["logs", "store.json"]
    places = {name: Path(one[7:]) for name, one in json.loads(read("out/store.json")).items()}
    assert (places["made/alone"] / "text").read_text() == "owl"
    assert json.loads(read(places["made/pruned"] / "owl.json"))["command"] == sys.argv
    assert "copying word" in read("out/logs/made-first.log")
    assert {kept(run.log_of(task, Path("out"))).state for task in plan} == {"done"}
    here = prune.model_copy(update={"output": tmp_path / "here"})
    do(here)
    for name in ("model.safetensors", "config.json", "recipe.yaml"):
        assert sha256(places["made/pruned"] / name) == sha256(here.output / name)

    markers = {path: path.stat().st_mtime_ns for path in Path("store").rglob("stored.json")}
    assert len(markers) == 4
    Path("store", "made", "alone", "stored.json").unlink()
    capfd.readouterr()
    assert execute() == {}
    assert "Copying first" not in (told := capfd.readouterr().err)
    assert "done     Copying alone" in told
    changed = {path for path, time in markers.items() if path.stat().st_mtime_ns != time}
    assert [path.parent.name for path in changed] == ["alone"]
    assert not [path for path in Path("store").rglob("*") if "owl-" in path.name]


def read(path):
    return Path(path).read_text()


def sweep_slowly(address, folder):
    """A driver whose one task has begun, and would take long."""
    ROWS["copy"] = Row(cores=1)
    task = Copy(title="Copying slowly", output=folder / "made", part=folder / "word", waits=True)
    leave(exit_code(lambda: run.execute([task], folder, address, {}, 0)))


def test_sigterm_ends_the_driver_as_ctrl_c_does_and_its_tasks(cluster, tmp_path):
    (tmp_path / "word").write_text("owl")
    driver = fresh.started(sweep_slowly, cluster.address, tmp_path, output=tmp_path)
    until(lambda: (tmp_path / "waiting").is_file() and (tmp_path / "waiting").read_text())
    assert list(tmp_path.glob(".made.owl-lock"))
    worker = psutil.Process(int((tmp_path / "waiting").read_text()))
    driver.terminate()
    driver.join()
    said = [line for line in (tmp_path / "stderr").read_text().splitlines() if "owl: " in line]
    assert said == ["owl: interrupted; all tasks are cancelled; the same command goes on."]
    assert driver.exitcode == 130
    until(lambda: not worker.is_running())
    assert not list(tmp_path.glob(".made*"))
    assert not (tmp_path / "made").exists()


def until(there):
    end = time.monotonic() + 120
    while not there():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_plan_on_a_cluster(cluster, llama, tmp_path, capfd):
    out, word = tmp_path / "out", tmp_path / "word"
    (out / "made").mkdir(parents=True)
    word.write_text("owl")
    plan = plan_in(out, word, llama)
    with pytest.raises(BadInput, match=r"No node can prune, which needs 4 cpu.*2 cpu"):
        run.execute(plan, out, cluster.address, {"prune": {"cores": 4}}, 0)

    left = run.execute(plan, out, cluster.address, {}, 0)
    assert {index: one.state for index, one in left.items()} == {3: "failed", 4: "skipped"}
    assert left[3].said.startswith("FileNotFoundError")
    assert left[3].code == 70
    assert survey(plan) == ["done", "done", "done", "to do", "to do", "done"]
    told = capfd.readouterr().err
    assert "skipped  Copying after: it needs what failed: Copying absent" in told

    records = {task.title.split()[1]: kept(run.log_of(task, out)) for task in plan}
    assert records.pop("after") is None  # it never began
    assert {name: one.state for name, one in records.items()} == {
        **dict.fromkeys(("magnitude-50", "first", "killed", "alone"), "done"),
        "absent": "failed",
    }
    alone = records.pop("alone")
    assert not any(beside(alone, other) for other in records.values())
    assert "copying word" in (out / "logs" / "made-first.log").read_text()
    assert "Traceback" in (out / "logs" / "made-absent.log").read_text()

    (out / "absent").write_text("now")
    before = {path: path.stat().st_mtime for path in out.glob("made/*/owl.json")}
    assert run.execute(plan, out, cluster.address, {}, 0) == {}
    assert set(survey(plan)) == {"done"}
    assert {path: path.stat().st_mtime for path in before} == before  # nothing done twice
    assert sorted(path.name for path in out.rglob(".*")) == []

    here = plan[0].model_copy(update={"output": tmp_path / "here"})
    do(here)
    weights = "model.safetensors"
    assert sha256(plan[0].output / weights) == sha256(here.output / weights)

    # A node that differs, or does not see what is shared, is refused before work begins.
    fake = tmp_path / "site" / "torch-9.9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9.9.9\n")
    path = f"{fake.parent}:{Path(__file__).parent}"
    cluster.add_node(**SMALL, env_vars={"PYTHONPATH": path})
    plan = plan_in(tmp_path / "other", word, llama)
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput, match=r"has torch 9\.9\.9, and this machine has"):
        run.execute(plan, tmp_path / "other", cluster.address, {}, 0)
    assert set(survey(plan)) == {"to do"}
    assert not list((tmp_path / "other").glob(".owl-shared*"))
