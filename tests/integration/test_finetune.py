"""`owl finetune` as a user has it: kill -9 and resume, what is refused, export of what came out."""

import itertools
import json
import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.finetune import train
from owl_deploy.models.checkpoint import GRID
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from tests import fresh


def killed_at(moment, command):
    """Train as the command says, and be killed at that save: it is there, not marked as whole."""
    train._SAVE_SECONDS = 0.0
    saves, save = itertools.count(1), train._Clock.on_save

    def counted(self, *arguments, **more):
        if next(saves) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        save(self, *arguments, **more)

    train._Clock.on_save = counted
    fresh.owl(*command)


def arguments(sparse, text_file, output, *more):
    options = ("--sequence-length", 32, "--batch-size", 2, "--gradient-accumulation", 2)
    return ("finetune", sparse, "-o", output, "--text", text_file, *options, *more)


MASKED_GROUPS = ("--method", "masked", "--block-group", 1, "--max-steps", 8)
LORA = ("--merge", "masked", "--dropout", 0.3, "--max-steps", 5)


@pytest.mark.parametrize(("how", "moment"), [(MASKED_GROUPS, 5), (LORA, 3)], ids=["groups", "lora"])
def test_a_killed_run_resumes_to_the_same_losses(owl, sparse, text_file, tmp_path, how, moment):
    more = ("--learning-rate", 0.01, "--json", *how)
    _, whole, _ = owl(*arguments(sparse, text_file, tmp_path / "whole", *more))
    command = arguments(sparse, text_file, tmp_path / "out", *more)
    done = fresh.ran(killed_at, moment, command)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists()
    code, resumed, err = owl(*command, "--resume")
    assert code == 0, err
    curves = [json.loads(out)["finetune"]["curve"] for out in (whole, resumed)]
    for row in (*curves[0], *curves[1]):
        del row["seconds"]
    assert curves[0] == curves[1]
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(files[0][name].equal(files[1][name]) for name in files[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_adapter_is_as_asked_for(owl, sparse, text_file, tmp_path):
    asked = ["--rank", 4, "--alpha", 24, "--dropout", 0.25]
    asked += ["--target-module", "up_proj", "--target-module", "o_proj"]
    code, _, err = owl(*arguments(sparse, text_file, tmp_path / "out", *asked, "--max-steps", 1))
    assert code == 0, err
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 24, 0.25)
    assert sorted(config["target_modules"]) == ["o_proj", "up_proj"]
    shapes = {
        name.removeprefix("base_model.model.model.layers."): list(one.shape)
        for name, one in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
    }
    assert shapes["1.mlp.up_proj.lora_A.weight"] == [4, 64]
    assert {name.split(".")[2] for name in shapes} == {"o_proj", "up_proj"}


def test_a_seed_decides_the_adapter(owl, sparse, text_file, tmp_path):
    found = []
    for number, seed in enumerate((0, 0, 1)):
        output = tmp_path / str(number)
        more = ("--max-steps", 1, "--seed", seed, "--json")
        code, out, err = owl(*arguments(sparse, text_file, output, *more))
        assert code == 0, err
        weights = load_file(output / "adapter_model.safetensors")
        losses = [row["loss"] for row in json.loads(out)["finetune"]["curve"] if "loss" in row]
        found.append((weights, losses))
    (one, read), (again, read_again), (other, read_other) = found
    assert all(one[name].equal(again[name]) for name in one)
    # A, which the first step does not move, as it is drawn; and which windows are read.
    assert not any(one[name].equal(other[name]) for name in one if "lora_A" in name)
    assert read == read_again != read_other


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sequence-length", "400", "SHORT"], "needs two"),
        (["--sequence-length", "1024"], "takes 512 tokens, not 1024"),
        (["--method", "mask"], "Did you mean 'masked'?"),
        (["--merge", "all"], "Unknown merge"),
        (["--method", "masked", "--merge", "masked"], "--merge belongs to --method lora"),
        (["--method", "masked", "--rank", "4"], "--rank belongs to --method lora"),
        (["--block-group", "1"], "--block-group belongs to --method masked"),
        (["--temperature", "2"], "--temperature needs a --teacher"),
        (["--feature-weight", "1"], "--feature-weight needs a --teacher"),
        (["--teacher-top", "8"], "--teacher-top needs a --teacher"),
        (["--teacher-top", "8", "--feature-weight", "1"], "Leave one of them out"),
        (["--shard", "--teacher-top", "8"], "have to ask it together"),
        (["--shard", "--method", "masked", "--block-group", "1"], "--block-group takes some"),
        (["--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--temperature", "1e-40"], "--temperature must be at least 0.001"),
        (["--temperature", "1e40"], "--temperature must be at most 1000"),
        (["--alpha", "9" * 40], "--alpha must be at most 1e+06"),
        (["--max-minutes", "1e308"], "--max-minutes must be at most 1e+06"),
        (["--learning-rate", "nan"], "--learning-rate must be above 0"),
        (["--max-minutes", "-1"], "--max-minutes must be above 0"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--warmup", "2"], "--warmup is a share"),
        (["--text", "no.txt"], "no text file"),
        (["--target-module", "nothing"], "Unknown layer 'nothing'"),
        (["--resume"], "no interrupted run"),
    ],
)
def test_impossible_options(owl, sparse, text_file, tmp_path, options, complaint):
    short = tmp_path / "short.txt"
    short.write_text("A text that is shorter than a window.")
    text = short if "SHORT" in options else text_file
    given = [option for option in options if option != "SHORT"]
    code, _, err = owl(*arguments(sparse, text, tmp_path / "out"), *given)
    assert (code, complaint in err) == (2, True), err
    assert list(tmp_path.iterdir()) == [short]


