"""The output head is pruned when it is asked for, and only then: last, by what enters it."""

from contextlib import contextmanager

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.compression import recipe
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.show import show
from owl_deploy.data.text import calibration_windows, load_tokenizer, tokenize
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import WEIGHTS
from tests import tiny
from tests.reference import owl as reference


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=3, sequence_length=32)


def differing(a, b):
    """The names of the tensors that differ between two checkpoints."""
    first, second = (load_file(folder / WEIGHTS) for folder in (a, b))
    assert first.keys() == second.keys()
    return {name for name in first if not torch.equal(first[name], second[name])}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_equals_the_naive_procedure(tmp_path, calibration, family, tied):
    source = tiny.write_model(family, tmp_path / "dense", tie_word_embeddings=tied)
    values = {"sparsity": 0.5, "outlier_multiple": 2}
    prune(source, tmp_path / "without", PruneSettings.checked(**values), calibration)
    settings = PruneSettings.checked(**values, head_sparsity=0.4)
    manifest = prune(source, tmp_path / "with", settings, calibration).to_json()

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "without")
    tokens = tokenize(load_tokenizer(source), tiny.text())
    norms = reference.input_norms(model, calibration_windows(tokens, 3, 32, 0))
    head = model.get_output_embeddings()
    name = next(name for name, module in model.named_modules() if module is head)
    gone = reference.wanda_mask(head.weight.detach(), norms[name].float(), 0.4)
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    found = pruned.get_output_embeddings().weight
    assert torch.equal(found, head.weight.masked_fill(gone, 0))
    assert (pruned.get_input_embeddings().weight is found) == tied
    changed = differing(tmp_path / "without", tmp_path / "with")
    assert len(changed) == 1
    if not tied:
        assert changed <= {"lm_head.weight", "embed_out.weight"}
        assert manifest["head"]["name"] in next(iter(changed))
    assert manifest["head"]["achieved"] == pytest.approx(0.4, abs=0.02)  # dense zeros count too
    assert manifest["sparsity"]["asked"] == pytest.approx(0.5)  # the blocks', as without the head


