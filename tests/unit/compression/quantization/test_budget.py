"""`--budget` through the whole verb, and what the budget comes to in the engine."""

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from owl_deploy.compression import recipe
from owl_deploy.compression.quantization.budget import spend
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.show import show
from owl_deploy.errors import BadInput
from owl_deploy.models.checkpoint import WEIGHTS
from owl_deploy.models.manifest import Cost
from owl_deploy.models.rounded_grid import read_grid
from owl_deploy.runtime import pack, timing
from owl_deploy.runtime.value_types import TRAITS
from tests import tiny

GATED = ("gate_proj", "up_proj")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.write_llama(
        tmp_path_factory.mktemp("model") / "model", hidden_size=128, intermediate_size=256
    )


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=4, sequence_length=48)


def packed(folder):
    """The bytes of each rounded Linear, packed as the manifest says that it was meant."""
    grid, weights = read_grid(folder), load_file(folder / WEIGHTS)
    sizes = {}
    for name, bits in grid.bits.items():
        weight = weights[f"{name}.weight"].float().numpy()
        values = f"int{bits}"
        sparse = TRAITS[values].pays(np.count_nonzero(weight) / weight.size)
        sizes[name] = pack.pack(
            weight, values, sparse, scales=grid.scales[name].numpy(), scale_columns=grid.group
        ).size
    return sizes


@pytest.mark.parametrize("budget", ["2.7", "3.5", "4.6", "7"])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_the_budget_is_kept(model, tmp_path, calibration, budget, method):
    settings = PruneSettings.checked(budget=budget, method=method, bits_group=64)
    manifest = prune(model, tmp_path / "out", settings, calibration)
    grid = read_grid(tmp_path / "out")
    told = {
        f"{block.name}.{name}": linear
        for block in manifest.blocks
        for name, linear in block.linears.items()
    }
    assert {name: linear.bits for name, linear in told.items()} == grid.bits
    sizes = packed(tmp_path / "out")
    # Refining, which is not measured, sets some more weights to zero.
    assert 0.96 * manifest.spent.bytes < sum(sizes.values()) < 1.01 * manifest.spent.bytes
    assert 8 * sum(sizes.values()) / manifest.weights <= float(budget) * 1.01
    assert 8 * sum(sizes.values()) / manifest.weights >= float(budget) * 0.9  # and spent
    for name, linear in told.items():
        chosen = [
            one
            for one in linear.costs
            if (one.bits, one.sparsity) == (linear.bits, linear.sparsity)
        ]
        assert len(chosen) == 1
        assert chosen[0].bytes == pytest.approx(sizes[name], rel=0.05)
        assert linear.achieved >= linear.sparsity - 1e-3
        if name.endswith("gate_proj"):
            other = told[name.replace("gate", "up")]
            assert (linear.bits, linear.sparsity) == (other.bits, other.sparsity)
    assert (manifest.settings.allocation, manifest.settings.budget) == ("budget", budget)
    assert manifest.sparsity.asked == pytest.approx(manifest.settings.sparsity)


