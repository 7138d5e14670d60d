"""Each Linear has one owner, those of a group the same; nobody has much more to do than others."""

import torch
from torch import nn

from owl_deploy.compression.partition import owners

NARROW = 4


def linears(**shapes):
    with torch.device("meta"):
        return {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}


def test_by_hand():
    # Weights: a group of two with 64 + 64, and three of 96, 64 and 32.
    own = linears(q=(NARROW, 16), k=(NARROW, 16), o=(8, 12), up=(8, 8), down=(8, 4))
    groups = [["q", "k"], ["o"], ["up"], ["down"]]
    found = owners(groups, own, 2, hessian=False)
    assert found == {"q": 0, "k": 0, "o": 1, "up": 1, "down": 0}  # 128 + 32 and 96 + 64


def test_a_factorisation_counts_by_the_width():
    # As many weights each; of the wide one's 6000 inputs the factorisation takes most of the time:
    # 7.2e10 of 9.9e10 products; a narrow one takes 0.9e10 in all.
    own = linears(wide=(6000, 1000), a=(1000, 6000), b=(1000, 6000), c=(1000, 6000))
    groups = [[name] for name in own]
    assert owners(groups, own, 2, hessian=True) == {"wide": 0, "a": 1, "b": 1, "c": 1}
    assert owners(groups, own, 2, hessian=False) == {"wide": 0, "a": 1, "b": 0, "c": 1}


def test_one_has_all_and_many_have_one_at_most():
    own = linears(a=(NARROW, 4), b=(NARROW, 4))
    assert owners([["a"], ["b"]], own, 1, hessian=True) == {"a": 0, "b": 0}
    assert owners([["a"], ["b"]], own, 5, hessian=True) == {"a": 0, "b": 1}
    assert owners([], own, 2, hessian=True) == {}
