"""`owl export` as a user runs it: both targets on a real chain, in the real engines."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime_genai
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from owl_deploy import inference
from owl_deploy.errors import EnvironmentFailed
from owl_deploy.export import genai, parity, tables
from owl_deploy.export.source import Source
from owl_deploy.export.targets import TARGETS, Precision, export
from owl_deploy.inference import writer
from owl_deploy.inference.drivers import onnxruntime as driver
from owl_deploy.runtime import LIBRARY_NAME, library_path
from owl_deploy.utils import artefact
from tests import tiny

DEEPSPARSE = inference.is_installed("deepsparse")


def operators_missing() -> str:
    """Why nothing can be exported to `owl` here; empty if it can."""
    try:
        library_path()
    except EnvironmentFailed as error:
        return str(error)
    return ""


needs_operators = pytest.mark.skipif(bool(operators_missing()), reason=operators_missing())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_deepsparse(owl, tmp_path, tied):
    checkpoint = tiny.write_llama(tmp_path / "model", tie_word_embeddings=tied)
    code, out, err = owl("export", checkpoint, "-o", tmp_path / "out", "-t", "deepsparse")
    assert code == 0, err
    assert "parity" in out
    table = [line for line in out.splitlines() if str(tmp_path) not in line]
    assert max(map(len, table)) <= 80
    manifest = json.loads((tmp_path / "out" / artefact.MANIFEST).read_text())
    assert (manifest["kind"], manifest["target"], manifest["opset"]) == (
        "deployment",
        "deepsparse",
        14,
    )
    runs = manifest["parity"]["runs"]
    assert ("deepsparse generating" in runs) == DEEPSPARSE
    assert all(run["relative_difference"] < 1e-5 for run in runs.values())
    assert manifest["parity"]["equal_greedy_tokens"] == 1.0
    assert sum(manifest["nodes"].values()) > 50
    assert manifest["source"]["path"] == str(checkpoint)
    for name, row in manifest["files"].items():
        assert artefact.sha256(tmp_path / "out" / name) == row["sha256"]
    assert {"model.onnx", "config.json", "tokenizer.json"} <= set(manifest["files"])


@pytest.mark.skipif(not DEEPSPARSE, reason="owl engines install deepsparse")
def test_deepsparse_agrees_over_greedy_tokens_with_its_internal_cache(owl, tmp_path):
    checkpoint = tiny.write_llama(tmp_path / "model")
    assert owl("export", checkpoint, "-o", tmp_path / "out", "-t", "deepsparse")[0] == 0
    reference = Source(checkpoint).reference
    with inference.EngineProcess("deepsparse", tmp_path / "out", context=256) as process:
        logits_file = tmp_path / "logits.npy"
        answer = process.request(
            "greedy", tokens=reference.prompt, count=32, logits_file=str(logits_file)
        )
    assert answer["tokens"] == reference.greedy
    wanted = reference.logits[len(reference.prompt) - 1 :]
    assert np.abs(np.load(logits_file) - wanted).max() < 1e-3 * np.abs(wanted).max()


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_onnxruntime(owl, llama, tmp_path, precision):
    out = tmp_path / "out"
    code, text, err = owl("export", llama, "-o", out, "-p", precision, "--json")
    assert code == 0, err
    manifest = json.loads(text)
    assert manifest == json.loads((out / artefact.MANIFEST).read_text())
    assert manifest["precision"] == precision
    parity = manifest["parity"]
    assert "onnxruntime generating" in parity["runs"]
    if precision == "fp32":
        assert parity["relative_difference"] < 1e-5
        assert parity["equal_generated_tokens"] == 1.0
        assert manifest["quantization"] is None
        assert "GroupQueryAttention" in manifest["nodes"]
    else:
        assert parity["tolerance"] is None
        assert 1e-5 < parity["relative_difference"] < 1
        assert manifest["quantization"]["bits"] == int(precision.removeprefix("int"))
    _generates(out)


def test_keys_that_the_builder_alone_would_read(owl, tmp_path, monkeypatch):
    """Caps of logits, a second length of the context, and a padding that is no token."""
    caps = {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.5}
    model = tiny.write_llama(tmp_path / "model", **caps, seq_length=9999)
    (model / "generation_config.json").write_text('{"eos_token_id": [1], "pad_token_id": 32000}')
    manifest = export(model, tmp_path / "out", target="onnxruntime", precision="fp32")
    assert manifest.to_json()["parity"]["relative_difference"] < 1e-5
    assert manifest.max_context == 512
    assert 0 <= driver.pad_of(tmp_path / "out") < 320

    row = TARGETS["onnxruntime"]
    strict = replace(row, precisions={"int8": Precision(1.2, usual=1e-6)})
    monkeypatch.setitem(TARGETS, "onnxruntime", strict)
    told = ("export", model, "-o", tmp_path / "int8", "-t", "onnxruntime", "-p", "int8")
    code, out, _ = owl(*told)
    assert (code, "more than 8 bits explain" in " ".join(out.split())) == (0, True)


def test_int4_of_rows_with_an_odd_number_of_groups(tmp_path):
    model = tiny.write_llama(tmp_path / "model", intermediate_size=96)
    manifest = export(model, tmp_path / "out", target="onnxruntime", precision="int4").to_json()
    assert manifest["quantization"]["bits"] == 4
    assert manifest["note"].startswith("rtn_last in the place of k_quant_mixed")
    assert manifest["parity"]["relative_difference"] < 0.5
    _generates(tmp_path / "out")


@pytest.mark.parametrize("target", ["onnxruntime", "owl"])
def test_weights_of_more_bits_than_their_config_says(target, tmp_path):
    model = tiny.write_llama(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    save_file({name: 1.001 * one for name, one in weights.items()}, model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    manifest = export(model, tmp_path / "out", target=target, precision="fp32")
    assert manifest.to_json()["parity"]["relative_difference"] < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_norms_in_half_precision_to_which_the_builder_adds(dtype, tmp_path):
    model = tiny.write_model("gemma3_text", tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    weights = load_file(model / "model.safetensors")
    for name, one in weights.items():
        drawn = 1 + 0.3 * torch.randn(one.shape, generator=generator)
        weights[name] = (drawn if "norm" in name else one).bfloat16()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": dtype}))
    manifest = export(model, tmp_path / "out", target="onnxruntime", precision="fp32")
    assert manifest.to_json()["parity"]["relative_difference"] < 1e-5


THETA = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 32} | THETA
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
} | THETA
# name: the family, and how its rotary tables are scaled.
SCALED = {
    "llama, linear": ("llama", {"rope_type": "linear", "factor": 4.0} | THETA),
    "llama, yarn": ("llama", YARN),
    "llama, yarn with betas": (
        "llama",
        YARN | {"beta_fast": 8.0, "beta_slow": 1.0, "attention_factor": 1.2},
    ),
    "qwen2, yarn": ("qwen2", YARN | {"beta_fast": 8.0, "beta_slow": 1.0}),
    "gemma3, linear": (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default"} | THETA,
        },
    ),
    "phi3, longrope": ("phi3", tiny.LONG_ROPE | {"attention_factor": 1.25}),
    "llama, llama3": ("llama", LLAMA3),
    "qwen2, llama3": ("qwen2", LLAMA3),
    "llama, dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0} | THETA),
}
QUICK = set(SCALED) - {"phi3, longrope", "qwen2, llama3", "llama, dynamic"}
# Integers have no bound to their difference from PyTorch, and are held to one here.
QUICK_INTEGERS = {"owl": ["gemma3, linear"], "onnxruntime": ["llama, linear"]}


def write_scaled(name: str, folder: Path) -> Path:
    family, ropes = SCALED[name]
    original = {"original_max_position_embeddings": 256} if family == "phi3" else {}
    return tiny.write_model(family, folder, rope_parameters=ropes, **original)


def late_difference(checkpoint: Path, deployment: Path) -> float:
    """From PyTorch, over the largest logit, of the last 100 of 500 tokens; parity has 96."""
    tokens = [(7 + 13 * index) % 320 for index in range(500)]
    with torch.inference_mode():
        wanted = Source(checkpoint).model(torch.tensor([tokens])).logits[0].numpy()
    found = parity.Session(deployment).step(tokens)
    return float(np.abs(found - wanted)[-100:].max() / np.abs(wanted).max())


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in SCALED],
)
def test_scaled_positions(name, tmp_path):
    checkpoint = write_scaled(name, tmp_path / "model")
    manifest = export(checkpoint, tmp_path / "out", target="onnxruntime").to_json()
    assert manifest["opens_in_genai"]
    assert manifest["parity"]["relative_difference"] < 1e-5
    assert late_difference(checkpoint, tmp_path / "out") < 1e-4


@pytest.mark.parametrize(
    ("name", "target"),
    [
        pytest.param(
            name,
            target,
            marks=[
                *([] if name in quick else [pytest.mark.slow]),
                *([needs_operators] if target == "owl" else []),
            ],
        )
        for target, quick in QUICK_INTEGERS.items()
        for name in SCALED
    ],
)
def test_scaled_positions_in_integers(name, target, tmp_path):
    checkpoint = write_scaled(name, tmp_path / "model")
    out = tmp_path / "out"
    manifest = export(checkpoint, out, target=target, precision="int8").to_json()
    assert manifest["parity"]["relative_difference"] < 0.1  # wrong tables: 0.6 and more
    assert late_difference(checkpoint, out) < 0.1
    assert len(tables._tables(out)) == (4 if SCALED[name][0] in ("gemma3_text", "phi3") else 2)


def test_what_the_builder_scales_wrongly_is_not_written(owl, tmp_path, monkeypatch):
    """Nor in integers, of which the logits tell nothing."""
    script, call = genai._BUILDER.read_text(), "        give_tables(config, builder)\n"
    assert call in script
    (tmp_path / "builder.py").write_text(script.replace(call, "        pass\n"))
    monkeypatch.setattr(genai, "_BUILDER", tmp_path / "builder.py")
    checkpoint = write_scaled("llama, linear", tmp_path / "model")
    code, out, err = owl("export", checkpoint, "-o", tmp_path / "out", "-p", "int8")
    assert (code, out) == (1, "")
    assert "The graph's rotary table cos_cache is not the model's from position 1 on." in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["onnxruntime", pytest.param("owl", marks=needs_operators)])
def test_a_longrope_prompt_is_run_in_one_go(target, tmp_path, monkeypatch):
    """In parts the first keys would be rotated by the tables for short texts, the others not."""
    checkpoint = write_scaled("phi3, longrope", tmp_path / "model")
    deployment = tmp_path / "out"
    export(checkpoint, deployment, target=target)
    assert "chunk_size" not in json.loads((deployment / "genai_config.json").read_text())["search"]
    tokens = [(7 + 13 * index) % 320 for index in range(400)]  # the original context has 256
    wanted = parity.Session(deployment).step(tokens)[-1]
    library = str(deployment / LIBRARY_NAME) if target == "owl" else ""
    model = driver.open_genai(str(deployment), 1, library, takes_turns=True)
    whole = driver.runs_whole(deployment)
    found = driver.Rows(model, 401, 0, whole=whole).run(tokens)[-1]
    in_parts = driver.Rows(model, 401, 0, whole=False).run(tokens)[-1]
    opened = driver.open_session(deployment, 1, library)
    session = driver.Session(opened, 1, driver.decoder_config(deployment)["head_size"], whole=whole)
    monkeypatch.setattr(driver, "PART", 128)
    (scored,) = session.logits(tokens)
    assert np.abs(scored[-1] - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert whole
    opened = inference.open_deployment(deployment)
    assert isinstance(writer.open_writer(opened, 1, batch=8), writer.OneByOne)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
    assert np.abs(in_parts - wanted).max() > 1e-3 * np.abs(wanted).max()


def test_longrope_in_a_family_whose_graph_has_one_table(owl, tmp_path):
    checkpoint = tiny.write_llama(tmp_path / "model", rope_parameters=tiny.LONG_ROPE)
    code, out, err = owl("export", checkpoint, "-o", tmp_path / "out", "-p", "int8")
    refused = "does not know 'llama' with 'longrope' rotary scaling, so there is no int8 for it."
    assert (code, out, refused in err) == (2, "", True), err
    assert not (tmp_path / "out").exists()


def _generates(deployment):
    """The folder opens in stock onnxruntime-genai, tokenizer and all."""
    model = onnxruntime_genai.Model(str(deployment))
    tokenizer = onnxruntime_genai.Tokenizer(model)
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=24, min_length=24)
    generator = onnxruntime_genai.Generator(model, parameters)
    prompt = tokenizer.encode("The river ran past the mill")
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    assert len(generator.get_sequence(0)) == 24


def test_sparsity_of_what_was_exported(owl, llama, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    options = ["--calibration", text_file, "--samples", 2, "--sequence-length", 64]
    assert owl("prune", llama, "-o", pruned, "--sparsity", 0.7, *options)[0] == 0
    code, text, err = owl("export", pruned, "-o", tmp_path / "out", "-t", "deepsparse", "--json")
    assert code == 0, err
    manifest = json.loads(text)
    blocks = [row for name, row in manifest["weights"].items() if "layers" in name]
    zeros = 1 - sum(row["nonzeros"] for row in blocks) / sum(row["values"] for row in blocks)
    assert zeros == pytest.approx(0.7, abs=1e-3)
    assert manifest["source"]["manifest"]["kind"] == "checkpoint"
    told = json.loads((pruned / artefact.MANIFEST).read_text())["blocks"]
    short = ("name", "achieved", "sparsity", "outlier_ratio")
    assert manifest["source"]["blocks"] == [{key: one[key] for key in short} for one in told]


def lose_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def lose_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize("target", ["deepsparse", "onnxruntime"])
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (shutil.rmtree, "There is no model folder"),
        (empty, "is missing"),
        (tiny.truncate, "is corrupt"),
        (tiny.poison, "holds NaN or infinity"),
        (lose_tensor, "lacks 1 tensors"),
        (change_config(hidden_size=32), "config.json"),
        (change_config(model_type="bloom"), "Unknown model family 'bloom'"),
        (change_config(num_local_experts=8), "mixture of experts"),
        (change_config(architectures=["LlamaModel"]), "is no causal language model"),
        (change_config(quantization_config={"quant_method": "gptq"}), "is quantized"),
    ],
)
def test_a_broken_checkpoint(owl, llama, tmp_path, damage, complaint, target):
    folder = shutil.copytree(llama, tmp_path / "damaged")
    damage(folder)
    before = sorted(tmp_path.iterdir())
    code, out, err = owl("export", folder, "-o", tmp_path / "out", "-t", target)
    assert (code, complaint in err) == (2, True), err
    assert out == ""
    assert len([line for line in err.splitlines() if line.startswith("owl: ")]) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_without_a_tokenizer(owl, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    lose_tokenizer(folder)
    code, _, err = owl("export", folder, "-o", tmp_path / "out", "-t", "onnxruntime")
    assert (code, "has no tokenizer" in err) == (2, True)
    assert owl("export", folder, "-o", tmp_path / "out", "-t", "deepsparse")[0] == 0


@pytest.mark.parametrize(
    ("told", "complaint"),
    [
        ('{"do_sample": true, "temperature": -1.0}', "has a sampling that is none (--temperature"),
        ("{", "generation_config.json is not valid JSON"),
    ],
)
def test_a_sampling_that_is_none(owl, llama, tmp_path, told, complaint):
    """Hours of a large model's export would end in a deployment that nothing opens."""
    folder = shutil.copytree(llama, tmp_path / "model")
    (folder / "generation_config.json").write_text(told)
    code, _, err = owl("export", folder, "-o", tmp_path / "out", "-t", "onnxruntime")
    assert (code, complaint in err) == (2, True), err


