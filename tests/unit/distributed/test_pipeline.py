import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import ClassVar, Literal

import pytest

from owl_deploy.bench.plan import BenchPlan
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.distributed import pipeline, sweep
from owl_deploy.distributed.pipeline import (
    Bench,
    Evaluate,
    Export,
    Finetune,
    Prune,
    RunTasks,
    Task,
    attempt,
    dense_exports,
    digest,
    do,
    execute,
    needs,
    seconds,
    state,
    survey,
)
from owl_deploy.errors import BadInput
from owl_deploy.finetune.settings import FinetuneSettings
from owl_deploy.models.manifest import CheckpointManifest, DeploymentManifest, Pruning
from owl_deploy.models.measurements import keep_measurement, measurement_file
from owl_deploy.utils.artefact import staged_folder, write_json
from owl_deploy.utils.resume import NotThatRun


class Join(Task):
    """A task that takes no time: the texts of files, one after the other, in an artefact."""

    APART: ClassVar = {"parts": True}

    task: Literal["join"] = "join"
    parts: tuple[Path, ...]
    upper: bool = False
    die: bool = False

    def reads(self):
        return self.parts

    def run(self):
        with staged_folder(self.output, force=True) as folder:
            texts = (part if part.is_file() else part / "text" for part in self.parts)
            text = "".join(path.read_text() for path in texts)
            (folder / "text").write_text(text.upper() if self.upper else text)
            if self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            CheckpointManifest(source=digest(folder / "text")).write(folder)

    def agrees(self):
        return False


@pytest.fixture
def word(tmp_path):
    path = tmp_path / "word"
    path.write_text("owl")
    return path


def chain(word, folder, **changes):
    """A first artefact of a file, and a second of the first and the file."""
    first = Join(title="first", output=folder / "made" / "first", parts=(word,), **changes)
    second = Join(title="second", output=folder / "made" / "second", parts=(first.output, word))
    return (first, second)


def done(plan):
    said = []
    execute(plan, said.append)
    return said


def test_a_plan_is_done_once(word, tmp_path):
    plan = chain(word, tmp_path)
    assert needs(plan) == [[], [0]]
    assert survey(plan) == ["to do", "to do"]
    assert not (tmp_path / "made").exists()
    assert done(plan) == ["first", "second"]
    assert (plan[1].output / "text").read_text() == "owlowl"
    assert survey(plan) == ["done", "done"]
    assert done(plan) == []


def test_what_was_made_of_other_inputs_is_made_again(word, tmp_path):
    plan = chain(word, tmp_path)
    done(plan)
    word.write_text("OWL")
    assert survey(plan) == ["outdated", "outdated"]
    assert [title.partition(",")[0] for title in done(plan)] == ["first", "second"]
    assert (plan[1].output / "text").read_text() == "OWLOWL"


def test_other_settings_make_again_what_depends_on_them(word, tmp_path):
    done(chain(word, tmp_path))
    plan = chain(word, tmp_path, upper=True)
    assert survey(plan) == ["outdated", "outdated"]
    done(plan)
    assert (plan[1].output / "text").read_text() == "OWLowl"
    renamed = [task.model_copy(update={"title": "another"}) for task in plan]
    assert survey(renamed) == ["done", "done"]


def test_a_setting_that_an_earlier_version_had_not_makes_nothing_anew(word, tmp_path):
    plan = chain(word, tmp_path)
    done(plan)
    receipt = json.loads(plan[0].receipt.read_text())
    del receipt["asked"]["upper"]
    write_json(plan[0].receipt, receipt)
    assert survey(plan) == ["done", "done"]


def test_the_same_settings_elsewhere_are_the_same(word, tmp_path):
    done(chain(word, tmp_path))
    (tmp_path / "moved").mkdir()
    (tmp_path / "made").rename(tmp_path / "moved" / "made")
    assert survey(chain(word, tmp_path / "moved")) == ["done", "done"]