def test_more_bits_lose_less(model, tmp_path, calibration):
    """What the plan foresees, summed over the Linears."""
    losses = []
    for budget in ("3", "4", "5", "6"):
        settings = PruneSettings.checked(budget=budget)
        manifest = prune(model, tmp_path / budget, settings, calibration)
        losses.append(manifest.spent.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 4 * losses[-1] > 0


def cost(size, loss, bits=4):
    return Cost(bits=bits, sparsity=0.0, bytes=size, loss=loss)


def test_gate_and_up_get_one_format():
    """down is worth its bytes, gate alone would be, and gate with up is not."""
    block = {
        "mlp.gate_proj": [cost(10, 0.0, 8), cost(5, 1.0)],
        "mlp.up_proj": [cost(10, 0.0, 8), cost(5, 0.1)],
        "mlp.down_proj": [cost(10, 0.0, 8), cost(5, 0.9)],
    }
    chosen = spend([block], 20)
    assert {name: one.bits for name, one in chosen[0].items()} == {
        "mlp.gate_proj": 4,
        "mlp.up_proj": 4,
        "mlp.down_proj": 8,
    }
    assert list(chosen[0]) == list(block)


def test_rounding_only_mixes_4_and_8_bits(model, tmp_path, calibration, capsys):
    settings = PruneSettings.checked(budget="6", method="none")
    manifest = prune(model, tmp_path / "out", settings, calibration)
    assert manifest.sparsity.asked == 0
    assert set(read_grid(tmp_path / "out").bits.values()) == {4, 8}
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    capsys.readouterr()
    show(manifest, "out")
    out = capsys.readouterr().out
    assert out.split()[:2] == ["block", "bits"]
    assert re.search(r"4: \d+%, 8: \d+%", out)
    assert "achieved" not in out


def test_the_recipe_says_the_sparsities(model, tmp_path, calibration):
    manifest = prune(model, tmp_path / "out", PruneSettings.checked(budget="3.2"), calibration)
    text = (tmp_path / "out" / "recipe.yaml").read_text()
    assert "# Rounded to 8, 4 or 3 bits as well, which SparseML does another way." in text
    again = recipe.merged(tmp_path / "out", {})
    assert (again.budget, again.allocation) == (None, "list")
    asked = {
        f"{block.name}.{name}": linear.sparsity
        for block in manifest.blocks
        for name, linear in block.linears.items()
    }
    found = {name: again.layers.get(name, again.layers.get(name[:14])) for name in asked}
    assert found == asked


def test_what_is_skipped_stays(model, tmp_path, calibration):
    settings = PruneSettings.checked(budget="4.6", skip=("down_proj",))
    prune(model, tmp_path / "out", settings, calibration)
    before, after = (load_file(folder / WEIGHTS) for folder in (model, tmp_path / "out"))
    name = "model.layers.1.mlp.down_proj"
    assert name not in read_grid(tmp_path / "out").bits
    assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--budget", "1.5"], "is below the least that sparsegpt can make of this model, 2."),
        (["--budget", "20kB"], "is below the least that sparsegpt can make of this model, "),
        (["--budget", "9"], "is above the most that can be spent, 8."),
        (["--budget", "1GB"], "is above the most that can be spent, "),
        (["--budget", "many"], "The budget 'many' is none. It is in bits a weight, such as 3.5"),
        (["--budget", "0"], "The budget '0' is none."),
        (["--budget", "1x"], "The budget 1x is no gain over dense int8, which takes no pruning."),
        (["--budget", "50x"], "is more than this machine's kernels gain on this model, "),
        (["--budget", "400mib"], "The budget '400mib' is none. It is in bits a weight, such as"),
        (["--budget", "4", "--bits", "4"], "and the settings say bits as well."),
        (["--budget", "4", "-s", "0.5"], "and the settings say sparsity as well."),
        (["--budget", "4", "-a", "owl"], "and the settings say allocation as well."),
        (["--budget", "4", "--structure", "2:4"], "and the settings say structure as well."),
        (["--budget", "4", "--head-sparsity", "0.5"], "the settings say head sparsity as well."),
        (["--budget", "4", "--group", "48"], "--group 48 is not possible."),
        (["-a", "budget"], "The allocation 'budget' needs one. Give --budget."),
    ],
)
def test_what_is_refused(owl, model, text_file, tmp_path, arguments, complaint):
    code, _, err = owl("prune", model, "-o", tmp_path / "out", "-c", text_file, *arguments)
    assert (code, complaint in " ".join(err.split())) == (2, True), err
    assert list(tmp_path.iterdir()) == []


def test_a_budget_needs_calibration(owl, model, tmp_path):
    code, _, err = owl("prune", model, "-o", tmp_path / "out", "--budget", "4.5")
    assert code == 2
    assert "Rounding within a budget looks at the model's inputs. Give a text" in err


