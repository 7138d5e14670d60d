"""`owl prune --budget 1.5x`: what a token's products take on this machine, in each format.

Measured, not modelled: the engine's own kernel over every shape of weight in every format, from
memory. What stands beside them in a token's time, attention and the small operators, is left out.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from owl_deploy.compression.allocation.sparsities import Shape
from owl_deploy.compression.quantization.formats import Costs, Format, formats, is_sparse
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.inference import default_threads
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.manifest import Cost
from owl_deploy.runtime import library_path, timing
from owl_deploy.runtime.native import Library
from owl_deploy.utils.progress import bar

Size = tuple[int, int]  # [out, in] of a weight
Timings = dict[tuple[Size, Format], float]  # seconds

DENSE_INT8, DENSE_INT4 = Format(8), Format(4)


@dataclass(frozen=True)
class Clock:
    """Seconds of a token's products: of `each` weight that is pruned, by its shape and format; of
    all weights in dense int8, the `whole`; and of those that are not pruned, the `rest`.
    """

    each: Timings
    whole: float
    rest: float

    def room(self, times: float) -> float:
        """The seconds that the pruned Linears may take for a token to be `times` as fast."""
        return self.whole / times - self.rest

    def speed_up(self, seconds: float) -> float:
        """Of a token whose pruned Linears take so many `seconds`."""
        return self.whole / (self.rest + seconds)

    def timed(self, costs: Costs, skeleton: Skeleton) -> Costs:
        """The `costs`, with what each format takes."""
        found: Costs = []
        for index, block in enumerate(costs):
            linears = skeleton.linears(index)
            found.append(
                {
                    name: [self._timed(one, weight_size(linears[name])) for one in options]
                    for name, options in block.items()
                }
            )
        return found

    def _timed(self, cost: Cost, size: Size) -> Cost:
        seconds = self.each[size, Format(cost.bits, cost.sparsity)]
        return cost.model_copy(update={"microseconds": 1e6 * seconds})


def measure(settings: PruneSettings, skeleton: Skeleton, shape: Shape) -> Clock:
    """Time the kernels over the weights of this model.

    Raises `EnvironmentFailed` where the engine's library is missing.
    """
    pruned, others = _linears(skeleton, shape)
    head = weight_size(skeleton.head)
    known = formats(settings.method)
    wanted = {(one, form) for one in pruned for form in (*known, DENSE_INT8)}
    wanted |= {(one, form) for one in others for form in (DENSE_INT4, DENSE_INT8)}
    # Of a head in planes a token reads the upper 4 bits.
    format_of_head = Format(settings.head_bits or 4)
    wanted |= {(head, DENSE_INT4), (head, format_of_head)}
    assert settings.bits_group is not None
    took = _timings(sorted(wanted, key=str), settings.bits_group)
    whole = math.fsum(took[one, DENSE_INT8] for one in (*pruned, *others))
    return Clock(
        each={(one, form): took[one, form] for one in pruned for form in known},
        whole=took[head, DENSE_INT4] + whole,
        rest=took[head, format_of_head] + math.fsum(took[one, DENSE_INT4] for one in others),
    )


def room_in_time(clock: Clock, shapes: Iterable[Size], asked: str, times: float) -> float:
    """The seconds that the pruned Linears, of these `shapes`, may take to be `times` as fast.

    Raises `BadInput` for a gain that the fastest formats do not reach.
    """
    known = {form for _, form in clock.each}
    least = math.fsum(min(clock.each[one, form] for form in known) for one in shapes)
    most = clock.speed_up(least)
    if times > most:
        raise BadInput(
            f"The budget {asked} is more than this machine's kernels gain on this model, "
            f"{math.floor(100 * most) / 100:g}x.",
            "Give that or less.",
        )
    return clock.room(times)


def weight_size(linear: torch.nn.Linear) -> Size:
    """[out, in] of a Linear's weight."""
    return linear.out_features, linear.in_features


def _linears(skeleton: Skeleton, shape: Shape) -> tuple[list[Size], list[Size]]:
    """The shapes of the pruned Linears of the blocks, and of the others."""
    found: tuple[list[Size], list[Size]] = ([], [])
    for index, pruned in enumerate(shape.linears):
        for name, linear in skeleton.linears(index).items():
            found[name not in pruned].append(weight_size(linear))
    return found


def _timings(wanted: Iterable[tuple[Size, Format]], group: int) -> Timings:
    wanted, library, threads = list(wanted), Library(library_path()), default_threads()
    took: Timings = {}
    with bar("Timing kernels", len(wanted)) as advance:
        for one, form in wanted:
            sparsity = form.sparsity if is_sparse(form, form.sparsity) else None
            how = {"scale_columns": group, "threads": threads}
            took[one, form] = timing.from_memory(library, one, form.values, sparsity, **how)
            advance(1)
    return took
