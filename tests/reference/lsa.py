"""LSA's error of a Linear (ICLR 2026, algorithm 1), by its definition: the outputs of each row."""

import torch


def least_error(weight: torch.Tensor, inputs: torch.Tensor, share: float, width: int) -> float:
    """The squared error of the outputs [tokens] of every row [in] without what goes, summed.

    `inputs` [tokens, in]. Of each `width` columns in turn the `share` goes, one at a time: that
    without which, and without all that have gone before, the row's outputs err least.
    """
    total = 0.0
    for row in weight.double():
        gone = torch.zeros_like(row)
        for start in range(0, len(row), width):
            columns = range(start, min(start + width, len(row)))
            left = list(columns)
            for _ in range(int(share * len(columns))):
                errors = [_error(row, gone, at, inputs.double()) for at in left]
                at = left.pop(min(range(len(left)), key=lambda place: errors[place]))
                gone[at] = row[at]
        total += float((inputs.double() @ gone).square().sum())
    return total


def _error(row: torch.Tensor, gone: torch.Tensor, at: int, inputs: torch.Tensor) -> float:
    without = gone.clone()
    without[at] = row[at]
    return float((inputs @ without).square().sum())
