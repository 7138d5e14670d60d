"""One option for each weight, by trying all of them."""

import itertools


def best(weights, budget):
    """The least loss of all choices whose sizes sum to at most `budget`."""
    losses = [
        sum(option.loss for option in choice)
        for choice in itertools.product(*weights)
        if sum(option.size for option in choice) <= budget
    ]
    return min(losses)


def corners(options):
    """The options that win at some price of a byte, by trying the prices between any two."""
    prices = {
        (one.loss - other.loss) / (other.size - one.size)
        for one, other in itertools.permutations(options, 2)
        if other.size != one.size
    }
    tried = sorted({0.0, *(price for price in prices if price > 0)})
    between = [(a + b) / 2 for a, b in itertools.pairwise(tried)]
    found = set()
    for price in [*between, tried[-1] + 1, tried[1] / 2 if len(tried) > 1 else 1.0]:
        found.add(
            min(
                range(len(options)),
                key=lambda i: (options[i].loss + price * options[i].size, options[i].size, i),
            )
        )
    return sorted(found, key=lambda i: options[i].size)