def test_an_existing_folder(owl, llama, tmp_path):
    command = ["export", llama, "-o", tmp_path / "out", "-t", "deepsparse"]
    assert owl(*command)[0] == 0
    before = (tmp_path / "out" / "owl.json").read_text()
    code, _, err = owl(*command)
    assert (code, "exists already. Use --force" in err) == (2, True)
    assert (tmp_path / "out" / "owl.json").read_text() == before
    (tmp_path / "out" / "of the old one").touch()  # two exports can have equal manifests
    assert owl(*command, "--force")[0] == 0
    assert not (tmp_path / "out" / "of the old one").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("target", "reached"),
    [
        ("deepsparse", "model.onnx*"),
        ("onnxruntime", "model.onnx*"),
        pytest.param("owl", "genai_config.json", marks=needs_operators),
    ],
)
def test_a_kill_leaves_nothing_that_looks_finished(llama, tmp_path, target, reached):
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    elsewhere.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "owl_deploy", "export", llama, "-o", tmp_path / "out", "-t", target],
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TMPDIR": str(elsewhere)},
    )
    deadline = time.monotonic() + 500  # it takes ten seconds where nothing else runs
    while not list(tmp_path.glob(f".out.owl-tmp-*/{reached}")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert not any(artefact.is_artefact(path) for path in tmp_path.iterdir())
    while _mention(tmp_path):  # the builder's process ends with its parent
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again = [sys.executable, "-m", "owl_deploy", "export", llama, "-o", tmp_path / "out"]
    subprocess.run([*again, "-t", target], check=True, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list(elsewhere.glob("[!.]*")) == []  # a hidden one is ONNX Runtime's own
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


def _mention(folder: Path) -> list[int]:
    """The processes whose command line names a path in `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or []):
            found.append(process.pid)
    return found
