import pkgutil

import pytest
import torch

from owl_deploy.compression.input_statistics import Inputs
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.methods import METHODS, SparseGPTOptions
from owl_deploy.compression.pruning import mask, obs, score, sparsegpt
from owl_deploy.compression.quantization import rounding
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.quantization.grid import Grid, decode
from owl_deploy.compression.settings import PruneSettings
from tests.reference import rounding as reference

BLOCK = 16  # of the joint form here: two blocks


@pytest.fixture(scope="module")
def layer():
    # Of a draw in which float32 and the oracle's float64 never part between two steps of a grid.
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(6, 28, generator=generator)
    weight[2, 16:24] *= 1e-3  # a group whose scale is far below the others'
    mix = torch.eye(28) + 0.2 * torch.randn(28, 28, generator=generator)  # features correlate
    inputs = torch.randn(400, 28, generator=generator) @ mix
    inputs[:, 7] = 0  # a dead input
    return weight, inputs, inputs.T @ inputs


class Known(Inputs):
    """What a method may ask, answered from a Hessian, of many tokens unless it is told."""

    def __init__(self, hessian, share=0.0):
        super().__init__(None, "")
        object.__setattr__(self, "hessian", hessian)
        object.__setattr__(self, "share", share)

    def dampening(self, least):
        return max(least, self.share)

    def norm(self):
        return self.hessian.diagonal().sqrt()

    def of_hessian(self, make, *arguments):
        return make(self.hessian, *arguments)


def prune_and_round(method, weight, hessian, sparsity, group, grid, share=0.0):
    """As the walk does it."""
    row, inputs = METHODS[method], Known(hessian, share)
    asked = (weight, inputs, sparsity, group, row.options())
    if row.joint:
        swept = pkgutil.resolve_name(row.joint)(*asked, grid)
    else:
        pruned = pkgutil.resolve_name(row.prune)(*asked)
        swept = rounding.round_pruned(weight, pruned, pruned == 0, inputs, grid)
    return rounding.finished(swept, weight, inputs, grid)


def error(weight, dense, hessian):
    """Of the outputs, squared and summed over the calibration inputs."""
    lost = (weight - dense).double()
    return ((lost @ hessian.double()) * lost).sum().item()


@pytest.mark.parametrize("method", ["none", "sparsegpt", "magnitude"])
def test_few_tokens_are_not_taken_at_their_word(method):
    """Dampened by the inputs over the tokens, a weight errs less on others than by GPTQ's 0.01."""
    sparsity = 0.5 if METHODS[method].removes else 0.0
    errors = {0.0: 0.0, 64 / 96: 0.0}  # by the dampening
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(24, 64, generator=generator)
        mix = torch.eye(64) + 0.3 * torch.randn(64, 64, generator=generator)
        seen, others = (torch.randn(n, 64, generator=generator) @ mix for n in (96, 4096))
        hessian = others.T @ others
        for share in errors:
            found = prune_and_round(
                method, weight, seen.T @ seen, sparsity, None, Grid(3, 32), share
            )
            errors[share] += error(found[0], weight, hessian)
    assert errors[64 / 96] < 0.98 * errors[0.0]


def masks(layer):
    weight, inputs, _ = layer
    scores = score.wanda(weight, inputs.norm(dim=0))
    return {
        "dense": torch.zeros_like(weight, dtype=torch.bool),
        "half": mask.lowest_in_rows(scores, 0.5),
        "2:4": mask.lowest_in_groups(scores, 2, 4),
        "a whole group": torch.arange(28).expand(6, 28) < 8,
    }


