"""What each Linear makes up for besides, against two whole models run side by side."""

import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.compression import gptaq
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.recipe import RESOLVED
from owl_deploy.compression.request import check
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import GRID
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.utils.hardware import ANY_HARDWARE
from tests import tiny
from tests.reference import asymmetric as reference

pytestmark = pytest.mark.usefixtures("own_cache")
WEIGHTS = "model.safetensors"
ASKED = {"method": "sparsegpt", "allocation": "uniform", "sparsity": 0.5, "asymmetric": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.write_model(name, folder / name) for name in reference.STAGES}


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=9, sequence_length=40)


def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", reference.STAGES)
def test_each_linear_aims_at_what_the_dense_model_has(
    models, family, tmp_path, calibration, monkeypatch
):
    aims, aimed = [], gptaq.aimed

    def recording(dense, inputs, **how):
        aims.append((inputs.name, aimed(dense, inputs, **how)))
        return aims[-1][1]

    monkeypatch.setattr(gptaq, "aimed", recording)
    settings = PruneSettings.checked(**ASKED)
    prune(models[family], tmp_path / "out", settings, calibration)
    dense, pruned = loaded(models[family]), loaded(tmp_path / "out")
    request = check(models[family], settings, calibration, ANY_HARDWARE)
    blocks, stages = request.shape.names, reference.STAGES[family]
    names = [f"{block}.{name}" for block in blocks for own, _ in stages for name in own]
    expected = reference.aims(dense, pruned, request.windows, blocks, stages)
    assert len(aims) == len(expected) == len(names)
    for (linear, found), name in zip(aims, names, strict=True):
        assert name.endswith(linear)
        change = expected[name] - dense.get_submodule(name).weight.detach()
        if "layers.0" in name and "q_proj" in name:
            assert not change.any()  # nothing was lost before it
        assert (found - expected[name]).abs().max() < 1e-4 + 0.02 * change.abs().max(), name


