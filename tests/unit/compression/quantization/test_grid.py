import pytest
import torch

from owl_deploy.compression.quantization.grid import Grid, decode
from owl_deploy.runtime import pack
from owl_deploy.runtime.value_types import INTEGERS


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
    scales = decode(grid.best_codes(weight, torch.ones(32), grid.window(weight)))
    assert bool((scales != 0).all())
    # What is squared to nothing tells no scale from another.
    assert bool((scales < 0).any()) == (bits < 8 and size > 1e-20)
    rounded = grid.nearest(weight, scales.unsqueeze(1))
    held = {"scales": scales.unsqueeze(1).numpy(), "scale_columns": 32}
    block = pack.pack(rounded.numpy(), INTEGERS[bits], sparse=False, **held)
    assert torch.equal(torch.from_numpy(pack.unpack(block)), rounded)
    assert torch.equal(scales.bfloat16().float(), scales)


@pytest.mark.parametrize("bits", [8, 4, 3])
def test_float16_holds_all_that_a_grid_for_it_has(bits):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 32, generator=generator) * torch.logspace(-9, -3, 64).unsqueeze(1)
    for dtype, exact in ((torch.float16, True), (torch.float32, False)):
        grid = Grid(bits, 32, dtype)
        window = grid.window(weight)
        assert window[1] - window[0] == 16 * 16 - grid._step
        scales = decode(grid.best_codes(weight, torch.ones(32), window)).unsqueeze(1)
        places = grid.nearest(weight, scales).half().float() / scales
        assert bool(((places - places.round()).abs() < 0.07).all()) == exact


def test_the_scale_is_the_best_of_all_that_are_tried():
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(40, 32, generator=generator)
    weights = torch.rand(32, generator=generator)
    grid = Grid(3, 32)
    window = grid.window(values)
    found = grid.best_codes(values, weights, window)

    def errors(codes):
        return (grid.nearest(values, decode(codes).unsqueeze(1)) - values).square() @ weights

    def highest(signs):
        return torch.maximum((signs * values).amax(1) / 3, (signs * values).amin(1) / -4)

    scales = decode(found)
    own = highest(scales.sign().unsqueeze(1))
    assert bool((scales.abs() <= own * (1 + 1 / 8)).all())  # no larger than clips nothing
    assert bool((scales.abs() < own).any())  # clipping pays
    assert bool((scales < 0).any())
    assert bool((scales > 0).any())
    for sign in (1.0, -1.0):
        clips_nothing = highest(torch.full((40, 1), sign))
        for eighths in range(-30, 10):
            binade, mantissa = divmod(eighths, 8)
            scale = sign * 2.0**binade * (1 + mantissa / 8)
            codes = (torch.tensor(scale).view(torch.int32) >> 19 & 0x1FFF).expand(40)
            share = abs(scale) / clips_nothing
            tried = (share > 0.5) & (share < 1 + 1 / 8)
            assert bool((errors(codes) >= errors(found))[tried].all())


def test_a_scale_below_zero_reaches_further_above_it():
    values = torch.tensor([[4.0, 1.0, -3.0, 2.0]])
    grid = Grid(3, 4)
    scale = decode(grid.best_codes(values, torch.ones(4), grid.window(values)))
    assert scale.tolist() == [-1.0]
    assert torch.equal(grid.nearest(values, scale.unsqueeze(1)), values)
