"""What a gain in speed leaves to the pruned Linears, by hand."""

import math

import pytest
import torch

from owl_deploy.compression.quantization import latency
from owl_deploy.compression.quantization.budget import spend
from owl_deploy.compression.quantization.formats import Format
from owl_deploy.compression.quantization.latency import Clock, room_in_time
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.models.manifest import Cost
from owl_deploy.runtime import timing

SIZE = (4, 8)
INT8, INT4, HALF = Format(8), Format(4), Format(4, 0.5)
# Two pruned Linears, an output head of 2 s, and one Linear that stays: 3 s in int8, 1 s in int4.
TIMES = {(SIZE, INT8): 10.0, (SIZE, INT4): 6.0, (SIZE, HALF): 4.0}
CLOCK = Clock(each=TIMES, whole=2 + 2 * 10 + 3, rest=2 + 1)


def test_the_room_of_a_gain():
    assert CLOCK.room(1.25) == pytest.approx(17)  # 25 / 1.25 - 3
    assert CLOCK.speed_up(17) == pytest.approx(1.25)
    assert room_in_time(CLOCK, [SIZE, SIZE], "1.25x", 1.25) == pytest.approx(17)


def test_what_cannot_be_had():
    with pytest.raises(BadInput, match=r"more than this machine's kernels gain on this .* 2\.27x"):
        room_in_time(CLOCK, [SIZE, SIZE], "2.3x", 2.3)  # 25 / 11


def test_time_is_spent_and_not_bytes():
    """A format that is smaller and slower is not taken to be faster."""
    small = Cost(bits=4, sparsity=0.5, bytes=1, loss=0.2, microseconds=9.0)
    fast = Cost(bits=4, sparsity=0.0, bytes=5, loss=0.1, microseconds=4.0)
    block = {"q": [small, fast]}
    assert spend([block], 5, time=True)[0]["q"] == fast
    assert spend([block], 4)[0]["q"] == small


class _Skeleton:
    head = torch.nn.Linear(16, 64, bias=False)

    def linears(self, index):
        return {"a": torch.nn.Linear(16, 32), "b": torch.nn.Linear(16, 32)}


def test_real_kernels_are_timed():
    from owl_deploy.compression.allocation.sparsities import Shape

    shape = Shape(["block"], [{"a": 512}])
    found = latency.measure(PruneSettings.checked(budget="1.2x"), _Skeleton(), shape)
    assert set(found.each) == {((32, 16), form) for form in latency.formats("sparsegpt")}
    assert all(0 < took < 1 for took in found.each.values())
    assert found.rest > 0


def test_what_a_gain_may_not_take_from_is_timed_apart(monkeypatch):
    """The head as a token reads it, and Linears that stay, in 4 bits; what is pruned in 8."""
    from owl_deploy.compression.allocation.sparsities import Shape

    def by_bits(_library, shape, values, _sparsity, **_how):
        return math.prod(shape) * int(values.removeprefix("int"))

    monkeypatch.setattr(timing, "from_memory", by_bits)
    settings = PruneSettings.checked(budget="1.2x", head_bits=3)
    found = latency.measure(settings, _Skeleton(), Shape(["block"], [{"a": 512}]))
    head, linear = 16 * 64, 16 * 32
    assert found.whole == 4 * head + 8 * linear + 8 * linear
    assert found.rest == 3 * head + 4 * linear
    assert found.each[(32, 16), Format(3)] == 3 * linear


def test_without_the_library(monkeypatch, tmp_path):
    from owl_deploy.compression.allocation.sparsities import Shape

    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(EnvironmentFailed, match="is missing"):
        latency.measure(
            PruneSettings.checked(budget="1.2x"), _Skeleton(), Shape(["block"], [{"a": 512}])
        )
