"""The inverse of a triangular matrix, by blocks."""

import torch

_LEAF = 512  # rows of a block that is inverted in one go


def invert_lower(matrix: torch.Tensor) -> None:
    """Put the inverse of the lower triangular `matrix` [n, n] in its place.

    [[A, 0], [C, B]] has the inverse [[A^-1, 0], [-B^-1 C A^-1, B^-1]]. That takes n^3 / 3
    operations, where solving for the identity takes n^3, of which most are with zeros.
    """
    size = len(matrix)
    if size <= _LEAF:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=False))
        return
    half = size // 2
    first, second, below = matrix[:half, :half], matrix[half:, half:], matrix[half:, :half]
    solved = torch.linalg.solve_triangular(second, below, upper=False)
    below.copy_(torch.linalg.solve_triangular(first, solved, upper=False, left=False).neg_())
    invert_lower(first)
    invert_lower(second)