def test_what_is_sparse_already_can_be_had_in_less(model, tmp_path, calibration):
    sparse = tmp_path / "sparse"
    prune(
        model, sparse, PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.7)
    )
    manifest = prune(
        sparse, tmp_path / "out", PruneSettings.checked(method="none", budget="3"), calibration
    )
    assert manifest.sparsity.achieved >= 0.7
    assert 8 * sum(packed(tmp_path / "out").values()) <= 3 * manifest.weights
    with pytest.raises(BadInput, match="below the least that rounding alone can make"):
        prune(model, tmp_path / "no", PruneSettings.checked(method="none", budget="3"), calibration)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_zeros_that_a_budget_counts_on_stay(model, tmp_path, calibration, method):
    """Though the weights are to make up for what was lost before them."""
    half = PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.5)
    prune(model, tmp_path / "half", half)
    settings = PruneSettings.checked(method=method, budget="4.2")
    manifest = prune(tmp_path / "half", tmp_path / "out", settings, calibration)
    size = sum(packed(tmp_path / "out").values())
    assert 0.9 * manifest.spent.bytes < size < 1.005 * manifest.spent.bytes
    assert 8 * size / manifest.weights <= 4.2


@pytest.mark.parametrize("unit", ["bits", "bytes"])
def test_the_least_and_the_most_that_are_said_can_be_had(model, calibration, unit):
    from owl_deploy.compression.request import check
    from owl_deploy.utils.hardware import ANY_HARDWARE

    for budget in ("0.1", "99") if unit == "bits" else ("1kB", "9GB"):
        with pytest.raises(BadInput) as refused:
            check(
                model,
                PruneSettings.checked(budget=budget),
                calibration,
                ANY_HARDWARE,
            )
        said = refused.value.message.rpartition(", ")[2].removesuffix(".")
        settings = PruneSettings.checked(budget=said.partition(" ")[0])
        check(model, settings, calibration, ANY_HARDWARE)


def test_the_command_line(owl, model, text_file, tmp_path):
    command = ["prune", model, "-o", tmp_path / "out", "-c", text_file, "--samples", 4]
    command += ["--sequence-length", 48, "--budget", 3.5, "--json"]
    code, out, _ = owl(*command)
    assert code == 0
    told = json.loads(out)
    assert told["settings"]["budget"] == "3.5"
    costs = told["blocks"][0]["linears"]["mlp.up_proj"]["costs"]
    assert {one["bits"] for one in costs} == {3, 4, 8}
    code, out, _ = owl(*command[:-1], "--force")
    assert code == 0
    assert re.search(r"\b3: \d+%", out)
    assert "M weights of 3 to 4 bits (groups of 32)" in out
    assert "bits" in (tmp_path / "out" / "sparsity.svg").read_text()


@pytest.fixture
def time_as_bits(monkeypatch):
    """Kernels that take their bits' time: real ones, of matrices this small, take a call's."""

    def from_memory(_library, shape, values, sparsity, **_how):
        bits = int(values.removeprefix("int"))
        return 1e-9 * math.prod(shape) * (bits if sparsity is None else 1 + bits * (1 - sparsity))

    monkeypatch.setattr(timing, "from_memory", from_memory)


@pytest.mark.usefixtures("time_as_bits")
def test_a_gain_in_speed_is_kept(model, tmp_path, calibration):
    settings = PruneSettings.checked(budget="1.3x")
    manifest = prune(model, tmp_path / "out", settings, calibration)
    linears = [one for block in manifest.blocks for one in block.linears.values()]
    took = []
    for linear in linears:
        [chosen] = [
            one
            for one in linear.costs
            if (one.bits, one.sparsity) == (linear.bits, linear.sparsity)
        ]
        assert chosen.microseconds > 0
        took.append(chosen.microseconds)
    assert manifest.spent.speed_up >= 1.3
    slower = sum(max(one.microseconds for one in linear.costs) for linear in linears)
    assert slower > sum(took)
    assert read_grid(tmp_path / "out").bits  # and it is a checkpoint as any other