def test_what_another_put_there_is_not_what_the_receipt_says(word, tmp_path):
    plan = chain(word, tmp_path)
    done(plan)
    CheckpointManifest(source="by hand").write(plan[0].output)
    assert survey(plan) == ["outdated", "outdated"]


def test_a_killed_plan_goes_on(word, tmp_path):
    plan = chain(word, tmp_path)
    code = (
        "import sys, pathlib\n"
        "from tests.unit.distributed.test_pipeline import chain, execute\n"
        "plan = chain(*map(pathlib.Path, sys.argv[1:]))\n"
        "execute([plan[0], plan[1].model_copy(update={'die': True})], print)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, word, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert survey(plan) == ["done", "to do"]
    assert done(plan) == ["second"]
    left = sorted(path.name for path in (tmp_path / "made").iterdir())
    assert left == ["first", "second"]  # nothing of the killed one


ALL = (
    Prune(
        title="p",
        output="a/c",
        model="m",
        settings=PruneSettings.checked(sparsity=0.5),
        calibration="t.txt",
    ),
    Export(title="e", output="a/d", checkpoint="a/c", target="owl", precision="int8"),
    Evaluate(title="v", output="a/d/measured/perplexity.json", model="a/d", text="t.txt"),
    Bench(title="b", output="a/b", plan=BenchPlan(candidates=("a/d",), pairs=2)),
)


def test_a_plan_goes_through_pickle():
    assert pickle.loads(pickle.dumps(ALL)) == ALL
    assert needs(ALL) == [[], [0], [1], [1, 2]]


def test_tasks_run_in_processes_that_know_nothing_of_each_other(word, tmp_path):
    """As on a cluster: each is sent to a fresh interpreter once what it needs is done."""
    plan = chain(word, tmp_path)
    context = multiprocessing.get_context("spawn")
    for task in plan:
        with ProcessPoolExecutor(1, mp_context=context) as machine:
            machine.submit(do, task).result()
    assert survey(plan) == ["done", "done"]


def test_a_checkpoint_without_a_receipt_is_judged_by_its_manifest(tmp_path):
    task = ALL[0].model_copy(update={"output": tmp_path})
    manifest = CheckpointManifest(
        settings=Pruning.model_validate(task.settings.model_dump()),
        calibration={"source": "t.txt", "samples": 128, "sequence_length": 2048},
    )
    manifest.write(tmp_path)
    assert state(task) == "done"
    assert state(task.model_copy(update={"samples": 64})) == "outdated"
    assert (
        state(task.model_copy(update={"settings": PruneSettings.checked(sparsity=0.6)}))
        == "outdated"
    )
    DeploymentManifest().write(tmp_path)
    assert state(task) == "outdated"


def test_a_checkpoint_to_a_budget_without_a_receipt_is_judged_by_its_manifest(tmp_path):
    asked = PruneSettings.checked(budget="400MB")
    task = ALL[0].model_copy(update={"output": tmp_path, "settings": asked})
    found = asked.model_copy(update={"sparsity": 0.1, "head_bits": 4})
    manifest = CheckpointManifest(
        settings=Pruning.model_validate(found.model_dump()),
        calibration={"source": "t.txt", "samples": 128, "sequence_length": 2048},
    )
    manifest.write(tmp_path)
    assert state(task) == "done"
    for other in ({"budget": "300MB"}, {"budget": "400MB", "head_bits": 3}, {"bits": 4}):
        assert (
            state(task.model_copy(update={"settings": PruneSettings.checked(**other)}))
            == "outdated"
        )


def test_a_fine_tuned_checkpoint_without_a_receipt_is_judged_by_its_manifest(tmp_path):
    settings = FinetuneSettings(method="masked", max_minutes=5)
    task = Finetune(title="f", output=tmp_path, checkpoint="a/c", text="t.txt", settings=settings)
    CheckpointManifest().write(tmp_path)
    assert state(task) == "outdated"  # pruned, and not trained
    done = {
        "checkpoint": {"path": "a/c", "weights_sha256": ""},
        "settings": {"method": "masked", "max_minutes": 5, "learning_rate": 5e-4},
        "teacher": None,
        **{"steps": 1, "seconds": 1.0, "tokens": 1, "curve": []},
        "held_out_loss": {"before": 2.0, "after": 1.0},
    }
    CheckpointManifest.model_validate({"finetune": done}).write(tmp_path)
    assert state(task) == "done"
    longer = settings.model_copy(update={"max_minutes": 6})
    assert state(task.model_copy(update={"settings": longer})) == "outdated"
    assert state(task.model_copy(update={"teacher": Path("m")})) == "outdated"


def test_a_receipt_says_how_long_it_took(word, tmp_path):
    plan = chain(word, tmp_path)
    assert seconds(plan[0]) is None
    done(plan)
    assert all(0 <= seconds(task) < 60 for task in plan)
    assert survey(plan) == ["done", "done"]


def test_a_deployment_without_a_receipt_is_judged_by_its_manifest(tmp_path):
    task = ALL[1].model_copy(update={"output": tmp_path / "d", "checkpoint": tmp_path / "c"})
    for name in ("c", "d"):
        (tmp_path / name).mkdir()
    source = {"manifest": {"wall_seconds": 7.5}}
    made = {"target": "owl", "precision": "int8", "source": source}
    DeploymentManifest.model_validate(made).write(tmp_path / "d")
    assert state(task) == "done"
    assert state(task.model_copy(update={"precision": "bf16"})) == "outdated"
    CheckpointManifest(wall_seconds=7.5).write(tmp_path / "c")
    assert state(task) == "done"
    CheckpointManifest(wall_seconds=8.5).write(tmp_path / "c")  # it was pruned again since
    assert state(task) == "outdated"


def test_a_checkpoint_that_was_trained_where_it_lies_is_another(tmp_path):
    CheckpointManifest(wall_seconds=7.5).write(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"weights")
    before = digest(tmp_path)
    (tmp_path / "notes.txt").write_text("of no matter")
    keep_measurement(tmp_path, "perplexity", {"value": 3.0})
    assert digest(tmp_path) == before
    weights.write_bytes(b"trained")
    assert digest(tmp_path) != before


def test_another_version_exports_again(tmp_path, monkeypatch):
    task = ALL[1].model_copy(update={"output": tmp_path / "d", "checkpoint": tmp_path / "c"})
    made = {"target": task.target, "precision": task.precision}
    write = DeploymentManifest.model_validate(made).write
    monkeypatch.setattr(Export, "run", lambda self: (self.output.mkdir(), write(self.output)))
    done([task])
    assert state(task) == "done"
    monkeypatch.setattr(pipeline, "installed_version", lambda name: "999")
    assert state(task) == "outdated"


def test_other_kernels_export_again_and_only_what_has_them(tmp_path, monkeypatch):
    library = tmp_path / "kernels"
    library.write_bytes(b"fast")
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", str(library))
    ours = ALL[1]
    theirs = ours.model_copy(update={"target": "onnxruntime"})
    before, others = ours.asked([]), theirs.asked([])
    library.write_bytes(b"faster")
    assert not pipeline.agree(before, ours.asked([]))
    assert pipeline.agree(others, theirs.asked([]))
    library.unlink()  # where a plan is looked at, and nothing is made
    assert pipeline.agree(before, ours.asked([]))


def test_what_another_version_of_an_engine_timed_is_timed_again(tmp_path, monkeypatch):
    deployment = tmp_path / "d"
    deployment.mkdir()
    DeploymentManifest.model_validate({"target": "onnxruntime", "precision": "int8"}).write(
        deployment
    )
    bench = ALL[3].model_copy(update={"plan": BenchPlan(candidates=(deployment,))})
    elsewhere = bench.model_copy(update={"plan": BenchPlan(candidates=(tmp_path / "e",))})
    chosen = bench.plan.model_copy(update={"engines": ("deepsparse", "owl")})
    chosen = bench.model_copy(update={"plan": chosen})
    known = {"onnxruntime": "0.18", "owl": "0.18", "deepsparse": "1.8"}
    monkeypatch.setattr(pipeline, "installed_version", known.get)
    before, others = bench.asked([]), chosen.asked([])
    assert before["software"]["engines"] == {"onnxruntime": "0.18"}
    assert elsewhere.asked([])["software"]["engines"] == {}  # what it times does not lie here
    assert pipeline.agree(before, elsewhere.asked([]))
    known["deepsparse"] = "1.9"
    assert pipeline.agree(before, bench.asked([]))
    assert not pipeline.agree(others, chosen.asked([]))
    del known["deepsparse"]  # where a plan is looked at, and nothing is timed
    assert pipeline.agree(others, chosen.asked([]))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "__version__", "999")
        assert not pipeline.agree(others, chosen.asked([]))
    known["onnxruntime"] = "0.19"
    assert not pipeline.agree(before, bench.asked([]))


