import torch

from owl_deploy.compression.pruning.score import outlier_ratio


def test_outlier_ratio_counts_over_the_whole_block():
    scores = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 9.0]])]  # mean 3, so 2 * 3 < 9
    assert [outlier_ratio(scores, m) for m in (2, 3)] == [25.0, 0.0]  # 9 is not above 3 * 3
