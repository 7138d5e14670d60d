"""`--bits` through the whole verb: the checkpoint, its scales, and what is refused."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from owl_deploy.compression import recipe
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings, kept
from owl_deploy.finetune.source import Source
from owl_deploy.models.checkpoint import GRID, WEIGHTS
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from tests import tiny


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=6, sequence_length=64)


def on_the_grid(folder):
    """The names of the Linears whose weights are their grid's, to their integers."""
    with safe_open(folder / GRID, framework="pt") as file:
        told = file.metadata()
    bits, group = int(told["bits"]), int(told["group"])
    lowest = -127 if bits == 8 else -(2 ** (bits - 1))
    weights, found = load_file(folder / WEIGHTS), {}
    for name, scales in load_file(folder / GRID).items():
        linear = name.removesuffix(".weight_scale")
        tied = {"lm_head": "model.embed_tokens"}.get(linear, linear)
        weight = weights[f"{tied if f'{tied}.weight' in weights else linear}.weight"].float()
        assert scales.dtype == torch.bfloat16
        assert scales.shape == (len(weight), -(-weight.shape[1] // group))
        wide = scales.float().repeat_interleave(group, dim=1)[:, : weight.shape[1]]
        integers = (weight / wide).round()
        assert lowest <= integers.min() <= integers.max() <= 2 ** (bits - 1) - 1
        mantissas = scales.float().frexp().mantissa * 32
        assert torch.equal(mantissas, mantissas.round())  # 2^e (1 + m/16), which a byte holds
        if bits < 8:
            assert torch.equal(integers * wide, weight)
        found[linear] = integers
    return found


BLOCKS = [
    f"model.layers.{index}.{name}"
    for index in (0, 1)
    for name in (
        *(f"self_attn.{part}_proj" for part in "qkvo"),
        *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(
    "values",
    [
        {"method": "none"},
        {"method": "wanda", "sparsity": 0.0},
        {"method": "wanda", "sparsity": 0.5},
        {"method": "magnitude", "structure": "2:4", "bits_group": 64},
        {"method": "sparsegpt", "sparsity": 0.5, "bits_group": 128},
        {"method": "sparsegpt", "structure": "4:8", "allocation": "uniform"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_the_checkpoint_lies_on_its_grid(llama, tmp_path, calibration, bits, values):
    settings = PruneSettings.checked(bits=bits, **values)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    found = on_the_grid(tmp_path / "out")
    assert sorted(found) == sorted(BLOCKS)
    assert (manifest.settings.bits, manifest.settings.bits_group) == (bits, settings.bits_group)
    assert read_manifest(tmp_path / "out", CheckpointManifest) == manifest
    assert manifest.sparsity.achieved >= manifest.sparsity.asked - 1e-3
    zeros = sum(int((integers == 0).sum()) for integers in found.values())
    assert manifest.sparsity.achieved == pytest.approx(zeros / manifest.weights)
    if settings.group:
        for name, integers in found.items():
            most = int((integers.reshape(-1, settings.group[1]) != 0).sum(1).max())
            block, _, linear = name.removeprefix("model.layers.").partition(".")
            asked = manifest.blocks[int(block)].linears[linear].sparsity
            assert most <= kept(asked, settings.group[1])
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    removes = settings.method != "none"
    assert (tmp_path / "out" / "recipe.yaml").is_file() == removes
    assert (tmp_path / "out" / "sparsity.svg").is_file() == removes


def test_bfloat16_and_what_is_skipped(tmp_path, calibration):
    source = tiny.write_llama(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    settings = PruneSettings.checked(method="none", bits=4, skip=("down_proj", "model.layers.1"))
    prune(source, tmp_path / "out", settings, calibration)
    found = on_the_grid(tmp_path / "out")
    assert sorted(found) == sorted(n for n in BLOCKS if ".0." in n and "down" not in n)
    before, after = (load_file(folder / WEIGHTS) for folder in (source, tmp_path / "out"))
    for name in before.keys() - {f"{linear}.weight" for linear in found}:
        assert torch.equal(before[name], after[name]), name
    assert after["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_float16_with_rows_that_are_nearly_nothing(llama, tmp_path, calibration):
    """Their scales are no finer than the dtype's least numbers, so that integers can be told."""
    shutil.copytree(llama, tmp_path / "source")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors = {key: value.half() for key, value in load_file(llama / WEIGHTS).items()}
    tensors[name][:8] *= 3e-5
    save_file(tensors, tmp_path / "source" / WEIGHTS, {"format": "pt"})
    settings = PruneSettings.checked(method="none", bits=8)
    prune(tmp_path / "source", tmp_path / "out", settings, calibration)
    assert sorted(on_the_grid(tmp_path / "out")) == sorted(BLOCKS)
    weight, scales = load_file(tmp_path / "out" / WEIGHTS)[name], load_file(tmp_path / "out" / GRID)
    assert weight.dtype == torch.float16
    assert weight[:8].any()
    places = weight[:8].float() / scales[f"{name}_scale"][:8].float().repeat_interleave(32, 1)
    assert torch.equal(places, places.round())
    grids = Source(tmp_path / "out").grids("model.layers.0")
    assert grids.keys() >= {"mlp.up_proj"}


@pytest.mark.parametrize("method", ["none", "wanda"])
def test_the_head_is_rounded_where_it_is_asked_for(llama, tmp_path, calibration, method):
    settings = PruneSettings.checked(
        method=method, bits=4, sparsity=0.0, head_sparsity=0.0, allocation="uniform"
    )
    prune(llama, tmp_path / "out", settings, calibration)
    assert sorted(on_the_grid(tmp_path / "out")) == sorted([*BLOCKS, "lm_head"])


def test_a_pruned_checkpoint_is_rounded_and_stays_as_sparse(llama, tmp_path, calibration):
    prune(llama, tmp_path / "sparse", PruneSettings.checked(sparsity=0.5), calibration)
    prune(
        tmp_path / "sparse",
        tmp_path / "out",
        PruneSettings.checked(method="none", bits=4),
        calibration,
    )
    sparse = load_file(tmp_path / "sparse" / WEIGHTS)
    for name, integers in on_the_grid(tmp_path / "out").items():
        assert bool((integers[sparse[f"{name}.weight"] == 0] == 0).all())


def test_zeros_of_rounding_alone_are_no_holes(llama, tmp_path, calibration):
    """What is rounded once more may move them, though 3 bits leave as many as pruning might."""
    for source, out, bits in ((llama, "three", 3), (tmp_path / "three", "four", 4)):
        settings = PruneSettings.checked(method="none", bits=bits, bits_group=128)
        made = prune(source, tmp_path / out, settings, calibration)
        assert all(one.whole for one in made.linears.values())
    before, after = (on_the_grid(tmp_path / name) for name in ("three", "four"))
    assert sum(int((one == 0).sum()) for one in before.values()) > 0.2 * made.weights
    moved = [bool((after[name][one == 0] != 0).any()) for name, one in before.items()]
    assert any(moved)


def test_a_recipe_says_that_it_was_rounded(llama, tmp_path, calibration):
    settings = PruneSettings.checked(bits=3, sparsity=0.5)
    prune(llama, tmp_path / "out", settings, calibration)
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "# Rounded to 3 bits as well, which SparseML does another way." in text
    again = recipe.merged(tmp_path / "out", {"bits": 3})
    prune(llama, tmp_path / "again", again, calibration)
    first, second = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--bits", "4"], "Rounding to 4 bits looks at the model's inputs."),
        (["--bits", "5"], "--bits 5 is not possible. There are: 8, 4, 3."),
        (["--bits", "4", "--group", "48"], "--group 48 is not possible. There are: 32, 64, 128."),
        (["--group", "32"], "--group is of --bits. Give --bits as well."),
        (["--method", "none", "--bits", "4"], "Use owl quantize to round weights."),
        (["--bits", "4", "--structure", "3:7"], "Groups of 7 weights do not fit"),
    ],
)
def test_what_is_refused(owl, llama, tmp_path, arguments, complaint):
    start = [] if "-m" in arguments or "--method" in arguments else ["-m", "magnitude"]
    command = ["prune", llama, "-o", tmp_path / "out", *start, "-a", "uniform", *arguments]
    code, _, err = owl(*command)
    assert (code, complaint in " ".join(err.split())) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(owl, llama, text_file, tmp_path):
    command = ["quantize", llama, "-o", tmp_path / "out", "-c", text_file, "--samples", 4]
    command += ["--sequence-length", 32, "--group", 64, "--json"]
    code, out, _ = owl(*command)
    assert code == 0
    told = json.loads(out)
    settings = told["settings"]
    assert (settings["bits"], settings["bits_group"], settings["asymmetric"]) == (4, 64, True)
    assert told["sparsity"]["asked"] == 0
    code, out, err = owl(*command[:-1], "--force")
    assert (code, "M weights of 4 bits (groups of 64) in the blocks" in out) == (0, True)
    # Nothing was to go: no sparsity is shown, and no recipe of SparseML's is missed.
    assert not {"asked", "achieved", "sparsity"} & {*out.replace(".", " ").split()}
    assert "SparseML" not in err


@pytest.mark.parametrize(
    ("options", "said"), [((), True), (("-m", "wanda"), False), (("-s", "0.3"), False)]
)
def test_bits_alone_remove_weights_too_and_that_is_said(
    owl, llama, tmp_path, text_file, options, said
):
    how = ("--bits", 8, "-c", text_file, "--samples", 4, "--sequence-length", 32)
    code, _, err = owl("prune", llama, "-o", tmp_path / "out", *how, *options)
    assert (code, "50% of the weights go, too; owl quantize rounds only." in err) == (0, said), err