def test_a_measurement_without_a_receipt_is_judged_by_what_it_was_of(tmp_path):
    kept = {"text": "t.txt", "value": 3.0, "window": 128, "windows": 2}
    keep_measurement(tmp_path, "perplexity", kept)
    file = tmp_path / "measured" / "perplexity.json"
    same = {"output": file, "model": tmp_path, "window": 128, "windows": 2}
    task = ALL[2].model_copy(update=same)
    assert state(task) == "done"
    for other in ({"text": "u.txt"}, {"window": 64}, {"windows": 3}, {"windows": None}):
        assert state(task.model_copy(update=other)) == "outdated"


def test_a_known_quality_is_taken_over(tmp_path):
    known = tmp_path / "known.json"
    write_json(known, {"text": "t.txt", "value": 3.0})
    file = tmp_path / "d" / "measured" / "perplexity.json"
    task = Evaluate(title="v", output=file, model=tmp_path / "d", text="t.txt", known=known)
    done([task])
    assert json.loads(file.read_text()) == {"text": "t.txt", "value": 3.0, "engine": "torch"}
    assert state(task) == "done"
    write_json(known, {"text": "t.txt", "value": 4.0})
    assert state(task) == "outdated"


def test_dense_baselines_are_made_once_for_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "model"
    checkpoint.mkdir()
    with pytest.raises(BadInput, match=r"config\.json is missing"):
        dense_exports(checkpoint, [])
    (checkpoint / "config.json").write_text("{}")
    mine = [("owl", "int8"), ("deepsparse", "fp32"), ("onnxruntime", "fp32"), ("owl", "int8")]
    first = dense_exports(checkpoint, mine)
    assert [task.output.name for task in first] == [
        "dense-deepsparse-fp32",
        "dense-owl-int8",
        "dense-onnxruntime-fp32",
        "dense-onnxruntime-int8",
        "dense-onnxruntime-int4",
    ]
    assert dense_exports(checkpoint, mine) == first
    with monkeypatch.context() as patch:  # an upgrade
        patch.setattr(pipeline, "installed_version", lambda name: "999")
        assert dense_exports(checkpoint, mine)[0].output.parent != first[0].output.parent
    (checkpoint / "config.json").write_text('{"changed": 1}')
    assert dense_exports(checkpoint, [])[0].output.parent != first[0].output.parent


