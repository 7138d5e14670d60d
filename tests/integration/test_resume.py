"""kill -9 at any moment: nothing looks finished, and --resume ends with bit-identical weights."""

import itertools
import json
import os
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file

from owl_deploy.compression import recipe, run, store
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.finetune import run as finetuning
from owl_deploy.finetune import train
from owl_deploy.models import checkpoint
from owl_deploy.utils import lock as locks
from owl_deploy.utils.hardware import Hardware, on_threads
from owl_deploy.utils.resume import partial_folder
from tests import fresh, tiny


def prune_until(moment, model, output, text, asked, resume, shard_bytes):
    """Prune, and be killed after so many calls of that method of the store."""
    checkpoint.SHARD_BYTES = shard_bytes
    name, count = moment.split(":")
    original, calls = getattr(store.Store, name), itertools.count(1)

    def counted(self, *arguments):
        if next(calls) > int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    setattr(store.Store, name, counted)
    calibration = Calibration(text, samples=4, sequence_length=48)
    prune(
        model,
        output,
        PruneSettings.checked(**asked),
        calibration,
        resume=resume,
    )


def killed(model, output, text, asked, moment, *, resume=False):
    arguments = (moment, model, output, str(text), asked, resume, checkpoint.SHARD_BYTES)
    done = fresh.ran(prune_until, *arguments)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not output.exists()


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_llama(tmp_path_factory.mktemp("model") / "model", num_hidden_layers=4)


def weights(folder):
    """All tensors of a checkpoint, of one file or of several."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


ONE, SEVERAL = checkpoint.SHARD_BYTES, 30_000  # shards


@pytest.mark.parametrize(
    ("asked", "shard_bytes"),
    [
        ({"method": "wanda"}, SEVERAL),
        ({"method": "sparsegpt", "allocation": "fisher"}, ONE),
        ({"method": "alps"}, SEVERAL),
        ({"method": "sparsegpt", "bits": 4}, ONE),
        ({"method": "sparsegpt", "bits": 4, "asymmetric": False}, SEVERAL),
        ({"method": "wanda", "reconstruct": 2}, ONE),
        ({"method": "wanda", "reconstruct": 2}, SEVERAL),
        ({"method": "sparsegpt", "bits": 3, "reconstruct": 2, "asymmetric": False}, ONE),
        ({"method": "alps", "asymmetric": True}, ONE),
        ({"method": "sparsegpt", "bits": 3, "reconstruct": 2}, ONE),
    ],
    ids=str,
)
def test_a_killed_run_resumes_to_the_same_weights(
    model, text_file, tmp_path, asked, shard_bytes, monkeypatch
):
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", shard_bytes)
    asked = {"allocation": "owl", "sparsity": 0.6} | asked
    settings = PruneSettings.checked(**asked)
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    first = prune(model, tmp_path / "whole", settings, calibration).to_json()

    out = tmp_path / "out"
    killed(model, out, text_file, asked, "save:1")  # one block is finished
    killed(model, out, text_file, asked, "save:2", resume=True)  # three are
    killed(model, out, text_file, asked, "finish:0", resume=True)  # all, but nothing is published
    with on_threads(1 if torch.get_num_threads() > 1 else 2):  # as on another node
        manifest = prune(model, out, settings, calibration, resume=True)
    manifest = manifest.to_json()
    assert manifest["resumed"]
    assert manifest["blocks"] == first["blocks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    recipes = [(tmp_path / name / "recipe.yaml").read_text() for name in ("whole", "out")]
    assert recipes[0] == recipes[1]


def test_a_budget_resumes_from_each_of_its_passes(model, text_file, tmp_path, monkeypatch):
    """One block of the forward pass is finished, one of the backward pass, then one is pruned."""
    asked = {"budget": "3.9", "method": "sparsegpt"}
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache of the whole"))
    prune(model, tmp_path / "whole", PruneSettings.checked(**asked), calibration)

    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "out"
    killed(model, out, text_file, asked, "keep:1")
    killed(model, out, text_file, asked, "keep:4", resume=True)
    left = sorted(path.name for path in partial_folder(out).glob("*.*ward"))
    assert [name.rpartition(".")[2] for name in left] == ["forward"] * 3 + ["backward", "forward"]
    killed(model, out, text_file, asked, "save:1", resume=True)
    assert not list(partial_folder(out).glob("*.*ward"))  # the plan holds it all
    prune(model, out, PruneSettings.checked(**asked), calibration, resume=True)
    whole, resumed = (weights(tmp_path / name) for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(whole[name].equal(resumed[name]) for name in whole)
    names = [sorted(path.name for path in (tmp_path / one).iterdir()) for one in ("whole", "out")]
    assert names[0] == names[1]
    told = [json.loads((tmp_path / one / "owl.json").read_text()) for one in ("whole", "out")]
    assert told[0]["blocks"] == told[1]["blocks"]


# Stands still once a block is there.
STANDING = """
import signal, sys
from pathlib import Path
from owl_deploy.__main__ import main
from tests.fresh import signalled_at

