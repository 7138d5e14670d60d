"""See what enters a block's Linears while calibration text runs through it."""

import contextlib
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, TypeVarTuple

import torch
from torch import nn

from owl_deploy.models.blocks import Seen, check_finite
from owl_deploy.utils.ranks import Ranks

_READ = 64.0  # what a running mean counts, in tokens; 8 and infinitely many left a little more loss
_COLUMNS = 512  # of X^T X at a time: few enough to leave out nearly half, enough for full speed

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")


class InputStatistics:
    """What enters each Linear, gathered by hooks in forward passes.

    Linears that are given the same tensor (q, k and v; gate and up) share one statistic, and what
    is made of it. `samples` scales the norms, `hessian` says whether X^T X is gathered (its
    diagonal then gives the norms) or the squared norms alone. The Hessian of those in `read` holds
    the running means of the inputs, too: attention averages what such a Linear (the values')
    makes of many tokens, and reads the first ones most. What their errors have in common stays
    then, and what is theirs alone goes.

    What is gathered is of this process's windows; `samples` counts those of all `ranks`.
    """

    def __init__(
        self,
        linears: dict[str, nn.Linear],
        samples: int,
        *,
        hessian: bool,
        read: Collection[str] = (),
    ) -> None:
        self._samples, self._linears, self._hessian = samples, linears, hessian
        self._sums: dict[str, torch.Tensor] = {}
        self._read = {name: torch.zeros(()) for name in read}  # sums over the running means
        self._tokens: dict[str, torch.Tensor] = {}  # how many each sum is of
        self._crossed: dict[str, torch.Tensor] = {}
        self._leader: dict[str, str] = {}
        self._made: dict[Hashable, Any] = {}
        self._current: list[tuple[torch.Tensor, str]] = []
        self._calls, self._calls_a_pass = 0, 0  # of the pass at hand; of every pass, once known
        self._inputs_only = False

    @contextlib.contextmanager
    def gathering(self, *, inputs_only: bool = False) -> Iterator[None]:
        """Gather from all forward passes in the block.

        `inputs_only`: nobody wants the block's output, so that a pass ends with `Seen` at its last
        Linear, whose product need not be made. The first pass, run whole, tells which that is.
        Raises `BadInput` for inputs that are infinite, or no numbers.
        """
        self._inputs_only = inputs_only
        handles = [
            linear.register_forward_pre_hook(self._hook(name))
            for name, linear in self._linears.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._current.clear()
        for leader, total in self._sums.items():
            check_finite(self._squares(leader), f"what enters {leader}")
            if not self._hessian:
                continue
            for start in range(0, len(total), _COLUMNS):
                end = start + _COLUMNS
                total[end:, start:end] = total[start:end, end:].T

    def norm(self, name: str) -> torch.Tensor:
        """sqrt(sum over tokens of x_j^2 / samples) for the Linear `name`, [in], float32."""
        return self._root(self._squares(self._leader[name]))

    def norms(self, ranks: Ranks) -> dict[str, torch.Tensor]:
        """`norm` of every Linear over the tokens of all `ranks`, together."""
        total = {leader: ranks.summed(self._squares(leader)) for leader in self._sums}
        return {name: self._root(total[self._leader[name]]) for name in self._linears}

    def groups(self) -> list[list[str]]:
        """The Linears that share a statistic, in model order."""
        found: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            found.setdefault(leader, []).append(name)
        return list(found.values())

    def reduce(self, ranks: Ranks, owners: Mapping[str, int]) -> None:
        """Add up what the `ranks` have seen, together: of each Linear on its owner, nowhere else.

        `owners`: a rank for each Linear, the same for those of a group.
        """
        for group in self.groups():
            for name in group:
                if name in self._read:
                    ranks.reduce(self._read[name], owners[name])
            leader = group[0]
            ranks.reduce(self._sums[leader], owners[leader])
            ranks.reduce(self._tokens[leader], owners[leader])
            for key in (leader, *(f"{name} read" for name in group)):
                if key in self._crossed:
                    ranks.reduce(self._crossed[key], owners[leader])
            if owners[leader] != ranks.rank:
                del self._sums[leader]

    def _squares(self, leader: str) -> torch.Tensor:
        total = self._sums[leader]
        return total.diagonal() if self._hessian else total

    def _root(self, squares: torch.Tensor) -> torch.Tensor:
        return (squares / self._samples).sqrt().float()

    def of_hessian(
        self, name: str, make: Callable[[torch.Tensor, *Arguments], T], *arguments: *Arguments
    ) -> T:
        """What `make` gives for the Linear's X^T X [in, in], float32, and `arguments`; made once.

        `make` must leave the matrix as it is.
        """
        key = (name if name in self._read else self._leader[name], make, arguments)
        if key not in self._made:
            self._made[key] = make(self.hessian(name), *arguments)
        found: T = self._made[key]
        return found

    def hessian(self, name: str) -> torch.Tensor:
        """The Linear's X^T X [in, in], float32, to be left as it is."""
        assert self._hessian, "the method's row does not say that it needs it"
        total = self._sums[self._leader[name]]
        return total + _READ * self._read[name] if name in self._read else total

    def cross(self, leader: str, other: torch.Tensor) -> None:
        """Gather Y^T X [n, in] besides, for the inputs X of the pass that has just been run.

        `leader`: the first Linear of a group, which shares this too. `other` [..., n]: the rows of
        Y, a token each, which count as in X^T X.
        """
        rows = next(tensor for tensor, name in self._current if name == leader)
        self._cross(leader, other.flatten(0, -2).float(), rows.flatten(0, -2).float())
        for name in self._read:
            if self._leader[name] == leader:
                self._cross(f"{name} read", _running_means(other), _running_means(rows))

    def _cross(self, key: str, others: torch.Tensor, rows: torch.Tensor) -> None:
        if key not in self._crossed:
            self._crossed[key] = rows.new_zeros(others.shape[1], rows.shape[1])
        self._crossed[key].addmm_(others.T, rows)

    def crossed(self, name: str) -> torch.Tensor:
        """What `cross` has gathered for the Linear `name`, [n, in], its running means included."""
        found = self._crossed[self._leader[name]]
        return found + _READ * self._crossed[f"{name} read"] if name in self._read else found

    def unsure(self, name: str) -> float:
        """The inputs of a Linear over the tokens that were seen, by which X^T X is not to be taken
        at its word: about the share of its diagonal that serves best as dampening. 0 for those in
        `read`, whose diagonal the running means fill.
        """
        return 0.0 if name in self._read else min(1.0, self.a_token(name))

    def a_token(self, name: str) -> float:
        """The inputs of a Linear over the tokens that were seen."""
        leader = self._leader[name]
        return len(self._sums[leader]) / float(self._tokens[leader])

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self._current and name == self._current[0][1]:  # the first again: a new batch
                self._current.clear()
                self._calls, self._calls_a_pass = 0, self._calls
            self._calls += 1
            self.note(name, inputs[0])
            if self._inputs_only and self._calls == self._calls_a_pass:
                raise Seen

        return record

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Add `tensor` [..., in], which enters `name`, unless a Linear before it was given it.

        While gathering a Linear that is run does so itself.
        """
        if name in self._read:
            means = _running_means(tensor)
            self._read[name] = self._read[name].to(means.device) + means.T @ means
        for seen, leader in self._current:
            if seen is tensor:
                self._leader[name] = leader
                return
        if self._leader.setdefault(name, name) != name:
            raise AssertionError(f"{name} shared an input before and does not now")
        self._current.append((tensor, name))
        with _exact_products(tensor.dtype):
            self._add(name, tensor.reshape(-1, tensor.shape[-1]).float())

    def _add(self, name: str, rows: torch.Tensor) -> None:
        """Add the inputs `rows` [tokens, in] to the statistic."""
        counted = self._tokens.setdefault(name, rows.new_zeros((), dtype=torch.float64))
        counted += len(rows)
        if self._hessian:
            if name not in self._sums:
                self._sums[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
            for start in range(0, rows.shape[1], _COLUMNS):
                # On and above the diagonal: what lies below follows when all is gathered.
                part = slice(start, start + _COLUMNS)
                self._sums[name][part, start:].addmm_(rows[:, part].T, rows[:, start:])
        else:
            squares = rows.square().sum(dim=0).double()
            self._sums[name] = self._sums[name] + squares if name in self._sums else squares


@contextlib.contextmanager
def _exact_products(dtype: torch.dtype) -> Iterator[None]:
    """Make products of float32 matrices in the fastest way that is exact for values of a `dtype`.

    Those of bfloat16's are exact in bfloat16, whose products are added up in float32 (of a GPU, in
    TF32): where a processor has them X^T X takes a third of the time.
    """
    before = torch.get_float32_matmul_precision()
    if dtype == torch.bfloat16:
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _running_means(inputs: torch.Tensor) -> torch.Tensor:
    """Of each window in `inputs` [..., length, in] the means up to every token, [tokens, in]."""
    counts = torch.arange(1, inputs.shape[-2] + 1, device=inputs.device).unsqueeze(1)
    return (inputs.float().cumsum(-2) / counts).flatten(0, -2)


@dataclass(frozen=True)
class Inputs:
    """What a method may ask about the inputs of the Linear that it prunes, as far as it `needs` it.

    `statistics`: None where it needs nothing.
    """

    statistics: InputStatistics | None
    name: str

    def norm(self) -> torch.Tensor:
        """The L2 norm of each input feature, [in]."""
        assert self.statistics is not None
        return self.statistics.norm(self.name)

    def crossed(self) -> torch.Tensor:
        """Y^T X [n, in] for what the inputs were crossed with."""
        assert self.statistics is not None
        return self.statistics.crossed(self.name)

    def of_hessian(
        self, make: Callable[[torch.Tensor, *Arguments], T], *arguments: *Arguments
    ) -> T:
        """What `make` gives for X^T X [in, in] and `arguments`, once for Linears that share it."""
        assert self.statistics is not None
        return self.statistics.of_hessian(self.name, make, *arguments)

    def a_token(self) -> float:
        """How many they are over the tokens that were seen."""
        assert self.statistics is not None
        return self.statistics.a_token(self.name)

    def dampening(self, least: float) -> float:
        """The share of the mean diagonal to add to X^T X: more than the `least` for few tokens."""
        assert self.statistics is not None
        return max(least, self.statistics.unsure(self.name))
