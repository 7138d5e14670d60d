"""`--allocation fisher`: its division against a search of all, and what it makes of a model."""

import itertools
import math
import os
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.compression import recipe
from owl_deploy.compression.allocation import fisher, sensitivity
from owl_deploy.compression.allocation.sensitivity import Found, Measuring
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.request import check
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.data.calibration import Calibration
from owl_deploy.errors import BadInput
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.utils.artefact import only_writer
from owl_deploy.utils.hardware import ANY_HARDWARE
from tests import tiny
from tests.reference import sensitivity as reference

pytestmark = pytest.mark.usefixtures("own_cache")


def test_levels_lie_around_what_is_asked_for():
    assert fisher.levels(0.5, None) == pytest.approx([0.3, 0.5, 0.7])
    assert fisher.levels(0.7, None) == pytest.approx([0.58, 0.7, 0.82])
    assert fisher.levels(0.1, None) == pytest.approx([0.05, 0.1, 0.46])
    for sparsity in (0.01, 0.3, 0.95, 0.999):
        found = fisher.levels(sparsity, None)
        assert 0 < found[0] < found[1] == sparsity < found[2] < 1
    assert fisher.levels(0.5, (2, 4)) == [0.25, 0.5, 0.75]
    assert fisher.levels(0.5, (4, 8)) == [0.25, 0.375, 0.5, 0.625, 0.75]
    assert fisher.levels(0.75, (1, 4)) == [0.25, 0.5, 0.75]
    assert fisher.levels(0.5, (1, 2)) == [0.5]


def exponential(rates, tried):
    """Losses that grow with the sparsity as exp(rate x sparsity), which is how they are read."""
    return [[math.exp(rate * one) for one in tried] for rate in rates]


def test_each_hundredth_costs_every_linear_the_same():
    """Where the sum of rate exp(rate s) is least, all derivatives by a weight are equal."""
    sizes, rates, tried = [100, 100, 100], [4.0, 5.0, 6.0], [0.3, 0.5, 0.7]
    found = fisher.divided(0.5, None, sizes, tried, exponential(rates, tried))
    assert sum(found) / 3 == pytest.approx(0.5)
    slopes = [rate * math.exp(rate * one) for rate, one in zip(rates, found, strict=True)]
    assert max(slopes) / min(slopes) < math.exp(6 * 0.011)
    assert found == sorted(found, reverse=True)


def test_a_large_linear_counts_by_its_weights():
    tried = [0.3, 0.5, 0.7]
    losses = exponential([5.0, 5.0], tried)
    small, large = fisher.divided(0.5, None, [100, 1000], tried, losses)
    assert (100 * small + 1000 * large) / 1100 == pytest.approx(0.5)
    assert large > small  # the same loss is spread over ten times the weights


@pytest.mark.parametrize("group", [(2, 4), (4, 8), (3, 8), (1, 2)])
def test_of_n_of_m_it_is_the_best_of_all_within_a_step(group):
    draw = torch.Generator().manual_seed(1)
    sizes, sparsity = [64, 64, 128, 64], 1 - group[0] / group[1]
    tried = fisher.levels(sparsity, group)
    losses = torch.rand(4, len(tried), generator=draw, dtype=torch.float64).cumsum(1).tolist()
    found = fisher.divided(sparsity, group, sizes, tried, losses)
    assert set(found) <= set(tried)

    def total(chosen):
        return sum(own[tried.index(one)] for own, one in zip(losses, chosen, strict=True))

    def mean(chosen):
        return sum(one * size for one, size in zip(chosen, sizes, strict=True)) / sum(sizes)

    step = 128 / group[1] / sum(sizes)
    assert sparsity - 1e-6 <= mean(found) <= sparsity + step
    best = min(
        total(one) for one in itertools.product(tried, repeat=4) if mean(one) >= mean(found) - 1e-9
    )
    assert total(found) == pytest.approx(best)