def test_the_stream_comes_nearer_than_without(models, tmp_path, calibration):
    """On the text that it was made by."""
    dense = loaded(models["llama"])
    settings = PruneSettings.checked(**ASKED)
    text = check(models["llama"], settings, calibration, ANY_HARDWARE).windows
    wanted = reference.seen(dense, text, "model.layers.1", output=True)
    errors = []
    for name in (False, True):
        asked = PruneSettings.checked(**ASKED | {"asymmetric": name})
        prune(models["llama"], tmp_path / str(name), asked, calibration)
        found = reference.seen(loaded(tmp_path / str(name)), text, "model.layers.1", output=True)
        errors.append(float((found - wanted).square().sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("bits", [4, None])
def test_zeros_that_stay_are_kept(models, tmp_path, calibration, bits):
    """Rounding keeps those of a pruned model, and SparseGPT those that it is told to."""
    prune(models["llama"], tmp_path / "sparse", PruneSettings.checked(**ASKED), calibration)
    again = {"method": "none", "bits": bits, "asymmetric": True}
    if bits is None:
        again = ASKED | {"sparsity": 0.6, "options": {"preserve_mask": True}}
    settings = PruneSettings.checked(**again)
    prune(tmp_path / "sparse", tmp_path / "out", settings, calibration)
    before, after = (load_file(tmp_path / name / WEIGHTS) for name in ("sparse", "out"))
    for name, one in before.items():
        if "proj" in name:
            assert not after[name][one == 0].any()
            assert not torch.equal(after[name], one)
    assert (tmp_path / "out" / GRID).exists() == (bits is not None)


def faint(model, folder):
    """The model, an eighth of whose inputs are a thousandth of the others."""
    shutil.copytree(model, folder)
    weights = load_file(folder / WEIGHTS)
    for name, one in weights.items():
        if "layernorm" in name or "layer_norm" in name:
            one[::8] *= 1e-3
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize(
    "asked",
    [
        {"method": "none", "bits": 4},
        ASKED,
        ASKED | {"bits": 4},
        ASKED | {"method": "alps", "asymmetric": False},
        ASKED | {"method": "alps", "asymmetric": False, "bits": 4},
    ],
    ids=str,
)
def test_no_weight_outgrows_its_group_where_an_input_is_faint(
    models, family, tmp_path, calibration, asked
):
    """It would set the scale by which the others are rounded, to nothing."""
    model = faint(models[family], tmp_path / "model")
    prune(model, tmp_path / "out", PruneSettings.checked(**asked), calibration)
    before, after = (load_file(folder / WEIGHTS) for folder in (model, tmp_path / "out"))
    for name, one in before.items():
        if ".layers." in name and one.ndim == 2:
            assert after[name].abs().max() < 2.5 * one.abs().max(), name
    if "sparsity" not in asked:
        told = read_manifest(tmp_path / "out", CheckpointManifest)
        assert told.sparsity.achieved < 0.12


def test_the_aim_with_zeros_is_the_best_of_those_that_keep_them(monkeypatch):
    for name in ("_RIDGE", "_LEAST"):
        monkeypatch.setattr(gptaq, name, 1e-4)
    torch.manual_seed(0)
    rows, ahead = torch.randn(60, 6), torch.randn(60, 6)
    linear = torch.nn.Linear(6, 3, bias=False)
    weight = linear.weight.detach().masked_fill(torch.rand(3, 6) < 0.5, 0)
    statistics = InputStatistics({"a": linear}, 1, hessian=True)
    with statistics.gathering():
        linear(rows[None])
        statistics.cross("a", (ahead - rows)[None])
    found = gptaq.aimed(weight, Inputs(statistics, "a"), writes=False, keep_zeros=True)
    assert torch.equal(found == 0, weight == 0)

    def error(one):
        return (rows @ one.T - ahead @ weight.T).square().sum(0)

    for row in range(3):
        kept = weight[row] != 0
        best = torch.linalg.lstsq(rows[:, kept], ahead @ weight[row]).solution
        least = (rows[:, kept] @ best - ahead @ weight[row]).square().sum()
        assert least <= error(found)[row] < 1.02 * least


def test_methods_that_do_not_are_said_to():
    with pytest.raises(BadInput, match="--asymmetric is of methods whose weights make up"):
        PruneSettings.checked(method="wanda", asymmetric=True)
    assert PruneSettings.checked(method="wanda", refit=True, asymmetric=True).asymmetric


def test_what_is_rounded_is_so_unless_it_is_said_not_to_be():
    pruned, rounded = {"method": "sparsegpt"}, {"method": "none", "bits": 4}
    for asked, expected in (
        (pruned, False),
        (rounded, True),
        (pruned | {"bits": 4}, True),
        ({"budget": "3.5"}, True),
        (rounded | {"asymmetric": False}, False),
        (rounded | {"asymmetric": None}, True),
    ):
        assert PruneSettings.checked(**asked).asymmetric == expected


@pytest.mark.parametrize("more", [{}, {"head_sparsity": 0.5}, {"reconstruct": 1}], ids=str)
def test_the_bar_comes_to_its_end(models, tmp_path, calibration, capsys, more):
    settings = PruneSettings.checked(**ASKED | more)
    prune(models["llama"], tmp_path / "out", settings, calibration)
    assert "Pruning: done" in capsys.readouterr().err


def test_a_recipe_says_what_sparseml_does_not_do(models, tmp_path, calibration):
    settings = PruneSettings.checked(**ASKED)
    manifest = prune(models["opt"], tmp_path / "out", settings, calibration)
    assert manifest.settings.asymmetric
    recipe = (tmp_path / "out" / RESOLVED).read_text()
    assert "what those before it lost" in recipe


def test_an_error_counts_up_to_half_of_the_size_that_tokens_have():
    """In each window by itself: 2 in the first, beside one of 100; none in the second."""
    wanted = torch.zeros(2, 3, 2)
    wanted[0, :, 0] = torch.tensor([100.0, 2.0, -2.0])
    wanted[1, 0, 1] = 5.0
    error = torch.zeros(2, 3, 2)
    error[0, :, 1] = torch.tensor([50.0, 0.9, -4.0])
    error[1, 1, 0] = 0.1
    found = gptaq._counting(error, wanted)
    assert found.squeeze(-1).tolist() == [[pytest.approx(0.02), 1, 0.25], [0, 0, 0]]
