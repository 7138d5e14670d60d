import pytest
import torch

from owl_deploy.compression.pruning import triangular


@pytest.mark.parametrize("size", [1, 3, 4, 5, 23])
def test_blocks_make_the_inverse(monkeypatch, size):
    monkeypatch.setattr(triangular, "_LEAF", 4)
    torch.manual_seed(0)
    lower = torch.randn(size, size, dtype=torch.float64).tril()
    lower.diagonal().abs_().add_(1)
    found = lower.clone()
    triangular.invert_lower(found)
    torch.testing.assert_close(found, torch.linalg.inv(lower))
    assert not found.triu(1).any()