@pytest.mark.parametrize(
    ("config", "precisions"),
    [
        ({"model_type": "gpt_neox", "hidden_size": 512, "num_attention_heads": 8}, ["fp32"]),
        ({"model_type": "llama", "hidden_size": 80, "num_attention_heads": 2}, ["fp32"]),
        ({"model_type": "qwen3", "head_dim": 24, "hidden_size": 64}, ["fp32"]),
        ({"model_type": "llama", "hidden_size": "?"}, ["fp32", "int8", "int4"]),
        ({"model_type": "qwen3", "head_dim": 32}, ["fp32", "int8", "int4"]),
    ],
)
def test_no_baseline_is_planned_that_the_builder_is_known_to_refuse(
    tmp_path, monkeypatch, config, precisions
):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(config))
    planned = dense_exports(tmp_path, [("deepsparse", "fp32")])
    assert [task.precision for task in planned[1:]] == precisions


def test_nothing_is_planned_beside_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        sweep.tasks(tmp_path, tmp_path / "no" / "out", sweep.SweepPlan(), "t", "t")


def test_what_fails_stops_only_what_needs_it(word, tmp_path):
    absent = Join(title="absent", output=tmp_path / "made" / "absent", parts=(tmp_path / "no",))
    after = Join(title="after", output=tmp_path / "made" / "after", parts=(absent.output,))
    last = Join(title="last", output=tmp_path / "made" / "last", parts=(after.output, word))
    plan = (absent, after, *chain(word, tmp_path), last)
    with pytest.raises(FileNotFoundError):
        done(plan)
    said = []
    left = attempt(plan, said.append)
    assert {index: one.state for index, one in left.items()} == {
        **{0: "failed", 1: "skipped", 4: "skipped"}
    }
    assert (left[0].title, left[0].code) == ("absent", 70)
    assert left[0].said.startswith("FileNotFoundError: ")
    assert left[4].said == "it needs what failed: absent"
    assert said == ["absent", f"absent failed: {left[0].said}", "first", "second"]
    (tmp_path / "no").write_text("now")
    assert attempt(plan, said.append) == {}
    assert survey(plan) == ["done"] * 5


