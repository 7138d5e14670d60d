"""The open sparse engine, whole: prune, export --target owl, run in stock onnxruntime-genai."""

import contextlib
import json
import threading

import numpy as np
import onnx
import onnxruntime_genai
import pytest

from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.evaluate.perplexity import checkpoint_perplexity, deployment_perplexity
from owl_deploy.evaluate.run import evaluate
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.export import targets
from owl_deploy.export.parity import Session
from owl_deploy.export.source import Source
from owl_deploy.export.targets import export
from owl_deploy.inference import EngineProcess, open_deployment
from owl_deploy.inference.drivers import onnxruntime as driver
from owl_deploy.inference.generate import generate
from owl_deploy.inference.rows import Speed
from owl_deploy.inference.sampling import Sampling
from owl_deploy.models.measurements import measurement
from owl_deploy.runtime import library_path
from owl_deploy.runtime.native import Library
from tests import tiny

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory, text_file):
    folder = tmp_path_factory.mktemp("owl")
    model = tiny.write_llama(
        folder / "dense", hidden_size=128, intermediate_size=336, num_hidden_layers=3
    )
    calibration = Calibration(str(text_file), samples=4, sequence_length=64)
    prune(model, folder / "sparse", PruneSettings.checked(sparsity=0.6), calibration)
    return folder / "sparse"


@pytest.mark.parametrize(
    ("precision", "logits", "quality"),
    [("fp32", 1e-3, 1e-4), ("bf16", 2e-2, 2e-3), ("int8", 1, 1e-2)],
)
def test_the_deployment_computes_what_the_checkpoint_does(
    pruned, text_file, tmp_path, precision, logits, quality
):
    manifest = export(pruned, tmp_path / "out", target="owl", precision=precision).to_json()
    assert manifest["precision"] == precision
    assert "values" not in manifest.keys() | manifest["packing"].keys()
    assert open_deployment(tmp_path / "out").precision == precision
    assert manifest["parity"]["relative_difference"] <= logits
    if precision == "fp32":
        assert manifest["parity"]["equal_greedy_tokens"] == 1
        assert manifest["parity"]["equal_generated_tokens"] == 1
    blocks = json.loads((pruned / "owl.json").read_text())
    kept = blocks["weights"] * (1 - blocks["sparsity"]["achieved"])
    head = 320 * 128
    assert manifest["nonzeros"] == pytest.approx(kept + head, rel=0.02)  # rounding adds zeros

    text = str(text_file)
    dense = checkpoint_perplexity(pruned, EvaluationSettings(text, window=128, windows=8))
    found = deployment_perplexity(tmp_path / "out", EvaluationSettings(text, window=128, windows=8))
    assert found.value == pytest.approx(dense.value, rel=quality)
    recorded = measurement(tmp_path / "out", "perplexity")
    assert recorded["value"] == found.value


@pytest.fixture(
    params=[(4, 0.0), (4, 0.5), (3, 0.0), (3, 0.5)],
    ids=["int4", "int4-sparse", "int3", "int3-sparse"],
)
def rounded(request, tmp_path):
    """A checkpoint whose weights lie on a grid of few bits beside it, and the type of these."""
    bits, sparsity = request.param
    folder = tiny.write_llama(
        tmp_path / "rounded", hidden_size=128, intermediate_size=336, num_hidden_layers=3
    )
    tiny.round_to_grid(folder, bits, 64, sparsity)
    return folder, f"int{bits}"


def test_what_the_builder_cuts_up_keeps_its_grid(tmp_path):
    """Phi-3's gate and up are one Linear; its q, k and v too, which the builder leaves joined."""
    folder = tiny.write_model("phi3", tmp_path / "model", hidden_size=128, intermediate_size=192)
    tiny.round_to_grid(folder, 4, 64, 0.0)
    packing = export(folder, tmp_path / "out", target="owl", precision="int4").to_json()["packing"]
    assert packing["weights_on_grid"] == 2 * 4


