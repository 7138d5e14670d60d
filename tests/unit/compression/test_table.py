"""Every method with every allocation, structure and family: what was asked is what comes out.

All pairs of them by default, and all combinations with the slow tests.
"""

import functools
import itertools
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from owl_deploy.compression import recipe
from owl_deploy.compression.methods import METHODS
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.models.families import FAMILIES
from tests import tiny

ALLOCATIONS = ("uniform", "owl", "fisher", "linear")
STRUCTURES = ("unstructured", "2:4", "3:8")
CHOICES = (tuple(tiny.REMOVING), ALLOCATIONS, STRUCTURES, tuple(tiny.FAMILIES))


def is_quick(*picks):
    """Whether a combination, by its places in `CHOICES`, is among the few that hold all pairs."""
    method, allocation, structure, family = picks
    return (method + allocation + family) % 4 == (method + structure + 2 * family) % 3 == 0


QUICK, SLOW = [], []
for places in itertools.product(*(range(len(names)) for names in CHOICES)):
    combination = tuple(names[place] for names, place in zip(CHOICES, places, strict=True))
    (QUICK if is_quick(*places) else SLOW).append(combination)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {family: tiny.write_model(family, folder / family) for family in tiny.FAMILIES}


def test_every_family_has_a_tiny_model():
    assert set(tiny.FAMILIES) == set(FAMILIES)


@functools.cache
def linears(folder):
    """The names of the Linears in the blocks, as transformers sees them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]


@pytest.mark.parametrize(("one", "other"), [*itertools.combinations(range(len(CHOICES)), 2)])
def test_every_pair_is_among_the_quick(one, other):
    found = {(combination[one], combination[other]) for combination in QUICK}
    assert found == set(itertools.product(CHOICES[one], CHOICES[other]))


@pytest.mark.parametrize(
    ("method", "allocation", "structure", "family"),
    [*QUICK, *(pytest.param(*combination, marks=pytest.mark.slow) for combination in SLOW)],
)
def test_every_combination(models, text_file, tmp_path, method, allocation, structure, family):
    values = {"method": method, "allocation": allocation, "structure": structure}
    if allocation in ("owl", "linear"):
        values["spread"] = 0.1
    if structure == "unstructured":
        values["sparsity"] = 0.6
    settings = PruneSettings.checked(**values)
    text = Calibration(str(text_file), samples=3, sequence_length=32)
    manifest = prune(models[family], tmp_path / "out", settings, text).to_json()

    pruned = load_file(tmp_path / "out" / "model.safetensors")
    dense = load_file(models[family] / "model.safetensors")
    names = linears(models[family])
    zeros = sum(int((pruned[f"{name}.weight"] == 0).sum()) for name in names)
    total = sum(pruned[f"{name}.weight"].numel() for name in names)
    assert manifest["weights"] == total
    # Groups are whole numbers a part, so two blocks can miss the mean by half a weight of a group.
    tolerance = 2e-3 if settings.group is None else 0.5 / 2 / settings.group[1] + 1e-9
    asked = {
        f"{block['name']}.{name}": linear["sparsity"]
        for block in manifest["blocks"]
        for name, linear in block["linears"].items()
    }
    assert list(asked) == names
    assert abs(manifest["sparsity"]["asked"] - settings.sparsity) <= tolerance
    assert zeros / total >= manifest["sparsity"]["asked"] - 1e-3  # a zero weight may be kept
    assert zeros / total == pytest.approx(manifest["sparsity"]["asked"], abs=0.03)
    if settings.group is not None:
        for name, sparsity in asked.items():
            kept = round((1 - sparsity) * settings.group[1])
            groups = pruned[f"{name}.weight"].reshape(-1, settings.group[1])
            assert int((groups != 0).sum(1).max()) <= kept
    for name in dense.keys() - {f"{name}.weight" for name in names}:
        assert torch.equal(dense[name], pruned[name]), name
    if METHODS[method].needs != "hessian":  # which moves what is left
        for name in names:
            kept = pruned[f"{name}.weight"] != 0
            assert torch.equal(pruned[f"{name}.weight"][kept], dense[f"{name}.weight"][kept])
    loaded = PruneSettings.checked(**recipe.load(tmp_path / "out" / "recipe.yaml"))
    layers = {}  # a block, or its Linears where they are asked different shares
    for block in manifest["blocks"]:
        own = {f"{block['name']}.{name}": one["sparsity"] for name, one in block["linears"].items()}
        layers |= own if len(set(own.values())) > 1 else {block["name"]: block["sparsity"]}
    assert loaded.layers == layers
    assert json.loads((tmp_path / "out" / "owl.json").read_text()) == manifest