def test_no_linear_is_emptied_and_a_dead_one_pays_for_the_others():
    tried = fisher.levels(0.9, None)
    losses = [[0.0, 0.0, 0.0], *exponential([50.0, 60.0], tried)]
    found = fisher.divided(0.9, None, [100, 100, 100], tried, losses)
    assert max(found) == found[0] == pytest.approx(0.975, abs=0.01)
    assert max(found) <= 0.975
    assert sum(found) / 3 == pytest.approx(0.9)


def test_what_was_zero_before_stays_and_is_not_taken_for_free():
    """All that was tried of the first removed nothing: it is left, and the second pays the rest."""
    tried = fisher.levels(0.6, None)
    dense = [1e-3, 3e-3, 1e-2]
    sizes = [1000, 1000]
    assert fisher.divided(0.6, None, sizes, tried, [[0.0] * 3, dense], [0.8, 0]) == [0.8, 0.4]
    assert fisher.divided(0.6, None, sizes, tried, [[2.0] * 3, dense], [0.8, 0]) == [0.8, 0.4]
    # More than was asked for: nothing goes.
    assert fisher.divided(0.6, None, sizes, tried, [[0.0] * 3] * 2, [0.8, 0.7]) == [0.8, 0.7]
    assert fisher.divided(0.6, None, sizes, tried, [[0.0] * 3] * 2, [0.6, 0.6]) == [0.6, 0.6]
    both = [[0.0] * 3, dense]
    assert fisher.divided(0.6, None, [1000, 10], tried, both, [0.8, 0]) == [0.8, 0.0]
    # A few zeros are in any weights, and next to all in some: a recipe says less than 1.
    losses = exponential([4.0, 50.0], tried)
    few = fisher.divided(0.6, None, [1000, 10], tried, losses, [1e-3, 1e-3])
    assert few == fisher.divided(0.6, None, [1000, 10], tried, losses)
    assert few[1] < 0.1
    assert max(fisher.divided(0.6, None, sizes, tried, [[0.0] * 3, dense], [1.0, 0])) == 0.9


def test_above_what_was_zero_before_the_loss_rises_at_once():
    tried = [0.44, 0.6, 0.76]
    curve = fisher._Curve(tried, [0.1, 0.3, 0.9], 0.5)  # 0.1 of it is rounding's
    assert fisher._Curve(tried, [0.1, 0.3, 0.9], 0.4).at(0.4) == 0
    assert fisher._Curve(tried, [0.1, 0.3, 0.9], 0.4).at(0.42) == pytest.approx(0.05)
    assert fisher._Curve(tried, [0.1, 0.3, 0.9], 0.2).at(0.44) == pytest.approx(0.1)
    assert curve.at(0.5) == 0.1
    assert curve.at(0.55) == pytest.approx(0.2)
    assert curve.at(0.6) == pytest.approx(0.3)
    assert curve.at(0.68) == pytest.approx(0.3 * 3**0.5)
    assert curve.reachable([0.0, 0.3, 0.55, 0.9]) == [0.5, 0.55, 0.9]
    # By one above it, or none, no more is known than that.
    assert fisher._Curve(tried, [0, 0, 1], 0.6).reachable([0.5, 0.7, 0.76, 0.8]) == [0.6, 0.7, 0.76]
    assert fisher._Curve(tried, [0, 0, 0], 0.75).reachable([0.5, 0.76, 0.8]) == [0.75]


@pytest.mark.parametrize("sparsity", [0.55, 0.3])
def test_a_model_that_was_pruned_already_is_pruned_on(sparse, text_file, tmp_path, sparsity):
    """60 % of each Linear is zero; with more asked for in the mean each gets as much or more."""
    settings = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=sparsity)
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    once = prune(sparse, tmp_path / "once", settings, calibration)
    assert once.sparsity.achieved == pytest.approx(0.6, abs=0.01)
    more = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=0.7)
    twice = prune(tmp_path / "once", tmp_path / "twice", more, calibration)
    assert twice.sparsity.achieved == pytest.approx(0.7, abs=0.01)
    for block in twice.blocks:
        for one in block.linears.values():
            assert one.sparsity >= 0.59
            assert one.achieved == pytest.approx(one.sparsity, abs=0.02)


