"""llama.cpp as a target and an engine: its exports compute what PyTorch does, in every verb."""

import json
import shutil
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from owl_deploy import inference
from owl_deploy.data.calibration import Calibration
from owl_deploy.errors import EngineFailed
from owl_deploy.export.importance import importance
from owl_deploy.export.source import Source
from owl_deploy.export.targets import export
from owl_deploy.models.checkpoint import open_checkpoint
from tests import tiny

needs_engine = pytest.mark.skipif(
    not inference.is_installed("llama.cpp"), reason="owl engines install llama.cpp"
)


@pytest.fixture(scope="module")
def deployments(llama, tmp_path_factory):
    """The tiny model in 8 and in 4 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    for precision in ("Q8_0", "Q4_0"):
        export(llama, folder / precision, target="llama.cpp", precision=precision)
    return folder


def test_without_the_engine_the_export_says_how_to_get_it(owl, llama, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    code, _, said = owl("export", llama, "-o", tmp_path / "out", "-t", "llama.cpp")
    assert (code, "Run: owl engines install llama.cpp" in said) == (4, True)
    assert not (tmp_path / "out").exists()


def test_another_targets_precision(owl, llama, tmp_path):
    code, _, said = owl("export", llama, "-o", tmp_path / "out", "-t", "llama.cpp", "-p", "int8")
    assert code == 2
    types = "Q8_0, Q4_K_M, Q4_0, IQ4_XS, Q3_K_M, IQ3_M, Q2_K, IQ2_M"
    assert f"{types}; --target onnxruntime or owl has int8" in " ".join(said.split())


def test_text_that_nothing_asks_for_and_none_where_it_is_needed(owl, llama, text_file, tmp_path):
    code, _, said = owl("export", llama, "-o", tmp_path / "out", "-t", "owl", "-c", text_file)
    assert (code, "Only an export to llama.cpp rounds by calibration" in said) == (2, True)
    code, _, said = owl("export", llama, "-o", tmp_path / "out", "-t", "llama.cpp", "-p", "iq2_m")
    assert (code, "Give one with --calibration" in " ".join(said.split())) == (2, True)


@needs_engine
def test_too_short_a_text_is_refused_before_any_work(owl, llama, text_file, tmp_path):
    export = ("export", llama, "-o", tmp_path / "out", "-t", "llama.cpp", "-p", "IQ2_M")
    code, _, said = owl(*export, "-c", text_file, "--samples", 99999)
    assert (code, "Give a longer text" in " ".join(said.split())) == (2, True)
    assert "Converting" not in said
    assert not (tmp_path / "out").exists()


def test_the_converter_runs_no_code_of_a_model(llama, tmp_path):
    """Some of its families ask transformers for just that."""
    folder = shutil.copytree(llama, tmp_path / "model")
    ran = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    named = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    read = "import sys, transformers; from owl_deploy.export import to_gguf; {}\n"
    read += "transformers.AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)"
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PATH": "/usr/bin:/bin"}
    for guard, runs in (("to_gguf.refuse_code()", False), ("", True)):
        command = [sys.executable, "-c", read.format(guard), str(folder)]
        subprocess.run(command, env=environment, capture_output=True, check=False)
        assert ran.exists() == runs


@needs_engine
@pytest.mark.parametrize("precision", ["Q8_0", "Q4_0"])
def test_what_is_exported(owl, llama, deployments, precision):
    folder = deployments / precision
    manifest = json.loads((folder / "owl.json").read_text())
    assert (manifest["target"], manifest["precision"]) == ("llama.cpp", precision)
    assert manifest["converter_difference"] < 5e-3
    assert manifest["parity"]["relative_difference"] > manifest["converter_difference"]
    assert list(manifest["parity"]["runs"]) == ["llama.cpp reading", "llama.cpp generating"]
    assert {"model.gguf", "config.json", "tokenizer.json"} <= set(manifest["files"])
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "owl.json"}
    opened = inference.open_deployment(folder)
    assert (opened.vocab, opened.max_context, opened.zeros) == (320, 512, None)
    assert opened.size_bytes == (folder / "model.gguf").stat().st_size


def read(file):
    """The matrices of a GGUF, as they compute."""
    return {
        tensor.name: dequantize(tensor.data, tensor.tensor_type)
        for tensor in GGUFReader(file).tensors
        if len(tensor.shape) == 2
    }


@needs_engine
def test_what_counts_on_a_text_is_rounded_most_exactly(llama, deployments, text_file, tmp_path):
    calibration = Calibration(text_file, samples=4, sequence_length=64)
    made = export(
        llama, tmp_path / "out", target="llama.cpp", precision="Q4_0", calibration=calibration
    ).to_json()
    checkpoint = open_checkpoint(llama)
    windows = calibration.windows(checkpoint)
    assert made["calibration"] == calibration.describe(windows)
    weights = importance(checkpoint, windows, tmp_path, print)
    export(llama, tmp_path / "full", target="llama.cpp", precision="Q8_0")
    files = tmp_path / "full", deployments / "Q4_0", tmp_path / "out"
    exact, plain, weighed = (read(folder / "model.gguf") for folder in files)
    for block in range(2):
        for name, other in (("attn_output", "self_attn.o_proj"), ("ffn_up", "mlp.up_proj")):
            counts = weights[f"model.layers.{block}.{other}.weight"]
            was, now = (
                (
                    np.square(
                        one[f"blk.{block}.{name}.weight"] - exact[f"blk.{block}.{name}.weight"]
                    )
                    * counts
                ).sum()
                for one in (plain, weighed)
            )
            assert now < 0.99 * was


@needs_engine
def test_its_notes(deployments):
    """The tiny model's rows are no multiple of a block, and nobody else has its tokenizer."""
    note = json.loads((deployments / "Q8_0" / "owl.json").read_text())["note"]
    assert "does not know its tokenizer" in note
    assert "2 of 20 tensors are held in a wider type than Q8_0" in note


