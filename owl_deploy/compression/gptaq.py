"""`owl prune --asymmetric`: each Linear makes up for what the pruned ones before it have lost.

SparseGPT and GPTQ keep what a dense weight W [out, in] makes of the inputs X [tokens, in] as they
are in the pruned model. GPTAQ (arXiv 2504.02692) keeps what W makes of the dense model's inputs D:

    W' = W + W (D - X)^T X (X^T X + ridge)^-1

has the least squared error, and is what a solver is then given in the place of W. Where a Linear's
outputs are added to the stream of hidden states, what counts is the stream, S in the dense model
and R in the pruned one with W in place, whose error is then made up for, all that came before it
included:

    W' = W + (S - R)^T X (X^T X + ridge)^-1

what a reconstruction aims at, in closed form. A token that is far off counts less (`_counting`). By
the first rule alone int3 of SmolLM2-135M gained nothing, 19.17 of perplexity without it and with
it; with both it had 18.44. Both hold only where X is what will enter, so that the Linears of a
block are pruned in the order in which it runs, those that share an input together, each on what
those before it let through (GPTQ's "true sequential").
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.pruning.refit import raised, refit
from owl_deploy.compression.reconstruct import Streams
from owl_deploy.compression.sublayers import Run, ending_at, halves
from owl_deploy.models.blocks import Activations
from owl_deploy.models.families import Family
from owl_deploy.utils.progress import Advance

_RIDGE, _LEAST = 16, 0.01  # shares of each diagonal: of inputs over tokens, and so much anyway
_FAR = 0.5  # of a token's size: a larger error counts as this


@dataclass(frozen=True)
class Twins:
    """A block, loaded: with what is pruned of it so far, and with its dense weights."""

    pruned: nn.Module
    dense: nn.Module

    def on(self, streams: Streams) -> tuple[tuple[nn.Module, Activations], ...]:
        """The dense block and the pruned one, with what enters each."""
        return (self.dense, streams.dense), (self.pruned, streams.pruned)


def stages(
    block: nn.Module, linears: Mapping[str, nn.Linear], states: Activations, index: int
) -> list[list[str]]:
    """The `linears` of block `index` in the order in which it runs them, by their inputs."""
    statistics = InputStatistics(dict(linears), 1, hessian=False)
    with statistics.gathering(), torch.no_grad():
        block(states.hidden[:1].to(states.device), **states.arguments[index])
    return statistics.groups()


def writes(family: Family, linear: str) -> bool:
    """Whether the outputs of a block's Linear are added to the stream as they are."""
    return linear.rpartition(".")[2] in family.writers


def gather(
    statistics: InputStatistics,
    stage: Sequence[str],
    blocks: Twins,
    index: int,
    streams: Streams,
    family: Family,
    advance: Advance,
    *,
    keep: bool,
) -> None:
    """Run both streams up to the Linears of a `stage`, for what `aimed` asks of the `statistics`.

    The streams are those that enter the half of the block in which these are. Where the stage's
    outputs are added to them, what leaves the dense half takes the place of what entered it with
    `keep`. `advance` is called with the number of windows done, of either stream.
    """
    run, reading = _running(stage, family), not writes(family, stage[0])
    arguments, batch = streams.pruned.arguments[index], streams.pruned.batch
    samples, length, _ = streams.pruned.hidden.shape
    with statistics.gathering():
        for start in range(0, samples, batch):
            part = slice(start, start + batch)
            dense, pruned = (
                run(block)(states.hidden[part].to(states.device), **arguments)
                for block, states in blocks.on(streams)
            )
            if keep:
                streams.dense.hidden[part] = dense.to(streams.dense.hidden.device)
            for name in stage[1:] if reading else ():  # to which the run does not come
                statistics.note(name, pruned)
            # By windows: OPT's norm is given all tokens in a row.
            wanted = dense.float().view(-1, length, dense.shape[-1])
            ahead = wanted - pruned.float().view_as(wanted)
            statistics.cross(stage[0], ahead * _counting(ahead, wanted))
            advance(2 * len(wanted))


def aimed(dense: torch.Tensor, inputs: Inputs, *, writes: bool, keep_zeros: bool) -> torch.Tensor:
    """The weight W' [out, in], float32, that a solver is to keep instead of `dense`, W.

    `inputs`: with what `gather` has added. With `keep_zeros` what is zero in `dense` stays so.
    """
    crossed = inputs.crossed()
    gap = crossed if writes else dense @ crossed
    factor = inputs.of_hessian(_factor, max(_LEAST, _RIDGE * inputs.a_token()))
    found = dense + torch.cholesky_solve(gap.T, factor).T
    return refit(found, dense, inputs) if keep_zeros else found


def _counting(error: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """How much of each token's `error` [batch, length, n] counts, [batch, length, 1].

    All of it up to half of the size that a token of its window has, the median of the dense model's
    `wanted`; of what is larger so much (Huber's loss). In some models a few tokens, such as a
    text's first, become a hundred times as large as others, and the norm that reads the stream next
    makes all of one size again: without this their errors were all that counted
    (Qwen2.5-Coder-1.5B, half removed: the error of block 2 became 0.96 of the stream's energy on
    other text, where it is 0.04 without what is done here, and 0.03 with all of it).
    """
    median = wanted.norm(dim=-1, keepdim=True).median(dim=-2, keepdim=True).values
    sizes = error.norm(dim=-1, keepdim=True)
    counting: torch.Tensor = _FAR * median / sizes.clamp(min=torch.finfo(torch.float32).tiny)
    return counting.clamp(max=1)


def _running(stage: Sequence[str], family: Family) -> Callable[[nn.Module], Run]:
    """What runs the half of a block in which a `stage` is, from the stream that enters the half: up
    to what enters the stage, or the stream that it has added to.
    """
    half = next(half for half in halves(family) if half.holds(stage[0]))
    if writes(family, stage[0]):
        return half.of

    def run(block: nn.Module) -> Run:
        # By itself the first half is run up to its own end, which is not reached here.
        part = block if half.name == "attention" else half.of(block)

        def entering(hidden: torch.Tensor, **arguments: Any) -> torch.Tensor:  # noqa: ANN401
            with ending_at(block.get_submodule(stage[0])) as seen:  # which all of them are given
                part(hidden, **arguments)
            return seen[0]

        return entering

    return run


def _factor(hessian: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Cholesky factor [in, in] of X^T X with a `ridge`, a share of each input's own square,
    which is `raised` where it is faint.

    It is large where tokens are few: every Linear of every block is fitted to the same ones, whose
    stream would soon be the dense model's while that of other text is not. (SmolLM2-135M, half
    removed by SparseGPT, 16 thousand tokens: 26.7 of perplexity without all this, 22.8 with a ridge
    of 0.05 in all Linears, 21.5 with 0.2, 21.0 with 0.6, 21.4 with 2.)
    """
    matrix = hessian.clone()
    diagonal = matrix.diagonal()
    diagonal.copy_(raised(diagonal)).mul_(1 + ridge).masked_fill_(diagonal == 0, 1)
    factor: torch.Tensor = torch.linalg.cholesky(matrix)
    return factor
