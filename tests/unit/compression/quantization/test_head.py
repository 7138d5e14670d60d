"""The output head in few bits: asked for, or found by a budget of a size; and what it costs."""

import pytest
import torch
import transformers
from safetensors.torch import load_file

from owl_deploy.compression import request as prune_request
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.quantization import head as head_module
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.quantization.head import measure_head
from owl_deploy.compression.request import check
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.data.calibration import Calibration
from owl_deploy.models.checkpoint import WEIGHTS
from owl_deploy.models.rounded_grid import read_grid
from owl_deploy.runtime import pack
from owl_deploy.utils.hardware import ANY_HARDWARE
from tests import tiny

SIZES = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=4, sequence_length=48)


@pytest.mark.parametrize(("bits", "of_head"), [(4, 4), (4, 3), (8, 4)])
def test_it_is_rounded_beside_the_blocks(llama, tmp_path, calibration, bits, of_head):
    settings = PruneSettings.checked(method="none", bits=bits, head_bits=of_head)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    grid = read_grid(tmp_path / "out")
    assert grid.bits == dict.fromkeys(grid.scales, bits) | {"lm_head": of_head}
    assert (manifest.settings.bits, manifest.settings.head_bits) == (bits, of_head)
    assert manifest.head.name == "lm_head"
    weight = load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"]
    steps = weight.unflatten(1, (-1, 32)) / grid.scales["lm_head"].unsqueeze(2)
    assert torch.equal(steps, steps.round())
    half = 2 ** (of_head - 1)
    assert (int(steps.min()), int(steps.max())) == (-half, half - 1)  # all of the bits are used


def test_it_is_what_a_sparsity_of_nought_gives(llama, tmp_path, calibration):
    for name, values in (("bits", {"head_bits": 4}), ("sparsity", {"head_sparsity": 0.0})):
        settings = PruneSettings.checked(method="none", bits=4, **values)
        prune(llama, tmp_path / name, settings, calibration)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("bits", "sparsity"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_its_cost_is_the_divergence_of_the_model_with_it(
    family, tied, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(prune_request, "MEASURED_TOKENS", 3 * 48)
    model = tiny.write_model(family, tmp_path / "dense", tie_word_embeddings=tied)
    calibration = Calibration(str(text_file), samples=5, sequence_length=48, seed=3)
    settings = PruneSettings.checked(budget="60kB", method="none")
    # The budget is not what is looked at: any that is possible.
    settings = PruneSettings.checked(budget=possible(model, settings, calibration), method="none")
    request = check(model, settings, calibration, ANY_HARDWARE)
    store = Store(tmp_path / "out", request.deciding(), resume=False, force=True)
    eight, four = measure_head(request, store)

    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    head = whole.get_output_embeddings()
    statistics = InputStatistics({"head": head}, 5, hessian=True)
    with torch.no_grad():
        with statistics.gathering():
            for window in request.windows:
                whole(window[None])
        assert len(request.held_out) == 3
        before = whole(request.held_out).logits.log_softmax(-1)
        made = Maker(settings).rounded(head.weight, Inputs(statistics, "head"), Format(4))
        head.weight.copy_(made.weight)  # and with it the embedding, where it is that
        after = whole(request.held_out).logits.log_softmax(-1)
    expected = (before.exp() * (before - after)).sum(-1).mean()
    assert four.loss == pytest.approx(float(expected), rel=1e-3)
    assert (eight.bits, eight.loss, four.bits) == (8, 0.0, 4)
    size = tuple(head.weight.shape)
    assert eight.bytes == pack.stored_bytes(size, "int8", planes=True)
    assert four.bytes == pack.stored_bytes(size, "int4")
    monkeypatch.setattr(head_module, "_loss", None)  # the next one is kept
    assert measure_head(request, store) == [eight, four]


def possible(model, settings, calibration, refused="1kB"):
    """The least budget that is possible, or the most, as the refusal of another says it."""
    from owl_deploy.errors import BadInput

    with pytest.raises(BadInput) as told:
        check(
            model,
            settings.model_copy(update={"budget": refused}),
            calibration,
            ANY_HARDWARE,
        )
    return told.value.message.rpartition(", ")[2].removesuffix(".")


def test_a_budget_of_a_size_finds_out_about_it(tmp_path, calibration):
    """The least has it in 4 bits; the most, which has room for all, does not."""
    model = tiny.write_model("qwen2", tmp_path / "dense", **SIZES)
    settings = PruneSettings.checked(budget="1kB", method="none")
    found = {}
    for name, refused in (("least", "1kB"), ("most", "9GB")):
        size = possible(model, settings, calibration, refused)
        settings = PruneSettings.checked(budget=size, method="none")
        manifest = prune(model, tmp_path / name, settings, calibration)
        found[name] = manifest.settings.head_bits
        assert ("lm_head" in read_grid(tmp_path / name).bits) == (found[name] == 4)
        assert (manifest.head is not None) == (found[name] == 4)
    assert found == {"least": 4, "most": None}


def test_a_budget_leaves_it_where_it_is_told_to(tmp_path, calibration):
    model = tiny.write_model("qwen2", tmp_path / "dense", **SIZES)
    for values in ({"budget": "4"}, {"budget": "260kB", "skip": ("lm_head",)}):
        manifest = prune(
            model, tmp_path / "out", PruneSettings.checked(**values), calibration, force=True
        )
        assert manifest.settings.head_bits is None
        assert "lm_head" not in read_grid(tmp_path / "out").bits
    settings = PruneSettings.checked(budget="4", head_bits=3)
    assert prune(model, tmp_path / "three", settings, calibration).settings.head_bits == 3
    assert read_grid(tmp_path / "three").bits["lm_head"] == 3


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--head-bits", "4"], "--head-bits is of --bits. Give --bits as well."),
        (["--bits", "4", "--head-bits", "8"], "--head-bits 8 is not possible. There are: 4, 3."),
        (
            ["--bits", "4", "--head-bits", "4", "--skip", "lm_head"],
            "--skip names the head, and --head-bits rounds it.",
        ),
    ],
)
def test_what_is_refused(owl, llama, tmp_path, text_file, arguments, complaint):
    code, _, err = owl("prune", llama, "-o", tmp_path / "out", "-c", text_file, *arguments)
    assert (code, complaint in " ".join(err.split())) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_the_table_and_the_recipe_say_so(owl, llama, tmp_path, text_file):
    command = ["prune", llama, "-o", tmp_path / "out", "-c", text_file, "--samples", 4]
    command += ["--sequence-length", 48, "--bits", 4, "--head-bits", 3, "-s", 0.5]
    code, out, err = owl(*command)
    assert code == 0, err
    assert "lm_head, 3 bits" in out
    assert "outliers %" not in out  # nothing looked at any
    assert (
        "# Rounded to 4 bits as well, the output head to 3"
        in (tmp_path / "out" / "recipe.yaml").read_text()
    )
