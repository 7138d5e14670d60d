"""One fine-tuning in several processes: the model of one, resumed to the same bits."""

import json

import pytest
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.tokens import load_tokens
from owl_deploy.finetune import train
from owl_deploy.models.checkpoint import GRID
from tests import divided, fresh

# Ends the second process as it writes its part of the second checkpoint.
KILLED = """
import os
import sys
from owl_deploy import cli
from owl_deploy.utils import ranks
from owl_deploy.finetune import train

train._SAVE_SECONDS = 0.0
saved, save = 0, train._Clock.on_save

def counted(self, *arguments, **more):
    global saved
    saved += 1
    if saved == 3 and not ranks.leads():
        os.kill(os.getpid(), 9)
    save(self, *arguments, **more)

train._Clock.on_save = counted
sys.argv[0] = "owl"
cli.main()
"""
MASKED = ("--method", "masked", "--block-group", 1, "--max-steps", 8)
LORA = ("--merge", "masked", "--dropout", 0, "--max-steps", 4)
WHOLE = ("--method", "masked", "--max-steps", 8)
CLOSE = 1e-4  # of the largest weight of a tensor


def command(sparse, text_file, output, batch, *how):
    options = ("--sequence-length", 32, "--batch-size", batch, "--gradient-accumulation", 2)
    how += ("--learning-rate", 0.01, "--dtype", "float32")
    return ("finetune", sparse, "-o", output, "--text", text_file, *options, *how)


def curve(output):
    rows = json.loads((output / "owl.json").read_text())["finetune"]["curve"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize(
    ("how", "divided_by"),
    [(MASKED, ()), (LORA, ()), (WHOLE, ("--shard",)), (LORA, ("--shard",))],
    ids=["masked", "lora", "masked sharded", "lora sharded"],
)
def test_two_processes_train_the_model_of_one(
    owl, sparse, text_file, tmp_path, how, divided_by, llama
):
    how += ("--teacher", llama)
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = owl(*command(sparse, text_file, one, 4, *how))
    assert code == 0, err
    done = fresh.group(2, fresh.owl, *command(sparse, text_file, two, 2, *how, *divided_by))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    apart = divided.difference(one, two)
    assert (apart.elsewhere, apart.off < CLOSE) == (0, True), apart
    assert not load_file(one / "model.safetensors").keys() ^ load_file(two / "model.safetensors")
    for alone, shared in zip(curve(one), curve(two), strict=True):
        assert shared == pytest.approx(alone, rel=1e-4)
    assert json.loads((two / "owl.json").read_text())["finetune"]["processes"] == 2
    assert done.stdout.count("held-out loss") == 1


@pytest.mark.parametrize(
    ("sharded", "alone"),
    [((), "processes was 2, now 1"), (("--shard",), "divides the model over processes")],
    ids=["copies", "sharded"],
)
def test_a_killed_process_ends_the_run_which_resumes_to_the_same_bits(
    owl, sparse, text_file, tmp_path, sharded, alone
):
    how = ("--method", "masked", "--max-steps", 5, *sharded)
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = fresh.group(2, fresh.owl, *command(sparse, text_file, whole, 1, *how))
    assert done.returncode == 0, done.stderr
    asked = command(sparse, text_file, out, 1, *how)
    script = tmp_path / "script.py"
    script.write_text(KILLED)
    ended = divided.torchrun(2, *asked, program=(script,))
    assert ended.returncode != 0
    # Either the connection says it first, or torchrun.
    assert ended.stderr.count("owl: ") == 1, ended.stderr
    assert "--resume" in ended.stderr
    assert "Warning: " not in ended.stderr
    assert not out.exists()
    code, _, err = owl(*asked, "--resume")
    assert (code, alone in " ".join(err.split())) == (2, True), err
    done = fresh.group(2, fresh.owl, *asked, "--resume")
    assert done.returncode == 0, done.stderr
    assert divided.difference(whole, out) == divided.SAME
    assert curve(whole) == curve(out)


def count_held(folder, command):
    """Train, and write what this process holds at the end of a step: weights, no gradients any
    more, Adam's."""
    end = train._Clock.on_step_end

    def counted(self, args, state, control, optimizer, **more):
        held = [*self.trainee.parameters(), *self.trainee.buffers()]
        held += [one for moments in optimizer.state.values() for one in moments.values()]
        local = [one.to_local() if isinstance(one, DTensor) else one for one in held]
        (folder / f"held-{self.ranks.rank}").write_text(str(sum(one.nbytes for one in local)))
        end(self, args, state, control, **more)

    train._Clock.on_step_end = counted
    fresh.owl(*command)


def test_a_sharded_process_holds_half_and_trains_what_one_with_a_copy_does(
    sparse, text_file, tmp_path, llama
):
    held = {}
    for name, how in (("copies", ()), ("sharded", ("--shard",))):
        out = tmp_path / name
        how += ("--method", "masked", "--max-steps", 2, "--teacher", llama, "--feature-weight", 1)
        done = fresh.group(2, count_held, tmp_path, command(sparse, text_file, out, 1, *how))
        assert done.returncode == 0, done.stderr
        held[name] = [int((tmp_path / f"held-{rank}").read_text()) for rank in (0, 1)]
    for copy, part in zip(held["copies"], held["sharded"], strict=True):
        assert part < 0.5 * copy  # less than half: the weights of products are not kept either
    apart = divided.difference(tmp_path / "copies", tmp_path / "sharded")
    assert (apart.elsewhere, apart.off < CLOSE) == (0, True), apart


def test_a_rounded_checkpoint_keeps_its_grid_when_sharded(llama, text_file, tmp_path):
    rounded, out = tmp_path / "rounded", tmp_path / "out"
    calibration = Calibration(str(text_file), samples=4, sequence_length=32)
    prune(llama, rounded, PruneSettings.checked(method="wanda", sparsity=0.5, bits=4), calibration)
    how = ("--method", "masked", "--max-steps", 3)
    copies = command(rounded, text_file, tmp_path / "copies", 2, *how)
    assert fresh.group(2, fresh.owl, *copies).returncode == 0
    done = fresh.group(2, fresh.owl, *command(rounded, text_file, out, 2, *how, "--shard"))
    assert done.returncode == 0, done.stderr
    assert (rounded / GRID).read_bytes() == (out / GRID).read_bytes()
    assert divided.difference(rounded, out).off > CLOSE  # it has trained
    apart = divided.difference(tmp_path / "copies", out)  # which keeps to the grid: tested there
    assert (apart.elsewhere, apart.off < CLOSE) == (0, True), apart


def test_more_processes_than_windows_end_with_one_sentence(sparse, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river ran past the mill and under the old stone bridge. " * 8)
    length = len(load_tokens(sparse, [str(text)])) // 3  # two windows, and one that is held out
    asked = ("finetune", sparse, "-o", tmp_path / "out", "--text", text)
    asked += ("--sequence-length", length)
    done = fresh.group(4, fresh.owl, *asked)
    assert done.returncode != 0
    assert done.stderr.count("owl: ") == 1
    assert "There are 4 processes, and 2 windows" in done.stderr
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("name", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_sharded_model_is_refused(owl, sparse, text_file, tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "true")
    code, _, err = owl(*command(sparse, text_file, tmp_path / "out", 1))
    assert (code, "does not shard a model" in " ".join(err.split())) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_not_divided_over_one_process(owl, sparse, text_file, tmp_path):
    code, _, err = owl(*command(sparse, text_file, tmp_path / "out", 1), "--shard")
    assert (code, "Start several with torchrun" in " ".join(err.split())) == (2, True), err
    assert list(tmp_path.iterdir()) == []
