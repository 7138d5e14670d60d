import torch

from owl_deploy.compression.allocation.rules import ALLOCATIONS, Allocation
from owl_deploy.compression.allocation.sparsities import BlockStatistics
from owl_deploy.compression.measure import block_statistics
from owl_deploy.compression.pruning.score import median_score, outlier_ratio


def test_median_is_over_the_whole_block():
    assert median_score([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0, 5.0]])]) == 3


def test_outlier_ratio_counts_over_the_whole_block():
    scores = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 9.0]])]  # mean 3, so 2 * 3 < 9
    assert [outlier_ratio(scores, m) for m in (2, 3)] == [25.0, 0.0]  # 9 is not above 3 * 3


def test_a_statistic_is_of_the_block_or_of_each_linear():
    scores = [torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 9.0]]), torch.tensor([[2.0] * 4])]
    outliers = ALLOCATIONS["owl"].statistic
    for per, multiple, values in (  # the means: 2.5 of all, 1, 5 and 2
        ("block", 1.5, [12.5]),
        ("block", 2, [12.5]),
        ("Linear", 1.5, [0.0, 50.0, 0.0]),
        ("Linear", 2, [0.0, 0.0, 0.0]),
    ):
        found = block_statistics(scores, multiple, Allocation(None, 0.1, outliers, per))
        assert found == BlockStatistics(12.5, values)
    median = Allocation(None, 0.1, ALLOCATIONS["dlp"].statistic, "Linear")
    assert block_statistics(scores, 3, median).values == [1.0, 1.0, 2.0]
    assert block_statistics([], 3, median) == BlockStatistics(None, [])