def test_the_executor_tells_what_is_made_again(word, tmp_path):
    plan = chain(word, tmp_path)
    done(plan)
    word.write_text("hen")
    again = "again: it is another's result"
    assert done(plan) == [f"first, {again}", f"second, {again}"]
    do(plan[0])
    assert survey(plan) == ["done", "done"]  # made again, but the same


@pytest.mark.parametrize(
    ("kept", "found"),
    [({}, "done"), ({"window": 512}, "outdated"), ({"every": 8}, "outdated"), (None, "outdated")],
)
def test_tasks_that_saw_less_are_run_again(tmp_path, kept, found):
    (tmp_path / "config.json").write_text('{"max_position_embeddings": 1024}')
    results = {} if kept is None else {"code": {"window": 1024} | kept}
    keep_measurement(tmp_path, "tasks", results)
    task = RunTasks(
        title="t",
        output=measurement_file(tmp_path, "tasks"),
        model=tmp_path,
        names=("code",),
        window=2048,  # more than the model takes
    )
    assert state(task) == found


def test_what_is_not_read_is_not_read_from_the_folder_at_hand():
    prune = ALL[0].model_copy(update={"calibration": None})
    assert prune.reads() == (prune.model,)
    tune = Finetune(
        title="f", output="a/f", checkpoint="a/c", text="t.txt", settings=FinetuneSettings()
    )
    assert "" not in map(str, tune.reads())
    assert Path() not in tune.reads()


def test_only_a_run_of_other_arguments_is_begun_anew(tmp_path, monkeypatch):
    """What else is wrong may be right in a minute: what an earlier run has done stays."""
    monkeypatch.setattr(pipeline, "is_interrupted", lambda _: True)
    asked = []

    def make(resume):
        asked.append(resume)
        if resume:
            raise error

    error = NotThatRun("It was started with other arguments.")
    pipeline._go_on(tmp_path / "out", make)
    assert asked == [True, False]
    error = BadInput("The data set cannot be reached.")
    with pytest.raises(BadInput, match="cannot be reached"):
        pipeline._go_on(tmp_path / "out", make)
    assert asked == [True, False, True]
