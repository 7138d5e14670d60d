import pytest
import torch

from owl_deploy.compression.allocation.candidates import in_steps


def test_what_changed_is_kept_to_half_a_step():
    difference = torch.randn(5, 300) * torch.tensor([1.0, 1e-3, 30.0, 1e-8, 0.0])[:, None]
    kept, step = in_steps(difference)
    assert kept.dtype == torch.int8
    assert step.tolist() == pytest.approx((difference.abs().amax(1) / 127).tolist())
    assert ((kept * step[:, None] - difference).abs() <= 0.5001 * step[:, None]).all()
    assert not kept[4].any()