@needs_engine
def test_the_driver_computes_the_same_in_every_way(llama, deployments, tmp_path):
    reference = Source(llama).reference
    prompt, after, file = reference.prompt, len(reference.prompt) - 1, tmp_path / "logits.npy"
    options = {"context": 512, "all_logits": True, "batch": 2, "streams": 2}
    with inference.EngineProcess("llama.cpp", deployments / "Q8_0", **options) as process:
        assert process.loaded["version"] == inference.environment.installed_version("llama.cpp")
        process.request("greedy", tokens=prompt, count=1, prompt_logits_file=str(file))
        whole = np.load(file)
        steps = process.request("greedy", tokens=prompt, count=8, logits_file=str(file))
        first = np.load(file)
        # All at once and one at a time, within the rounding of a cache in fp16.
        np.testing.assert_allclose(first[0], whole[-1], atol=2e-3)
        assert np.abs(first[0] - reference.logits[after]).max() < 0.1
        long = process.request("greedy", tokens=steps["tokens"][-1:], count=2, fresh=False)
        again = process.request("greedy", tokens=prompt, count=9)
        assert steps["tokens"] + long["tokens"][:1] == again["tokens"]
        targets = [reference.greedy[:3], [5, 6], [5]]
        both = process.request("continuations", context=prompt, targets=targets)
        alone = [process.request("continuations", context=prompt, targets=[t]) for t in targets]
        for mine, other in zip(both["logprobs"], alone, strict=True):
            np.testing.assert_allclose(mine, other["logprobs"][0], atol=2e-3)
        timed = process.request("throughput", prompt=prompt, steps=4, repeats=2, warmup=1)
        assert len(timed["latencies_ms"]) == 2


@needs_engine
def test_a_full_cache_and_a_long_prompt(tmp_path):
    model = tiny.write_llama(tmp_path / "model", max_position_embeddings=2048)
    export(model, tmp_path / "out", target="llama.cpp")
    with inference.EngineProcess("llama.cpp", tmp_path / "out", context=1024) as process:
        prompt = [(7 * place) % 320 for place in range(1000)]  # more than one part
        process.request("greedy", tokens=prompt, count=24)
        with pytest.raises(EngineFailed, match="the cache is full"):
            process.request("greedy", tokens=prompt * 2, count=1)
        assert process.request("decode", prompt=[1, 2], steps=2, warmup=0)["latencies_ms"]


@needs_engine
def test_perplexity_and_generation(owl, llama, deployments, text_file):
    values = []
    for folder in (llama, deployments / "Q8_0"):
        options = ("--window", 64, "--windows", 2, "--json")
        code, out, err = owl("eval", folder, "--perplexity", text_file, *options)
        assert code == 0, err
        values.append(json.loads(out)["value"])
    assert values[1] == pytest.approx(values[0], rel=0.02)
    code, out, err = owl("generate", deployments / "Q8_0", "The river ran", "-n", 8)
    assert (code, bool(out.strip())) == (0, True), err
    code, _, err = owl("generate", deployments / "Q8_0", "The river ran", "--do-sample")
    assert (code, "takes the likeliest token only" in " ".join(err.split())) == (2, True)
    code, _, err = owl("generate", deployments / "Q8_0", "The river ran", "-n", 600)
    assert (code, "more than the 512" in " ".join(err.split())) == (2, True)


@needs_engine
def test_bench_and_report(owl, deployments, tmp_path):
    bench = ("bench", deployments / "Q4_0", "--baseline", deployments / "Q8_0", "--pairs", 2)
    code, out, err = owl(*bench, "--context", 64, "--prompt", 16, "-o", tmp_path / "result")
    assert (code, "llama.cpp" in out) == (0, True), err
    assert owl("report", tmp_path / "result", "-o", tmp_path / "report.html")[0] == 0
    page = (tmp_path / "report.html").read_text()
    assert "--llama-cpp: #" in page
    assert "var(--llama-cpp)" in page


