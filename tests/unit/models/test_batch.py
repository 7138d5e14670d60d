from types import SimpleNamespace

import pytest
import torch

from owl_deploy.models import batch as batches
from owl_deploy.models.batch import find_batch

GROUPED = {"num_attention_heads": 32, "num_key_value_heads": 8}
WINDOWS = torch.zeros(512, 2048, dtype=torch.long)


def batch(monkeypatch, config, device="cuda", dtype=torch.bfloat16, major=8, free=16 * 2**30):
    """What is chosen on a device that is not here."""
    monkeypatch.setattr(batches, "free_on", lambda _: free)
    properties = SimpleNamespace(major=major)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    checkpoint = SimpleNamespace(config={"hidden_size": 2048, "intermediate_size": 8192} | config)
    skeleton = SimpleNamespace(checkpoint=checkpoint, device=torch.device(device), dtype=dtype)
    return find_batch(None, WINDOWS, skeleton)


def test_the_mlp_counts_by_either_of_its_names(monkeypatch):
    usual = batch(monkeypatch, {})
    assert batch(monkeypatch, {"intermediate_size": None, "ffn_dim": 8192}) == usual
    assert batch(monkeypatch, {"intermediate_size": None}) > 2 * usual


@pytest.mark.parametrize(
    ("dtype", "major", "grouped"),
    [
        (torch.float32, 9, True),
        (torch.float16, 7, True),
        (torch.float16, 8, False),
        (torch.bfloat16, 8, False),
    ],
)
def test_scores_of_grouped_heads_count_where_no_fused_kernel_takes_them(
    monkeypatch, dtype, major, grouped
):
    plain = batch(monkeypatch, {"num_attention_heads": 32}, dtype=dtype, major=major)
    found = batch(monkeypatch, GROUPED, dtype=dtype, major=major)
    assert (found < plain) == grouped
    if grouped:
        a_sample = 2048 * (8 * 2048 + 4 * 8192) * dtype.itemsize + 13 * 32 * 2048**2
        assert found == 4 * 2**30 // a_sample


def test_a_processor_counts_tokens_alone(monkeypatch):
    found = [batch(monkeypatch, one, device="cpu", dtype=torch.float32) for one in ({}, GROUPED)]
    assert found == [1, 1]