def test_few_bits_on_a_grid_are_what_the_checkpoint_holds(rounded, text_file, tmp_path):
    """The same logits as int8 with this grid; those differ from fp32 by the activations alone."""
    rounded, narrow = rounded
    manifests = {
        precision: export(
            rounded, tmp_path / precision, target="owl", precision=precision
        ).to_json()
        for precision in (narrow, "int8", "fp32")
    }
    few, eight = manifests[narrow], manifests["int8"]
    assert "note" not in few
    assert few["packing"]["weights_on_grid"] == eight["packing"]["weights_on_grid"] == 12
    assert manifests["fp32"]["packing"]["weights_on_grid"] == 0
    assert few["nonzeros"] == eight["nonzeros"] == pytest.approx(manifests["fp32"]["nonzeros"])
    sessions = {precision: Session(tmp_path / precision) for precision in manifests}
    tokens = [3 + n * 7 % 300 for n in range(40)]
    logits = {precision: session.step(tokens) for precision, session in sessions.items()}
    size = np.abs(logits["fp32"]).max()
    assert np.abs(logits[narrow] - logits["int8"]).max() <= 1e-5 * size
    assert np.abs(logits[narrow] - logits["fp32"]).mean() <= 2e-2 * size

    text = str(text_file)
    dense = checkpoint_perplexity(rounded, EvaluationSettings(text, window=128, windows=8))
    found = deployment_perplexity(
        tmp_path / narrow, EvaluationSettings(text, window=128, windows=8)
    )
    assert found.value == pytest.approx(dense.value, rel=5e-3)
    pieces = list(generate(tmp_path / narrow, "The river ran", Sampling(max_new_tokens=8), Speed()))
    assert 1 <= len(pieces) <= 8


def data(folder):
    """The bytes of a deployment's weights and tables, without what lies between them."""
    tensors = onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return sum(int(entry.value) for entry in entries if entry.key == "length")


# q, k and v without biases, with, and taken apart for norms.
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_budget_is_what_the_deployment_holds(family, text_file, tmp_path, monkeypatch):
    """Each Linear in its own format, q, k and v apart; the logits are those of int8 on the grid."""
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 3}
    # Tied, for a table of its own would be in the precision that is asked for.
    model = tiny.write_model(family, tmp_path / "dense", **sizes, tie_word_embeddings=True)
    calibration = Calibration(str(text_file), samples=4, sequence_length=64)
    settings = PruneSettings.checked(budget="380kB", skip=("lm_head",))
    prune(model, tmp_path / "mixed", settings, calibration)
    manifests = {
        precision: export(
            tmp_path / "mixed", tmp_path / precision, target="owl", precision=precision
        ).to_json()
        for precision in ("int4", "int8")
    }
    four, eight = (manifests[precision]["packing"] for precision in ("int4", "int8"))
    split = four["replaced"]["split_attention"]
    assert split > 0
    assert four["weights_on_grid"] == 12 + 2 * split
    assert four["replaced"]["fuse_norms"] == eight["replaced"]["fuse_norms"]
    assert 360e3 < data(tmp_path / "int4") < 380e3
    tokens = [3 + n * 7 % 300 for n in range(40)]
    mixed, whole = (Session(tmp_path / precision).step(tokens) for precision in manifests)
    assert np.abs(mixed - whole).max() <= 1e-5 * np.abs(whole).max()


def test_a_budget_in_bytes_counts_a_table_of_its_own(text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    sizes = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 3}
    model = tiny.write_model("qwen2", tmp_path / "dense", **sizes)
    calibration = Calibration(str(text_file), samples=4, sequence_length=64)
    prune(model, tmp_path / "mixed", PruneSettings.checked(budget="380kB"), calibration)
    export(tmp_path / "mixed", tmp_path / "out", target="owl", precision="int4")
    assert 360e3 < data(tmp_path / "out") < 380e3


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [4, 3])
def test_a_head_of_few_bits_is_what_the_checkpoint_holds(bits, tied, text_file, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 336, "num_hidden_layers": 3}
    model = tiny.write_model("qwen2", tmp_path / "dense", **sizes, tie_word_embeddings=tied)
    calibration = Calibration(str(text_file), samples=4, sequence_length=64)
    settings = PruneSettings.checked(method="none", bits=4, head_bits=bits)
    prune(model, tmp_path / "rounded", settings, calibration)
    how = {"int4": {}, "int8": {"head": "whole"}, "screened": {"head": "screened"}, "fp32": {}}
    packings = {
        name: export(
            tmp_path / "rounded",
            tmp_path / name,
            target="owl",
            precision="int4" if name == "screened" else name,
            **own,
        ).to_json()["packing"]
        for name, own in how.items()
    }
    kept = {name: packing["weights_on_grid"] for name, packing in packings.items()}
    assert kept["int4"] == kept["int8"] == kept["screened"] + 1
    assert [name for name, packing in packings.items() if packing["screened_head"]] == ["screened"]
    head = {4: 320 * 128 / 2, 3: 320 * 128 / 8 * 5}[bits]  # what fewer than 8 bits save of it
    saved = packings["screened"]["packed_bytes"] - packings["int4"]["packed_bytes"]
    assert saved == pytest.approx(head, rel=0.05)
    tokens = [3 + n * 7 % 300 for n in range(40)]
    logits = {name: Session(tmp_path / name).step(tokens) for name in how}
    size = np.abs(logits["fp32"]).max()
    if tied:  # a table of its own is rounded to 4 bits beside int4
        assert np.abs(logits["int4"] - logits["int8"]).max() <= 1e-5 * size
        assert np.abs(logits["int4"] - logits["fp32"]).mean() <= 2e-2 * size
    assert np.abs(logits["int4"] - logits["screened"]).mean() <= 2e-2 * size


