import pytest
import torch

from owl_deploy.prune.grid import Grid, decode
from owl_deploy.runtime import pack


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(8, -127, 127), (4, -8, 7), (3, -4, 3)])
def test_its_integers(bits, lowest, highest):
    grid = Grid(bits, 32)
    assert (grid.lowest, grid.highest) == (lowest, highest)
    found = grid.nearest(torch.tensor([-1e3, -0.6, 0.0, 0.4, 1e3]), torch.tensor(1.0))
    assert found.tolist() == [lowest, -1, 0, 0, highest]


def test_a_code_is_the_upper_bits_of_a_scale():
    codes = torch.tensor([16 * 127, 16 * 127 + 5, 16 * 120 + 15], dtype=torch.int32)
    assert decode(codes).tolist() == [1.0, 1 + 5 / 16, (1 + 15 / 16) / 128]


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1.0, 1e15])
def test_the_scales_fit_the_bytes_of_the_engine(bits, size):
    """Whatever the weights are: 16 binades, and the engine's own way to store them is exact."""
    generator = torch.Generator().manual_seed(0)
    spread = 10.0 ** (12 * torch.rand(64, 1, generator=generator) - 9)
    weight = size * spread * torch.randn(64, 32, generator=generator)
    weight[3] = 0
    grid = Grid(bits, 32)
    codes = grid.best_codes(weight, torch.ones(32), grid.window(weight))
    scales = decode(codes)
    assert bool((scales > 0).all())
    assert int(codes.max()) // 16 - int(codes.min()) // 16 <= 15
    exponent = max(0, (int(codes.max()) - 240) // 16)
    stored = (codes - 16 * exponent).numpy()
    assert stored.min() >= 0
    assert stored.max() <= 255
    assert torch.equal(torch.from_numpy(pack._decode_scales(stored, exponent)), scales)
    assert torch.equal(scales.bfloat16().float(), scales)


def test_the_scale_is_the_best_of_all_that_are_tried():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40, 32, generator=generator)
    weights = torch.rand(32, generator=generator)
    grid = Grid(3, 32)
    window = grid.window(values)
    found = grid.best_codes(values, weights, window)

    def errors(codes):
        return (grid.nearest(values, decode(codes).unsqueeze(1)) - values).square() @ weights

    highest = torch.maximum(values.amax(1) / 3, values.amin(1) / -4)
    assert bool((decode(found) <= highest * (1 + 1 / 16)).all())  # no larger than clips nothing
    for step in (-2, -1, 1):
        worse = errors(found + step) >= errors(found)
        assert bool((worse | (decode(found + step) > highest * (1 + 1 / 16))).all())
    assert bool((decode(found) < highest).any())  # clipping pays