@needs_engine
def test_its_server_answers_several_at_once(owl, deployments, tmp_path):
    bench = ("bench", deployments / "Q4_0", "--baseline", deployments / "Q8_0", "--pairs", 1)
    code, out, err = owl(*bench, "--scenario", "requests@40+8x3", "--json")
    assert code == 0, err
    for subject in json.loads(out)["subjects"]:
        (sample,) = subject["samples"]
        assert 0 < len(sample["latencies_ms"]["requests@40+8x3:first"]) <= 15
    with inference.ServerProcess("llama.cpp", deployments / "Q8_0", rows=2, context=64) as server:
        body = {"prompt": "The river ran", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        request = urllib.request.Request(f"{server.url}/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request) as answer:
            usage = json.load(answer)["usage"]
    assert usage["completion_tokens"] == 12


@needs_engine
def test_another_file_is_refused(owl, deployments, text_file, tmp_path):
    folder = shutil.copytree(deployments / "Q8_0", tmp_path / "copy")
    assert owl("verify", folder)[0] == 0
    shutil.copyfile(deployments / "Q4_0" / "model.gguf", folder / "model.gguf")
    assert owl("verify", folder)[0] == 1
    code, _, err = owl("eval", folder, "--perplexity", text_file, "--windows", 1)
    assert (code, "model.gguf is damaged, or was changed" in " ".join(err.split())) == (2, True)
    (folder / "model.gguf").unlink()
    assert owl("eval", folder, "--perplexity", text_file, "--windows", 1)[0] == 2


@needs_engine
def test_a_file_that_is_no_gguf_ends_in_a_sentence(owl, deployments, tmp_path):
    folder = shutil.copytree(deployments / "Q8_0", tmp_path / "copy")
    (folder / "owl.json").unlink()  # a stranger's folder, with nothing to compare with
    (folder / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    code, _, err = owl("generate", folder, "The river", "-n", -1)
    assert (code, "llama.cpp cannot open" in " ".join(err.split())) == (4, True)


_GEMMA = {"num_hidden_layers": 6, "layer_types": 5 * ["sliding_attention"] + ["full_attention"]}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What is special about a family's model, the exit code, and what is said.
FAMILIES = {
    "llama, untied": ("llama", {"tie_word_embeddings": False}, 0, "parity"),
    "mistral": ("mistral", {"sliding_window": None}, 0, "parity"),
    # Longer than the text that the comparison reads.
    "mistral, window": ("mistral", {"sliding_window": 256}, 2, "sliding window of 256 tokens"),
    "mistral, wide": ("mistral", {"sliding_window": 512}, 0, "parity"),  # as its positions
    "qwen2, scaled": ("qwen2", {"rope_parameters": _LLAMA3}, 2, "the RoPE scaling 'llama3'"),
    "llama, scaled": ("llama", {"rope_parameters": _LLAMA3}, 0, "parity"),
    "qwen2": ("qwen2", {"vocab_size": 336}, 0, "parity"),  # with what its tokenizer adds
    "qwen3": ("qwen3", {}, 0, "parity"),
    "gemma3": ("gemma3_text", _GEMMA, 0, "parity"),
    "gemma3, other pattern": ("gemma3_text", {}, 2, "sliding window of 24 tokens"),
    "phi3": ("phi3", {}, 2, "needs tokenizer.model, which the checkpoint lacks"),
    "gpt_neox": ("gpt_neox", {}, 0, "parity"),
    "opt": ("opt", {}, 2, "does not know 'OPTForCausalLM'"),
}


@needs_engine
@pytest.mark.parametrize("case", FAMILIES)
def test_each_family_computes_the_same_or_is_refused(owl, text_file, tmp_path, case):
    family, changes, ends, says = FAMILIES[case]
    model = tiny.write_model(family, tmp_path / "model", **changes)
    weighed = ("-c", text_file, "--samples", 2, "--sequence-length", 32)
    code, out, err = owl("export", model, "-o", tmp_path / "out", "-t", "llama.cpp", *weighed)
    assert (code, says in " ".join((out + err).split())) == (ends, True), err
    assert (tmp_path / "out").exists() == (code == 0)


@needs_engine
def test_a_tokenizer_with_more_tokens_than_the_model(owl, llama, tmp_path):
    folder = shutil.copytree(llama, tmp_path / "model")
    tiny.write_tokenizer(folder, 336)
    code, _, said = owl("export", folder, "-o", tmp_path / "out", "-t", "llama.cpp")
    assert code == 2
    assert "has 336 tokens, and the model 320" in " ".join(said.split())


@needs_engine
def test_without_a_tokenizer(owl, llama, tmp_path):
    model = shutil.copytree(llama, tmp_path / "model")
    for path in model.glob("tokenizer*"):
        path.unlink()
    code, _, err = owl("export", model, "-o", tmp_path / "out", "-t", "llama.cpp")
    assert (code, "has no tokenizer, which a GGUF holds" in " ".join(err.split())) == (2, True)