@pytest.mark.parametrize("structure", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", tiny.REMOVING)
def test_every_method_and_its_recipe(llama, tmp_path, calibration, method, structure):
    settings = PruneSettings.checked(
        method=method, allocation="owl", structure=structure, head_sparsity=0.5
    )
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()
    weight = load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"]
    assert float((weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)
    if structure == "2:4":
        assert int((weight.reshape(-1, 4) != 0).sum(1).max()) <= 2
    loaded = PruneSettings.checked(**recipe.load(tmp_path / "out" / "recipe.yaml"))
    assert loaded.head_sparsity == 0.5
    assert loaded.layers == {block["name"]: block["sparsity"] for block in manifest["blocks"]}
    if method not in ("wanda-variant", "alps"):  # which a recipe calls Wanda, SparseGPT
        prune(llama, tmp_path / "again", loaded, calibration)
        assert not differing(tmp_path / "out", tmp_path / "again")


def test_magnitude_looks_at_no_text(llama, tmp_path):
    settings = PruneSettings.checked(
        method="magnitude", allocation="uniform", sparsity=0.5, head_sparsity=0.25
    )
    prune(llama, tmp_path / "out", settings, None)
    dense = load_file(llama / WEIGHTS)["model.embed_tokens.weight"]
    gone = reference.magnitude_mask(dense, 0.25)
    found = load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(found, dense.masked_fill(gone, 0))


def test_a_tied_head_that_lies_there_twice_is_written_twice(tmp_path, calibration):
    """Some checkpoints hold both names of a tied weight; a reader may take either."""
    source = tiny.write_llama(tmp_path / "twice")
    tensors = load_file(source / WEIGHTS)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / WEIGHTS, metadata={"format": "pt"})
    prune(source, tmp_path / "out", PruneSettings.checked(head_sparsity=0.5), calibration)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert float((found["lm_head.weight"] == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_a_run_stopped_after_the_head_resumes(llama, tmp_path, calibration, monkeypatch):
    settings = PruneSettings.checked(head_sparsity=0.5)
    prune(llama, tmp_path / "whole", settings, calibration)
    with monkeypatch.context() as patched:
        patched.setattr("owl_deploy.compression.write.assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", settings, calibration)
    with pytest.raises(BadInput, match="head_sparsity"):
        prune(llama, tmp_path / "out", PruneSettings.checked(), calibration, resume=True)
    monkeypatch.setattr(
        "owl_deploy.models.blocks.Skeleton.embed", interrupted
    )  # no block needs to run
    bars = bars_filled(monkeypatch)
    prune(llama, tmp_path / "out", settings, calibration, resume=True)
    assert not differing(tmp_path / "whole", tmp_path / "out")
    assert [done for done, _ in bars] == [length for _, length in bars]


def interrupted(*_):
    raise KeyboardInterrupt


def bars_filled(monkeypatch):
    """Of every bar of a pruning, once it has run: [how far it came, its length]."""
    bars = []

    @contextmanager
    def counting(_, length):
        bars.append([0, length])

        def advance(by=1):
            bars[-1][0] += by

        yield advance

    monkeypatch.setattr("owl_deploy.compression.sequential.bar", counting)
    return bars


@pytest.mark.parametrize("head", [None, 0.5])
@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_the_bar_ends_full(llama, tmp_path, calibration, monkeypatch, method, head):
    bars = bars_filled(monkeypatch)
    settings = PruneSettings.checked(
        method=method, allocation="uniform", sparsity=0.5, head_sparsity=head
    )
    prune(llama, tmp_path / "out", settings, calibration if method == "wanda" else None)
    assert [done for done, _ in bars] == [length for _, length in bars]


def test_large_checkpoints(tmp_path, calibration, monkeypatch):
    source = tiny.write_llama(tmp_path / "dense")
    settings = PruneSettings.checked(head_sparsity=0.5)
    prune(source, tmp_path / "small", settings, calibration)
    monkeypatch.setattr("owl_deploy.models.checkpoint.SHARD_BYTES", 30_000)
    prune(source, tmp_path / "large", settings, calibration)
    shards = {
        name: value
        for path in (tmp_path / "large").glob("*.safetensors")
        for name, value in load_file(path).items()
    }
    small = load_file(tmp_path / "small" / WEIGHTS)
    assert shards.keys() == small.keys()
    assert all(torch.equal(shards[name], small[name]) for name in small)


def test_the_table_names_the_head(llama, tmp_path, calibration, capsys):
    manifest = prune(llama, tmp_path / "out", PruneSettings.checked(head_sparsity=0.5), calibration)
    show(manifest, "out")
    line = next(line for line in capsys.readouterr().out.splitlines() if "lm_head" in line)
    assert line.split()[1] == "0.5000"


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"head_sparsity": 1.0}, "A sparsity of 1.0 is impossible"),
        ({"head_sparsity": float("nan")}, "A sparsity of nan is impossible"),
        ({"head_sparsity": 0.5, "skip": ("lm_head",)}, "--skip names the head"),
        ({"head_sparsity": 0.9, "structure": "2:4"}, "0.9 keeps none of 4 weights"),
        (
            {"allocation": "list", "layers": {"model.layers.0": 0.9}, "structure": "2:4"},
            "0.9 keeps none of 4 weights",
        ),
    ],
)
def test_what_cannot_be(values, complaint):
    with pytest.raises(BadInput, match=complaint):
        PruneSettings.checked(**values)


def test_groups_must_divide_its_inputs(tmp_path, calibration):
    source = tiny.write_llama(tmp_path / "odd", hidden_size=72, intermediate_size=80)
    odd = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj")
    settings = PruneSettings.checked(structure="8:16", skip=odd)
    prune(source, tmp_path / "out", settings, calibration)
    with pytest.raises(BadInput, match="lm_head has 72 inputs, no multiple of 16"):
        prune(
            source,
            tmp_path / "again",
            settings.model_copy(update={"head_sparsity": 0.5}),
            calibration,
        )