signalled_at(Path(sys.argv.pop()), signal.SIGSTOP)
main()
"""


def test_kill_9_from_outside_at_some_moment(model, text_file, tmp_path):
    command = ["prune", model, "-o", tmp_path / "out", "-c", text_file]
    command += ["--samples", "24", "--sequence-length", "128", "-m", "sparsegpt"]
    command = list(map(str, command))
    block = partial_folder(tmp_path / "out") / "model.layers.0.block"
    process = subprocess.Popen(
        [sys.executable, "-c", STANDING, *command, block], stderr=subprocess.DEVNULL
    )
    _, status = os.waitpid(process.pid, os.WUNTRACED)
    assert os.WIFSTOPPED(status)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    done = subprocess.run(
        [sys.executable, "-m", "owl_deploy", *command, "--resume"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_whole_needs_only_to_appear(model, text_file, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    settings = PruneSettings.checked(method="wanda", sparsity=0.6)
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    out = tmp_path / "out"
    with monkeypatch.context() as at_the_end:
        at_the_end.setattr(store, "publish", stopped)
        with pytest.raises(KeyboardInterrupt, match="--resume goes on from here"):
            prune(model, out, settings, calibration)
    monkeypatch.setattr(run, "resolve", stopped)
    manifest = prune(model, out, settings, calibration, resume=True)
    assert manifest.sparsity.achieved == pytest.approx(0.6, abs=0.01)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not {"run.json", "plan.json"} & {path.name for path in out.iterdir()}
    assert weights(out)


def test_other_arguments_are_refused_by_name(model, text_file, tmp_path):
    out = tmp_path / "out"
    killed(model, out, text_file, {"method": "wanda", "sparsity": 0.6}, "save:1")
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    settings = PruneSettings.checked(sparsity=0.6)
    with pytest.raises(BadInput, match=r"An earlier run .* was interrupted"):
        prune(model, out, settings, Calibration("missing.txt"))
    with pytest.raises(BadInput, match=r"settings\.sparsity was 0\.6, now 0\.5"):
        prune(
            model,
            out,
            PruneSettings.checked(sparsity=0.5),
            calibration,
            resume=True,
        )
    with pytest.raises(BadInput, match="calibration"):
        prune(
            model,
            out,
            settings,
            Calibration(str(text_file), samples=3, sequence_length=48),
            resume=True,
        )
    prune(model, out, settings, calibration, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_nothing_to_resume_is_said_before_a_text_is_read(model, tmp_path):
    calibration = Calibration("missing.txt", samples=4, sequence_length=48)
    with pytest.raises(BadInput, match="no interrupted run"):
        prune(model, tmp_path / "out", PruneSettings.checked(), calibration, resume=True)
    assert list(tmp_path.iterdir()) == []


WAITING = """
import sys
import torch
torch.set_num_threads(1)
from owl_deploy import cli
from owl_deploy.compression import write

def wait(*_):
    print("writing", flush=True)
    sys.stdin.read()

