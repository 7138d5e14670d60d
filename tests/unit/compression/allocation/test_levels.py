import pytest
import torch

from owl_deploy.compression.allocation.interpolate import in_steps, mixed
from tests.reference import divergence as reference

TRIED = (0.3, 0.5, 0.8, 0.96)


def test_what_changed_is_kept_to_half_a_step():
    difference = torch.randn(5, 300) * torch.tensor([1.0, 1e-3, 30.0, 1e-8, 0.0])[:, None]
    kept, step = in_steps(difference)
    assert kept.dtype == torch.int8
    assert step.tolist() == pytest.approx((difference.abs().amax(1) / 127).tolist())
    assert ((kept * step[:, None] - difference).abs() <= 0.5001 * step[:, None]).all()
    assert not kept[4].any()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.42, 0.5, 0.66, 0.8, 0.93, 0.96])
def test_rows_are_as_at_the_two_nearest_levels(sparsity):
    dense = torch.randn(50, 40, generator=torch.Generator().manual_seed(4)) + 3
    levels = {one: reference.lowest_removed(dense, torch.ones(40), one) for one in TRIED}
    kept = [in_steps(one - dense) for one in levels.values()]
    difference, step = (torch.stack(one) for one in zip(*kept, strict=True))
    found = mixed(dense, difference, step, TRIED, sparsity)
    expected = reference.rows_mixed(dense, levels, sparsity)
    assert torch.allclose(found, expected, atol=float(step.max()))
    # Evenly spread, of 50 rows and of ten of them too.
    for rows, off in ((slice(50), 0.02), (slice(20, 30), 0.06)):
        zeros = (found[rows].abs() <= step.max()).double().mean()
        assert float(zeros) == pytest.approx(sparsity, abs=off)