@pytest.mark.parametrize("how", [["--method", "masked"], ["--merge", "masked"]], ids=str)
def test_a_dense_checkpoint_has_no_mask_to_keep(owl, llama, text_file, tmp_path, how):
    code, _, err = owl(*arguments(llama, text_file, tmp_path / "out"), *how)
    assert (code, "is dense" in err, " ".join(how) in err) == (2, True, True), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("group", [None, 1])
def test_a_rounded_checkpoint_keeps_zeros_and_grid(owl, llama, text_file, tmp_path, group):
    rounded, out = tmp_path / "rounded", tmp_path / "out"
    calibration = Calibration(str(text_file), samples=4, sequence_length=32)
    prune(llama, rounded, PruneSettings.checked(method="wanda", sparsity=0.5, bits=4), calibration)
    how = ["--method", "masked", "--max-steps", 4, "--learning-rate", 0.3]
    how += ["--block-group", group] if group else []
    code, _, err = owl(*arguments(rounded, text_file, out, *how))
    assert code == 0, err
    before, after = (load_file(folder / "model.safetensors") for folder in (rounded, out))
    assert (rounded / GRID).read_bytes() == (out / GRID).read_bytes()
    for name, scales in load_file(out / GRID).items():
        weight = name.removesuffix("_scale")
        wide = scales.float().repeat_interleave(32, dim=1)[:, : after[weight].shape[1]]
        integers = (after[weight] / wide).round()
        assert torch.equal(integers * wide, after[weight])
        assert -8 <= integers.min() <= integers.max() <= 7
        assert torch.equal(integers == 0, before[weight] == 0)
        assert not torch.equal(after[weight], before[weight]), name


def test_of_what_was_only_rounded_weights_come_to_zero_and_off_it(owl, llama, text_file, tmp_path):
    """And what was trained, with other zeros then, can be trained again."""
    rounded, out = tmp_path / "rounded", tmp_path / "out"
    calibration = Calibration(str(text_file), samples=4, sequence_length=32)
    prune(llama, rounded, PruneSettings.checked(method="none", bits=3), calibration)
    how = ["--method", "masked", "--max-steps", 6, "--learning-rate", 0.3]
    for folder, source in ((out, rounded), (tmp_path / "again", out)):
        code, _, err = owl(*arguments(source, text_file, folder, *how))
        assert code == 0, err
    before, after = (load_file(folder / "model.safetensors") for folder in (rounded, out))
    name = "model.layers.0.mlp.up_proj.weight"
    gone, come = (
        (a == 0) & (b != 0) for a, b in itertools.permutations((before[name], after[name]))
    )
    assert gone.any()
    assert come.any()
    blocks = read_manifest(out, CheckpointManifest).blocks
    for block in blocks:
        for linear, one in block.linears.items():
            zeros = (after[f"{block.name}.{linear}.weight"] == 0).float().mean()
            assert one.achieved == pytest.approx(float(zeros))
        total = sum(one.achieved * one.weights for one in block.linears.values())
        assert block.achieved == pytest.approx(total / block.weights)