write.assemble = wait
cli.main()
"""


def test_another_run_for_the_same_output_is_refused_at_once(model, text_file, tmp_path):
    out = tmp_path / "out"
    command = ["prune", model, "-o", out, "-c", text_file, "--samples", 2, "--sequence-length", 48]
    arguments = [sys.executable, "-c", WAITING, *map(str, command)]
    with subprocess.Popen(arguments, stdin=-1, stdout=-1, stderr=-3, text=True) as first:
        assert first.stdout.readline() == "writing\n"
        for second in (command, [*command, "--resume"], ["export", model, "-o", out]):
            done = fresh.ran(fresh.owl, *second)
            assert (done.returncode, "Another run is writing" in done.stderr) == (2, True)
        first.kill()
    calibration = Calibration(str(text_file), samples=2, sequence_length=48)
    prune(model, out, recipe.merged(None, {}), calibration, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def taken_over(output):
    """A run of another machine writes `output` now; the files that are there for it to go on from.

    As when this one was suspended for longer than a lease lasts.
    """
    lock = output.with_name(f".{output.name}.owl-lock")
    lock.write_text(json.dumps(locks._me() | {"host": "node-7", "of": ["another boot"]}))
    return partial_files(output)


def partial_files(output):
    found = partial_folder(output).rglob("*")
    return {path: path.stat().st_mtime_ns for path in found if path.is_file()}


@pytest.mark.parametrize("moment", ["save", "finish"])
def test_a_pruning_that_lost_its_output_leaves_the_next_one_its_blocks(
    model, text_file, tmp_path, monkeypatch, moment
):
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    settings, out = PruneSettings.checked(allocation="uniform", sparsity=0.6), tmp_path / "out"
    method, there = getattr(store.Store, moment), {}

    def late(self, *arguments):
        there.update(taken_over(out))
        method(self, *arguments)

    monkeypatch.setattr(store.Store, moment, late)
    with pytest.raises(EnvironmentFailed, match=r"Another run took .*out over"):
        prune(model, out, settings, calibration)
    assert partial_files(out) == there
    assert any(path.name == "plan.json" for path in there)


FINETUNING = {"sequence_length": 32, "batch_size": 4, "max_steps": 3, "dtype": "float32"}


@pytest.mark.parametrize(("step", "seconds"), [(2, 0.0), (3, 300.0)], ids=["saving", "ending"])
def test_a_training_that_lost_its_output_leaves_the_next_one_alone(
    sparse, text_file, tmp_path, monkeypatch, step, seconds
):
    out, there = tmp_path / "out", {}
    step_end = train._Clock.on_step_end

    def late(self, args, state, control, **more):
        if state.global_step == step:
            there.update(taken_over(out))
        step_end(self, args, state, control, **more)

    monkeypatch.setattr(train, "_SAVE_SECONDS", seconds)
    monkeypatch.setattr(train._Clock, "on_step_end", late)
    with pytest.raises(EnvironmentFailed, match=r"Another run took .*out over"):
        finetuning.finetune(sparse, out, str(text_file), FINETUNING | {"method": "lora"})
    assert partial_files(out) == there
    assert any(path.name == "run.json" for path in there)


@pytest.mark.parametrize(
    ("failure", "ends", "complaint"),
    [
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8."),
            EnvironmentFailed,
            r"not enough memory.*--resume",
        ),
        (OSError(5, "Input/output error"), EnvironmentFailed, "cannot be read"),
        (ValueError("what nobody foresaw"), BadInput, "cannot load"),
    ],
    ids=str,
)
def test_a_training_that_cannot_be_gone_on_with_now_keeps_what_is_done(
    sparse, text_file, tmp_path, monkeypatch, failure, ends, complaint
):
    def fail(*_, **__):
        raise failure

    def stopped(*_):
        raise KeyboardInterrupt

    arguments = (sparse, tmp_path / "out", str(text_file), FINETUNING | {"method": "masked"})
    with monkeypatch.context() as patched:
        patched.setattr(finetuning.Run, "complete", stopped)
        with pytest.raises(KeyboardInterrupt):
            finetuning.finetune(*arguments)
    with monkeypatch.context() as patched:
        patched.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fail)
        with pytest.raises(ends, match=complaint):
            finetuning.finetune(*arguments, resume=True)
    with monkeypatch.context() as patched:
        patched.setattr(finetuning.Run, "_train_group", None)  # not again
        assert finetuning.finetune(*arguments, resume=True).finetune.resumed


@pytest.mark.parametrize(
    ("failure", "complaint"),
    [
        (OSError(28, "No space left on device"), "is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
    ],
)
def test_a_full_disk_or_memory_ends_with_a_sentence_and_resumes(
    model, text_file, tmp_path, monkeypatch, failure, complaint
):
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    settings = PruneSettings.checked(sparsity=0.6)
    save, calls = store.Store.save, []

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 3:
            raise failure
        save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "save", failing)
        with pytest.raises(EnvironmentFailed, match=rf"{complaint}.*--resume") as caught:
            prune(model, tmp_path / "out", settings, calibration)
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()
    prune(model, tmp_path / "out", settings, calibration, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_out_of_memory_it_goes_on_with_a_smaller_batch(model, text_file, tmp_path, monkeypatch):
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    settings, save, calls = PruneSettings.checked(sparsity=0.6), store.Store.save, itertools.count()

    def failing(self, *arguments):
        if next(calls):
            raise MemoryError
        save(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(store.Store, "save", failing)
        with pytest.raises(
            EnvironmentFailed, match=r"--resume\. A smaller --batch-size takes less"
        ):
            prune(model, tmp_path / "out", settings, calibration, Hardware(batch_size=4))
    smaller = Hardware(batch_size=2)
    found = prune(model, tmp_path / "out", settings, calibration, smaller, resume=True)
    assert found.resumed


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system")
def test_a_disk_that_is_really_full(model, text_file, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount here")
    try:
        calibration = Calibration(str(text_file), samples=4, sequence_length=48)
        with pytest.raises(EnvironmentFailed, match="is full"):
            prune(model, small / "out", PruneSettings.checked(sparsity=0.6), calibration)
        assert not (small / "out").exists()
    finally:
        subprocess.run(["umount", "--lazy", str(small)], check=True)