def losses_of(request, output):
    ways = [Format(None, 0.5)]
    with only_writer(output):
        store = Store(output, request.deciding(), resume=False, force=True)
        return sensitivity.measure_losses(request, store, request.settings, ways)


def test_a_reconstruction_does_not_measure_again(llama, tmp_path, monkeypatch):
    """It holds out more windows, and losses are measured by as many as before."""
    (tmp_path / "long.txt").write_text(tiny.text(20_000))
    calibration = Calibration(str(tmp_path / "long.txt"), samples=72, sequence_length=512)
    settings = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=0.5)
    first = check(llama, settings, calibration, ANY_HARDWARE)
    reconstructed = settings.model_copy(update={"reconstruct": 1})
    again = check(llama, reconstructed, calibration, ANY_HARDWARE)
    assert first.held_out is not None
    assert again.held_out is not None
    assert len(again.held_out) > len(first.held_out) == 8
    assert torch.equal(first.measured_by, again.measured_by)
    found = losses_of(first, tmp_path / "first")
    monkeypatch.setattr(sensitivity, "Measuring", None)
    assert losses_of(again, tmp_path / "again") == found


def test_losses_are_known_by_the_weights_content(llama, text_file, tmp_path, monkeypatch):
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    settings = PruneSettings.checked(method="wanda", allocation="fisher", sparsity=0.5)

    def found(folder, output):
        request = check(folder, settings, calibration, ANY_HARDWARE)
        return losses_of(request, tmp_path / output)

    first = found(llama, "first")
    moved, changed = (shutil.copytree(llama, tmp_path / name) for name in ("moved", "changed"))
    weights = changed / "model.safetensors"
    tensors, before = load_file(weights), weights.stat()
    save_file({name: -one for name, one in tensors.items()}, weights, metadata={"format": "pt"})
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights.stat().st_size == before.st_size
    monkeypatch.setattr(sensitivity, "Measuring", None)
    assert found(moved, "second") == first
    with pytest.raises(TypeError):  # it is measured
        found(changed, "third")


@pytest.mark.parametrize(
    ("method", "structure"),
    [
        ("wanda", "unstructured"),
        ("magnitude", "unstructured"),
        ("sparsegpt", "unstructured"),
        ("alps", "unstructured"),
        ("sparsegpt", "2:4"),
        ("wanda", "4:8"),
    ],
)
def test_a_model_is_pruned_by_it(llama, text_file, tmp_path, method, structure):
    settings = PruneSettings.checked(
        method=method, allocation="fisher", sparsity=0.5, structure=structure
    )
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    assert manifest.sparsity.achieved == pytest.approx(0.5, abs=0.02)
    found = read_manifest(tmp_path / "out", CheckpointManifest)
    assert found is not None
    asked = [one for block in found.blocks for one in block.linears.values()]
    assert len({one.sparsity for one in asked}) > 1
    resolved = recipe.merged(tmp_path / "out" / "recipe.yaml", {"method": method})
    prune(llama, tmp_path / "again", resolved, calibration)
    for one, other in zip(
        *(sorted((tmp_path / name).glob("*.safetensors")) for name in ("out", "again")), strict=True
    ):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_it_goes_by_is_the_loss_of_what_the_method_leaves(llama, text_file, tmp_path, method):
    settings = PruneSettings.checked(method=method, allocation="fisher", sparsity=0.5)
    calibration = Calibration(str(text_file), samples=4, sequence_length=256, seed=3)
    request = check(llama, settings, calibration, ANY_HARDWARE)
    ways = [Format(None, one) for one in (0.3, 0.5, 0.7)]
    with only_writer(tmp_path / "out"):
        store = Store(tmp_path / "out", request.deciding(), resume=False, force=True)
        found = Measuring(request, store, Maker(settings), ways).run()
    whole = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    for name, block in zip(request.shape.names, found, strict=True):
        forward = store.measured(name, "forward")
        for key, own in block.items():
            weight = whole.get_submodule(f"{name}.{key}").weight
            changes = forward[f"{key}.difference"] * forward[f"{key}.step"].unsqueeze(-1)
            for one, way, change in zip(own, ways, changes, strict=True):
                expected = reference.loss_of(whole, weight, change, request.held_out, seed=3)
                assert one.loss == pytest.approx(expected, rel=1e-3), (name, key, way)
                assert one.zeros == pytest.approx(way.sparsity, abs=0.02)