def test_int4_without_a_grid_is_rounded_to_nearest(pruned, text_file, tmp_path):
    manifest = export(pruned, tmp_path / "out", target="owl", precision="int4").to_json()
    assert manifest["packing"]["weights_on_grid"] == 0
    assert manifest["packing"]["screened_head"]
    assert "--bits 4 loses less" in manifest["note"]
    asked = EvaluationSettings(str(text_file), window=128, windows=8, divergence=True)
    dense, found = evaluate([pruned, tmp_path / "out"], asked)
    assert found.perplexity.value == pytest.approx(dense.perplexity.value, rel=5e-2)
    assert 0 < found.divergence.value < 0.06
    assert 0.5 < found.divergence.same_top < 1


def test_a_grid_that_its_weights_do_not_lie_on(rounded, owl, tmp_path):
    from safetensors.torch import load_file, save_file

    rounded, narrow = rounded
    scales = {name: 1.5 * scale for name, scale in load_file(rounded / "grid.safetensors").items()}
    told = {"bits": narrow.removeprefix("int"), "group": "64"}
    save_file(scales, rounded / "grid.safetensors", metadata=told)
    asked = ("--target", "owl", "--precision", narrow)
    code, out, err = owl("export", rounded, "-o", tmp_path / "out", *asked)
    assert (code, out) == (2, "")
    assert "cannot be packed" in err
    assert "Round the model again" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_the_disk_holds_no_more_than_was_asked_for(owl, pruned, tmp_path):
    sizes, ended = [], threading.Event()

    def watch():
        while not ended.wait(0.002):
            with contextlib.suppress(FileNotFoundError):  # renamed while it is looked at
                sizes.append(sum(file.stat().st_size for file in tmp_path.rglob("model.onnx*")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    code, out, err = owl("export", pruned, "-o", tmp_path / "out", "--target", "owl")
    ended.set()
    watcher.join()
    assert (code, "owl, bf16" in out) == (0, True), err
    asked = targets._peak_bytes(Source(pruned), targets.TARGETS["owl"].precisions["bf16"])
    assert 0.5 * asked < max(sizes) < asked
    assert not any(path.is_dir() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_a_screened_head_leaves_likely_tokens_as_they_are(pruned, tmp_path, precision):
    tokens = [3 + n * 7 % 300 for n in range(40)]
    whole = {}
    for head in ("screened", "whole"):
        manifest = export(
            pruned, tmp_path / head, target="owl", precision=precision, head=head
        ).to_json()
        assert manifest["packing"]["screened_head"] == (head == "screened")
        session = Session(tmp_path / head)
        single = np.concatenate([session.step([token]) for token in tokens])
        session.start()
        # Many tokens at once take all bits of the head, whichever way it is stored.
        whole[head] = session.step(tokens)
        near = single >= single.max(axis=1, keepdims=True) - 10
        spread = np.abs(single).max()
        np.testing.assert_allclose(single[near], whole[head][near], atol=0.02 * spread)
    # Two roundings of one head (of int8 to [-119, 119] and to [-127, 127]), and what follows.
    assert np.abs(whole["screened"] - whole["whole"]).mean() < 0.02 * spread


@pytest.mark.parametrize("precision", ["int8", "int4", "bf16"])
def test_a_prompt_in_tiles_loses_no_more(pruned, text_file, tmp_path, monkeypatch, precision):
    if "amx" not in Library(library_path()).isas():
        pytest.skip("this processor has no AMX")
    export(pruned, tmp_path / "out", target="owl", precision=precision)
    asked = EvaluationSettings(str(text_file), window=100, windows=8)
    found = {}
    for isa in ("amx", "avx512"):
        monkeypatch.setenv("OWL_ISA", isa)
        found[isa] = deployment_perplexity(tmp_path / "out", asked).losses
    assert found["amx"] != found["avx512"]
    assert found["amx"] == pytest.approx(found["avx512"], rel=2e-3)


def test_tiles_round_nothing_in_fp32(pruned, tmp_path, monkeypatch):
    if "amx" not in Library(library_path()).isas():
        pytest.skip("this processor has no AMX")
    monkeypatch.setenv("OWL_ISA", "amx")
    manifest = export(pruned, tmp_path / "out", target="owl", precision="fp32").to_json()
    assert manifest["parity"]["relative_difference"] < 1e-5


def test_text_streams_out_of_stock_onnxruntime_genai(pruned, tmp_path):
    export(pruned, tmp_path / "out", target="owl", precision="int8")
    speed = Speed()
    sampling = Sampling(max_new_tokens=12)
    pieces = list(generate(tmp_path / "out", "The river ran", sampling, speed))
    assert 1 <= speed.new_tokens <= 12
    assert len(pieces) == speed.new_tokens
    assert speed.first_token_s > 0
    again = generate(tmp_path / "out", "The river ran", sampling, Speed())
    assert "".join(again) == "".join(pieces)
    for prompt, wanted, complaint in (
        ("", 12, "prompt is empty"),
        ("The river ran", 100_000, "100000 new ones are more than the 512 that there is room for"),
    ):
        with pytest.raises(BadInput, match=complaint):
            next(generate(tmp_path / "out", prompt, Sampling(max_new_tokens=wanted), Speed()))


def test_a_library_of_a_folder_that_is_named_from_here(pruned, tmp_path, monkeypatch):
    export(pruned, tmp_path / "out", target="owl", precision="int8")
    monkeypatch.chdir(tmp_path)
    asked = Sampling(max_new_tokens=2)
    wanted = list(generate("out", "The river ran", asked))
    assert list(generate("out", "The river ran", asked, trust_library=True)) == wanted


def test_a_prompt_in_parts_says_the_same(pruned, tmp_path):
    export(pruned, tmp_path / "out", target="owl", precision="fp32")
    tokens = np.random.default_rng(0).integers(3, 320, 300).astype(np.int32)

    def greedy(chunk):
        config = onnxruntime_genai.Config(str(tmp_path / "out"))
        config.overlay(json.dumps({"search": {"chunk_size": chunk}}))
        model = onnxruntime_genai.Model(config)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=332, min_length=332, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
        return list(generator.get_sequence(0))

    assert greedy(128) == greedy(1000) == greedy(7)
    # Rows at once take no prompt in parts.
    with EngineProcess("owl", tmp_path / "out", context=310, batch=2) as process:
        answer = process.request("decode", prompt=tokens.tolist(), steps=2, warmup=0)
    assert len(answer["latencies_ms"]) == 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_beginning_that_was_read_before_is_not_run_again(
    pruned, tmp_path, monkeypatch, precision
):
    """As few-shot examples are, of which every question of a task has the same."""
    monkeypatch.setattr(driver, "PART", 16)
    folder = tmp_path / "out"
    export(pruned, folder, target="owl", precision=precision)
    size = driver.decoder_config(folder)["head_size"]
    session = driver.Session(driver.open_session(folder, 1, str(library_path())), 1, size)
    shots = [(7 + 13 * index) % 320 for index in range(40)]
    texts = [
        ([*shots, 5], [16, 16, 9]),
        ([*shots, 6, 7, 8], [11]),
        (shots[:32], [16]),  # its last part is run: nobody kept its logits
        (shots[:33], [16, 1]),
        ([*shots[:20], *shots], [16, 16, 12]),
        ([*shots, 5], [16, 9]),
    ]
    ran = []
    run = session._run
    monkeypatch.setattr(session, "_run", lambda part: ran.append(len(part)) or run(part))
    for text, new in texts:
        ran.clear()
        last = session.read(text)
        assert ran == new
        after = session.extend([3])
        session.reset()
        np.testing.assert_array_equal(last, [*session.logits(text)][-1][-1])
        np.testing.assert_array_equal(after, session.extend([3]))


@pytest.mark.parametrize(
    "options",
    [{"max_new_tokens": 0}, {"temperature": -1}, {"top_k": -2}, {"top_p": 1.5}],
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(BadInput, match="impossible"):
        Sampling(**options)


def test_generate_needs_a_deployment(tmp_path):
    with pytest.raises(BadInput, match="does not exist"):
        next(generate(tmp_path / "no", "x", Sampling(), Speed()))
