import itertools

import pytest
import torch

from owl_deploy.compression.pruning import mask, score
from tests.reference import owl as reference

SPARSITIES = [0.0, 0.001, 0.25, 0.5, 0.7, 0.731, 0.99, 1.0]


def tied_weight(rows: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * columns)
    return torch.randint(-4, 5, (rows, columns), generator=generator) / 4


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (5, 16), (16, 33)])
def test_row_masks_equal_the_oracles_with_ties(shape, sparsity):
    weight = tied_weight(*shape)
    norm = torch.arange(shape[1]) % 3 / 2
    found = mask.lowest_in_rows(score.wanda(weight, norm), sparsity)
    assert torch.equal(found, reference.wanda_mask(weight, norm, sparsity))


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (16, 33)])
def test_matrix_masks_equal_the_oracles_with_ties(shape, sparsity):
    weight = tied_weight(*shape)
    found = mask.lowest_in_matrix(score.magnitude(weight), sparsity)
    assert torch.equal(found, reference.magnitude_mask(weight, sparsity))


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (3, 8), (1, 2)])
def test_group_masks_equal_the_oracles_with_ties(kept, group):
    weight = tied_weight(5, 16)
    found = mask.lowest_in_groups(score.magnitude(weight), kept, group)
    for row, start in itertools.product(range(5), range(0, 16, group)):
        part = weight[row, start : start + group].abs().tolist()
        gone = found[row, start : start + group].nonzero().flatten().tolist()
        assert set(gone) == reference.lowest(part, group - kept)


def test_the_variant_removes_what_one_alpha_would():
    weight = torch.randn(8, 24, generator=torch.Generator().manual_seed(4))
    norm = torch.rand(24, generator=torch.Generator().manual_seed(5))
    found = mask.lowest_in_matrix(score.wanda_share(weight, norm), 0.5)
    assert found.sum().item() == 96
    scores = score.wanda(weight, norm).double()
    shares = torch.stack([row.sort().values.cumsum(0) / row.sum() for row in scores])
    alpha = shares.flatten().sort().values[95]  # what the paper's code searches by bisection
    assert torch.equal(found.sum(1), (shares <= alpha).sum(1))
    for row in range(8):
        kept, gone = scores[row][~found[row]], scores[row][found[row]]
        assert gone.max() <= kept.min()


def test_equal_scores_lose_exactly_what_was_asked():
    found = mask.lowest_in_rows(torch.ones(3, 10), 0.35)
    assert found.sum().item() == round(0.35 * 30)
    assert found.sum(1).tolist() in ([3, 3, 4], [3, 4, 3], [4, 3, 3])