@pytest.mark.parametrize("removed", ["dense", "half", "2:4", "a whole group"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_a_fixed_mask_equals_the_definition(layer, bits, removed):
    weight, _, hessian = layer
    gone, grid = masks(layer)[removed], Grid(bits, 8)
    swept = rounding.rounded(weight, gone, obs.factorise(hessian, 0.01), grid)
    expected, scales = reference.round_weight(weight, hessian, bits, 8, gone)
    assert torch.equal(decode(swept.codes).double(), scales.double())
    assert torch.allclose(swept.weight.double(), expected, rtol=1e-6, atol=0)
    found = rounding.refined(swept, weight, obs.damped(hessian, 0.01), grid)
    expected = reference.refine(expected, weight, hessian, scales, gone, bits, 8)
    assert torch.allclose(found.double(), expected, rtol=1e-6, atol=0)
    assert error(found, weight, hessian) <= error(swept.weight, weight, hessian)


def test_the_largest_inputs_come_first_and_groups_stay_together():
    """Of 14 columns in fours: groups by their means, columns within; the last two stay last."""
    squares = torch.tensor([1.0, 4, 2, 3, 9, 9, 1, 9, 0, 0, 0, 0, 50, 60])
    assert rounding.by_size(squares, 4).tolist() == [4, 5, 7, 6, 1, 3, 2, 0, 8, 9, 10, 11, 13, 12]


@pytest.mark.parametrize("removed", ["dense", "half"])
@pytest.mark.parametrize("bits", [4, 3])
def test_in_that_order_it_equals_the_definition(layer, bits, removed):
    """The definition on a weight whose columns lie so; a group of 28 columns in eights has four."""
    weight, _, hessian = layer
    gone = masks(layer)[removed]
    order = rounding.by_size(hessian.diagonal(), 8)
    assert order.sort().values.tolist() == list(range(28))
    asked = (weight, weight.masked_fill(gone, 0), gone, Known(hessian), Grid(bits, 8))
    found = rounding.round_pruned(*asked)
    expected, scales = reference.round_weight(
        weight[:, order], hessian[order][:, order], bits, 8, gone[:, order]
    )
    assert torch.allclose(found.weight[:, order].double(), expected, rtol=1e-6, atol=0)
    places = decode(found.codes).repeat_interleave(8, dim=1)[:, :28]
    of_columns = scales.repeat_interleave(8, dim=1)[:, :28]
    assert torch.equal(places[:, order].double(), of_columns.double())
    assert torch.equal(found.removed, gone)


def test_that_order_errs_less_than_that_in_which_they_lie():
    """On other inputs, where these differ in size."""
    errors = {"lie": 0.0, "size": 0.0}
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(24, 128, generator=generator)
        mix = torch.eye(128) + 0.1 * torch.randn(128, 128, generator=generator)
        mix = mix * (1.5 * torch.randn(128, generator=generator)).exp()
        seen, others = (torch.randn(n, 128, generator=generator) @ mix for n in (1024, 4096))
        hessian, kept = seen.T @ seen, torch.zeros_like(weight, dtype=torch.bool)
        lying = rounding.rounded(weight, kept, obs.factorise(hessian, 0.01), Grid(3, 32))
        ordered = rounding.round_pruned(weight, weight, kept, Known(hessian), Grid(3, 32))
        for name, swept in (("lie", lying), ("size", ordered)):
            errors[name] += error(swept.weight, weight, others.T @ others)
    assert errors["size"] < 0.9 * errors["lie"]


@pytest.mark.parametrize(
    ("sparsity", "group"), [(0.5, None), (0.7, None), (0.5, (2, 4)), (0, None)]
)
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_the_joint_form_equals_the_definition(layer, bits, sparsity, group):
    weight, _, hessian = layer
    grid, options = Grid(bits, 8), SparseGPTOptions(block_size=BLOCK)
    factor = obs.factorise(hessian, 0.01)
    found = sparsegpt.updated(weight, factor, sparsity, group, options, grid)
    choice = reference.sparsegpt_choice(*weight.shape, sparsity, group, BLOCK)
    dense = weight.masked_fill(factor.dead, 0)
    expected, scales = reference.round_weight(dense, hessian, bits, 8, choice)
    assert torch.equal(decode(found.codes).double(), scales.double())
    assert torch.allclose(found.weight.double(), expected, rtol=1e-6, atol=0)
    assert found.removed.float().mean().item() == pytest.approx(sparsity, abs=0.01)


def test_by_hand():
    """Two correlated inputs, 3 bits, one scale: what the first loses the second makes up for."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    weight = torch.tensor([[1.0, 2.4]])
    factor = obs.Factor(torch.linalg.cholesky(hessian.inverse()).T.contiguous(), None)
    kept = torch.zeros(1, 2, dtype=torch.bool)
    grid = Grid(3, 2)
    swept = rounding.rounded(weight, kept, factor, grid)
    # 3 bits are -4 to 3. Of 13/16, the least that reaches 2.4, down to 1/4, 13/16 costs least: the
    # first column's error counts 3/2 (the inverse of [H^-1]_00), the second's 2; below zero, where
    # -5/8 is the first that reaches it, none costs as little. Its first column
    # loses 1 - 13/16 = 3/16, of which the second takes H_01 / H_11 = 1/2: 2.4 + 3/32 -> 3 x 13/16.
    assert decode(swept.codes).tolist() == [[0.8125]]
    assert swept.weight.tolist() == [[0.8125, 2.4375]]
    assert torch.equal(rounding.refined(swept, weight, hessian, grid), swept.weight)


def test_a_removed_column_hands_on_what_drifted_into_it():
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 2.0, 1.0], [0.0, 1.0, 2.0]])
    factor = obs.Factor(torch.linalg.cholesky(hessian.inverse()).T.contiguous(), None)
    removed = torch.tensor([[False, True, False]])
    start = torch.tensor([[1.4, 0.0, 6.0]])
    swept = rounding.rounded(start, removed, factor, Grid(4, 4))
    scale = decode(swept.codes).item()
    first = round(1.4 / scale) * scale
    drift = (1.4 - first) * 2 / 3  # into the second: H_2:^-1 of columns 1 and 2, times (1, 0)
    third = 6.0 - (1.4 - first) / 3 + drift / 2  # the first's own share, and what the second had
    assert swept.weight[0, 1] == 0
    assert swept.weight[0, 2].item() == pytest.approx(round(third / scale) * scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("group", [None, (2, 4)])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_on_the_grid_and_better_than_rounding_to_nearest(layer, method, group, bits):
    weight, _, hessian = layer
    row, grid = METHODS[method], Grid(bits, 32)
    asked = (0.5, group) if row.removes else (0.0, None)
    found, scales = prune_and_round(method, weight, hessian, *asked, grid)
    assert (scales.dtype, list(scales.shape)) == (torch.bfloat16, [6, 1])
    integers = (found / scales.float()).round()
    assert torch.equal(integers * scales.float(), found)
    assert grid.lowest <= integers.min() <= integers.max() <= grid.highest
    if bits < 8:
        assert torch.equal(found, found.bfloat16().float())
    assert torch.equal((found.bfloat16().float() / scales.float()).round(), integers)
    gone = found == 0
    if row.removes:
        assert gone.float().mean().item() >= 0.5
    if group and row.removes:
        assert int((~gone).reshape(-1, 4).sum(1).max()) <= 2
    nearest = grid.nearest(weight, weight.abs().amax(1, keepdim=True) / grid.highest)
    assert error(found, weight, hessian) <= error(nearest.masked_fill(gone, 0), weight, hessian)


@pytest.mark.parametrize("method", METHODS)
def test_where_nothing_is_removed_every_method_rounds_alike(layer, method):
    weight, _, hessian = layer
    form, found = Format(4), []
    for one in ("none", method):
        maker = Maker(PruneSettings.checked(method=one, sparsity=0.0, bits=4))
        found.append(maker.make(weight, Known(hessian), form))
    assert torch.equal(found[0].weight, found[1].weight)
    assert torch.equal(found[0].scales, found[1].scales)


def test_zeros_stay_zeros_without_a_method(layer):
    weight, _, hessian = layer
    weight = weight.masked_fill(masks(layer)["half"], 0)
    found, _ = prune_and_round("none", weight, hessian, 0.0, None, Grid(4, 32))
    assert bool((found[weight == 0] == 0).all())


def test_what_a_method_only_removed_is_made_up_for_and_what_it_moved_is_not_moved_again(layer):
    weight = layer[0]
    gone = masks(layer)["half"]
    assert rounding.beginning(weight, weight.masked_fill(gone, 0)) is weight
    moved = (1.01 * weight).masked_fill(gone, 0)
    assert rounding.beginning(weight, moved) is moved


def test_the_size_of_the_inputs_decides_nothing(layer):
    """Not even beside a dead one: what is rounded of 1e-3 of them is what is rounded of them."""
    weight, _, hessian = layer
    found = [
        prune_and_round("none", weight, hessian * scale, 0.0, None, Grid(3, 8))
        for scale in (1.0, 2.0**-20)
    ]
    assert torch.equal(found[0][0], found[1][0])