def test_what_would_leave_the_grid_is_refused(owl, llama, text_file, tmp_path):
    rounded = tmp_path / "rounded"
    calibration = Calibration(str(text_file), samples=4, sequence_length=32)
    prune(llama, rounded, PruneSettings.checked(method="wanda", sparsity=0.5, bits=4), calibration)
    command = arguments(rounded, text_file, tmp_path / "out")
    code, _, err = owl(*command, "--merge", "masked")
    assert (code, "off their grid" in " ".join(err.split())) == (2, True)
    scales = load_file(rounded / GRID)
    name = "model.layers.0.mlp.up_proj.weight_scale"
    for wrong in (scales[name][:4], 1.1 * scales[name], torch.nan * scales[name]):
        save_file(scales | {name: wrong}, rounded / GRID, {"bits": "4", "group": "32"})
        code, _, err = owl(*command, "--method", "masked")
        assert (code, f"{name} does not fit its weight" in " ".join(err.split())) == (2, True), err
    manifest = json.loads((rounded / "owl.json").read_text())
    unknown = {"achieved": 0.0, "sparsity": 0.0, "weights": 4, "whole": True}
    manifest["blocks"][0]["linears"]["foo"] = unknown
    (rounded / "owl.json").write_text(json.dumps(manifest))
    code, _, err = owl(*command, "--method", "masked")
    assert (code, "of model.layers.0.foo, which" in " ".join(err.split())) == (2, True), err
    assert [path.name for path in tmp_path.iterdir()] == ["rounded"]


def test_a_manifest_that_tells_little_is_added_to(owl, llama, text_file, tmp_path):
    """All of them pass the schema."""
    rounded = tmp_path / "rounded"
    calibration = Calibration(str(text_file), samples=4, sequence_length=32)
    prune(llama, rounded, PruneSettings.checked(method="none", bits=4), calibration)
    manifest = json.loads((rounded / "owl.json").read_text())
    del manifest["sparsity"], manifest["weights"]
    (rounded / "owl.json").write_text(json.dumps(manifest))
    out = tmp_path / "out"
    code, _, err = owl(*arguments(rounded, text_file, out, "-m", "masked", "--max-steps", 1))
    assert code == 0, err
    assert read_manifest(out, CheckpointManifest).blocks[0].achieved > 0


def test_other_arguments_are_refused_by_name(sparse, text_file, tmp_path, monkeypatch):
    from owl_deploy.finetune import run

    values = {"sequence_length": 32, "max_steps": 2, "method": "masked"}
    with monkeypatch.context() as patched:
        patched.setattr(run.Source, "check_same_zeros", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.finetune(sparse, tmp_path / "out", str(text_file), values)
    with pytest.raises(BadInput, match=r"settings\.max_steps was 2, now 3"):
        run.finetune(
            sparse, tmp_path / "out", str(text_file), values | {"max_steps": 3}, resume=True
        )


def test_what_came_out_exports_and_is_reported(owl, sparse, text_file, tmp_path):
    command = arguments(sparse, text_file, tmp_path / "out", "--method", "masked")
    code, out, _ = owl(*command, "--max-steps", 2)
    assert (code, "masked, 2 steps" in out, " tokens/s; " in out) == (0, True, True)
    assert owl("report", tmp_path / "out", "-o", tmp_path / "page.html")[0] == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    assert "out: masked, 2 steps" in page
    code, out, err = owl("export", tmp_path / "out", "-o", tmp_path / "deployment", "--json")
    assert code == 0, err
    assert json.loads(out)["kind"] == "deployment"


def test_an_adapter_does_not_go_with_a_deployment(owl, sparse, text_file, tmp_path):
    (tmp_path / "owl.json").write_text('{"kind": "deployment"}')
    code, _, err = owl("eval", tmp_path, "-p", text_file, "--adapter", sparse)
    assert (code, "goes with a checkpoint" in err) == (2, True)