def test_a_stopped_run_goes_on_to_the_same_weights(
    llama, text_file, tmp_path, monkeypatch, own_cache
):
    settings = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=0.5)
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    prune(llama, tmp_path / "whole", settings, calibration)
    shutil.rmtree(own_cache)
    keep, calls = Store.keep, []

    def stopping(self, *arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(arguments[:2])
        keep(self, *arguments)

    monkeypatch.setattr(Store, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", settings, calibration)
    monkeypatch.setattr(Store, "keep", keep)
    assert not list(own_cache.glob("losses/*.json"))
    prune(llama, tmp_path / "out", settings, calibration, resume=True)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out"))
    assert one == other


def test_where_nothing_goes_nothing_is_measured(llama, text_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sensitivity, "Measuring", None)
    settings = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=0.0)
    calibration = Calibration(str(text_file), samples=2, sequence_length=32)
    assert prune(llama, tmp_path / "out", settings, calibration).sparsity.asked == 0


def test_a_method_measured_by_another_takes_what_that_has_found(
    llama, text_file, tmp_path, monkeypatch
):
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)

    def sparsities(method, output):
        settings = PruneSettings.checked(method=method, allocation="fisher", sparsity=0.5)
        return [
            {name: one.sparsity for name, one in block.linears.items()}
            for block in prune(llama, tmp_path / output, settings, calibration).blocks
        ]

    expected = sparsities("sparsegpt", "out")
    monkeypatch.setattr(sensitivity, "Measuring", None)  # not again
    asked = sparsities("alps", "of-alps")
    assert [own.keys() for own in asked] == [own.keys() for own in expected]
    assert asked == expected
    with pytest.raises(TypeError):
        sparsities("wanda", "of-wanda")


def test_bad_input(llama, tmp_path):
    with pytest.raises(BadInput, match="--spread means nothing to the allocation fisher"):
        recipe.merged(None, {"allocation": "fisher", "spread": 0.1})
    settings = PruneSettings.checked(method="magnitude", allocation="fisher", sparsity=0.5)
    with pytest.raises(BadInput, match="with the allocation fisher looks at the model's inputs"):
        prune(llama, tmp_path / "out", settings, None)


@pytest.mark.parametrize("bits", [None, 4])
def test_what_costs_most_is_pruned_least(llama, text_file, monkeypatch, bits):
    settings = PruneSettings.checked(method="wanda", allocation="fisher", sparsity=0.5, bits=bits)
    calibration = Calibration(str(text_file), samples=4, sequence_length=48)
    request = check(llama, settings, calibration, ANY_HARDWARE)
    tried = set()

    def measured(request, store, settings, ways):
        tried.update(ways)

        def found(number, key):
            factor = 50 if (number, key) == (0, "mlp.up_proj") else 1
            return [Found(factor * 10 ** (3 * way.sparsity), way.sparsity, 0) for way in ways]

        blocks = enumerate(request.shape.linears)
        return [{key: found(number, key) for key in own} for number, own in blocks]

    monkeypatch.setattr(fisher, "measure_losses", measured)
    first, second = fisher.by_fisher(request, None)
    assert first["mlp.up_proj"] < second["mlp.up_proj"] - 0.1
    assert first["mlp.down_proj"] == pytest.approx(second["mlp.down_proj"], abs=0.011)
    assert {way.bits for way in tried} == {bits}


def test_few_large_linears_are_not_divided_into_groups():
    tried = [0.25, 0.5, 0.75]
    losses = exponential([4.0, 4.0], tried)
    assert fisher.divided(0.5, (2, 4), [192, 6400], tried, losses) == [0.5, 0.5]
    losses = exponential([2.0, 4.0, 8.0], tried)
    assert fisher.divided(0.5, (2, 4), [64] * 3, tried, losses) == [0.75, 0.5, 0.25]
