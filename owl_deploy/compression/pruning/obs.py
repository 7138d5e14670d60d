"""The loop over columns that SparseGPT and GPTQ share: those to come make up for what one loses.

Weights are [out, in]; inside a block they lie as columns [b, out], so that a column is contiguous.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from owl_deploy.compression.pruning.triangular import invert_lower
from owl_deploy.compression.quantization.grid import Grid, decode
from owl_deploy.errors import BadInput

# (columns of the weight, their values [n, out] by then) -> which of them go, [out, n].
Choose = Callable[[slice, torch.Tensor], torch.Tensor]
# (the column's place in the block, its value [out]) -> its error; the value becomes what it stays.
Settle = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Factor:
    """What the loop needs of a Linear's inputs; Linears with the same input share one.

    `upper` [in, in]: the upper Cholesky factor of the inverse of the dampened Hessian; `dead` [in]:
    the inputs that are always zero.
    """

    upper: torch.Tensor
    dead: torch.Tensor


def damped(hessian: torch.Tensor, dampening: float) -> torch.Tensor:
    """X^T X [in, in] with `dampening` times its mean diagonal added; of dead inputs that mean.

    (SparseGPT's code gives those 1, which decides the mean where the others' inputs are small.)
    """
    found = hessian.float().clone()
    diagonal = found.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1 if dead.all() else diagonal[~dead].mean()
    diagonal += dampening * diagonal.mean()
    return found


def factorise(hessian: torch.Tensor, dampening: float) -> Factor:
    """Factorise X^T X [in, in] (any scale), `damped`.

    Raises `BadInput` when it is not positive definite even so.
    """
    try:
        # With the columns in reverse, H = L L^T gives H^-1 = U^T U for the upper U = L^-1 turned
        # back: one factorisation, where inverting and factorising again would take two and more.
        inverse = torch.linalg.cholesky(damped(hessian, dampening).flip(0, 1))
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined] # not re-exported
        raise BadInput(
            "The inputs of a layer depend on each other too much for SparseGPT, or for --bits.",
            "Give more --samples, or a larger --dampening.",
        ) from error
    invert_lower(inverse)
    return Factor(inverse.flip(0, 1).contiguous(), hessian.diagonal() == 0)


def settled(
    columns: torch.Tensor, carry: torch.Tensor, width: int, begin: Callable[[slice], Settle]
) -> torch.Tensor:
    """Settle the `columns` [b, out] in place, in their order; returns their errors [b, out].

    Before its turn a column loses `carry` [b, b] times the errors of those before it: in one
    product for the `width` of them that `begin` is told of then, and in one of its own.
    """
    errors = torch.empty_like(columns)
    for start in range(0, len(columns), width):
        part = slice(start, min(start + width, len(columns)))
        if start:
            columns[part].addmm_(carry[:start, part].T, errors[:start], alpha=-1)
        settle = begin(part)
        for place in range(part.start, part.stop):
            if place > start:
                before = slice(start, place)
                columns[place].addmv_(errors[before].T, carry[before, place], alpha=-1)
            errors[place] = settle(place, columns[place])
    return errors


@dataclass(frozen=True)
class Swept:
    """What a pass leaves: `weight` [out, in], what is `removed` of it, and with a grid the `codes`
    [out, groups] of its scales.
    """

    weight: torch.Tensor
    removed: torch.Tensor
    codes: torch.Tensor | None


@dataclass(frozen=True)
class Sweep:
    """One pass over the columns of a weight, in blocks of `step`.

    `choose` is asked for `together` columns at a time. With a `grid` what stays is rounded to it;
    its group and `together` then divide `step`, and one of them the other.
    """

    choose: Choose
    together: int
    step: int
    grid: Grid | None = None

    def over(self, weight: torch.Tensor, upper: torch.Tensor) -> Swept:
        """The float32 `weight` [out, in] pruned, rounded, and made up for by the later columns.

        `upper`: the factor of its inputs. SparseGPT's algorithm 1 (arXiv 2301.00774), with a grid
        its joint form, which is GPTQ (arXiv 2210.17323) where nothing goes.
        """
        weight = weight.clone()
        removed = torch.empty_like(weight, dtype=torch.bool)
        codes: list[torch.Tensor] = []
        window = self.grid.window(weight) if self.grid else (0, 0)
        for start in range(0, weight.shape[1], self.step):
            block = slice(start, min(start + self.step, weight.shape[1]))
            columns = weight[:, block].T.contiguous()
            gone = torch.empty_like(columns, dtype=torch.bool)
            errors = self._block(columns, gone, upper[block, block], start, codes, window)
            weight[:, block], removed[:, block] = columns.T, gone.T
            weight[:, block.stop :] -= errors.T @ upper[block, block.stop :]
        return Swept(weight, removed, torch.stack(codes, dim=1) if codes else None)

    def _block(
        self,
        columns: torch.Tensor,
        gone: torch.Tensor,
        upper: torch.Tensor,
        start: int,
        codes: list[torch.Tensor],
        window: tuple[int, int],
    ) -> torch.Tensor:
        """Settle the `columns` from `start` on; their errors. Fills `gone`, and adds to `codes`."""
        diagonal = upper.diagonal()
        grid = self.grid
        width = grid.group if grid else self.together

        def begin(part: slice) -> Settle:
            if part.start % self.together == 0:
                asked = slice(part.start, min(part.start + max(self.together, width), len(columns)))
                place = slice(start + asked.start, start + asked.stop)
                gone[asked] = self.choose(place, columns[asked]).T
            if grid is None:
                return _removing(gone, diagonal, part)
            # An error in column j costs error^2 / U_jj^2 after all later ones have done their best.
            kept = columns[part].masked_fill(gone[part], 0).T
            codes.append(grid.best_codes(kept, diagonal[part] ** -2, window))
            return _rounding(gone, diagonal, grid, decode(codes[-1]))

        return settled(columns, upper, width, begin)


def _removing(gone: torch.Tensor, diagonal: torch.Tensor, part: slice) -> Settle:
    share = gone[part] / diagonal[part].unsqueeze(1)  # [n, out]: 0 where it stays

    def settle(place: int, column: torch.Tensor) -> torch.Tensor:
        error = column * share[place - part.start]
        column.masked_fill_(gone[place], 0)
        return error

    return settle


def _rounding(
    gone: torch.Tensor, diagonal: torch.Tensor, grid: Grid, scale: torch.Tensor
) -> Settle:
    def settle(place: int, column: torch.Tensor) -> torch.Tensor:
        rounded = grid.nearest(column, scale).masked_fill_(gone[place], 0)
        error = (column - rounded) / diagonal[place]
        column.copy_(rounded)
        return error

    return settle
