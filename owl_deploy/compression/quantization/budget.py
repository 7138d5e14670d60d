"""`owl prune --budget`: what the Linears may take together, and the formats that this buys."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from owl_deploy.compression.allocation.sparsities import Shape
from owl_deploy.compression.layer import zeros
from owl_deploy.compression.methods import METHODS
from owl_deploy.compression.quantization.formats import Costs, Format, formats, packed_size
from owl_deploy.compression.quantization.knapsack import Option, cheapest
from owl_deploy.compression.quantization.latency import Clock, measure, room_in_time, weight_size
from owl_deploy.compression.settings import PruneSettings, parse_budget
from owl_deploy.errors import BadInput
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.families import heads
from owl_deploy.models.manifest import Cost
from owl_deploy.runtime import pack
from owl_deploy.utils.progress import bar

Formats = list[dict[str, Cost]]  # of each block, by the names of its pruned Linears

# What a kernel reads as one weight, and so stands in one format: a gated MLP's two halves.
_ONE_WEIGHT = ({"gate_proj", "up_proj"},)


@dataclass(frozen=True)
class Room:
    """What the pruned Linears may take together: bytes, or with a `clock` seconds a token.

    `head`: where the output head shares it, its bytes in planes and in 4 bits.
    """

    limit: float
    clock: Clock | None = None
    head: tuple[int, int] | None = None


def room(settings: PruneSettings, skeleton: Skeleton, shape: Shape) -> Room:
    """What a budget leaves to the pruned Linears.

    Raises `BadInput` for a budget that not even the least formats fit, or that the largest do not
    fill; `EnvironmentFailed` for one of speed without the engine's library.
    """
    assert settings.budget is not None
    number, unit = parse_budget(settings.budget)
    if unit == "times":
        clock = measure(settings, skeleton, shape)
        shapes = _shapes(skeleton, shape)
        return Room(room_in_time(clock, shapes, settings.budget, number), clock)
    return _room_in_bytes(number, unit, settings, skeleton, shape)


def _room_in_bytes(
    number: float, unit: str, settings: PruneSettings, skeleton: Skeleton, shape: Shape
) -> Room:
    assert settings.bits_group is not None
    shapes = _shapes(skeleton, shape)
    weights = sum(math.prod(one) for one in shapes)
    head, rest = None, 0
    if unit == "bytes":
        rest = _rest(skeleton, shape)
        if settings.head_bits or heads() & set(settings.skip):
            rest += _size_of_head(settings, skeleton, settings.head_bits)
        else:
            head = _size_of_head(settings, skeleton, None), _size_of_head(settings, skeleton, 4)
    found = number * weights / 8 if unit == "bits" else number - rest
    known = formats(settings.method)
    gone = _zeros(skeleton, shape, settings.method)
    sizes = [
        [packed_size(one, form, form.sparsity or own, settings.bits_group) for form in known]
        for one, own in zip(shapes, gone, strict=True)
    ] + ([list(head)] if head else [])
    least, most = sum(map(min, sizes)), sum(map(max, sizes))
    if found < least:
        told = _told(least, unit, weights, rest, math.ceil)
        raise BadInput(
            f"The budget {settings.budget} is below the least that {_maker(settings)} can make of "
            f"this model, {told}.",
            "Give that or more.",
        )
    if found > most:
        told = _told(most, unit, weights, rest, math.floor)
        raise BadInput(
            f"The budget {settings.budget} is above the most that can be spent, {told}.",
            "Give that or less, or export the model as it is.",
        )
    return Room(found, head=head)


def _told(size: int, unit: str, weights: int, rest: int, whole: Callable[[float], int]) -> str:
    """The budget of `size` bytes for the pruned Linears, as it would be given."""
    if unit == "bits":
        return f"{whole(8000 * size / weights) / 1000:g} (bits a weight)"
    return f"{whole((rest + size) / 1e3)}kB"


def spend(costs: Costs, limit: float, *, time: bool = False) -> Formats:
    """The formats, one for every Linear, that lose least in `limit` bytes; with `time`, in so many
    microseconds.
    """
    weights = [one for number, block in enumerate(costs) for one in _weights(number, block)]
    options = [
        [
            Option(
                sum((one.microseconds or 0.0) if time else one.bytes for one in same),
                sum(one.loss for one in same),
            )
            for same in zip(*(costs[block][name] for name in names), strict=True)
        ]
        for block, names in weights
    ]
    found: Formats = [{} for _ in costs]
    for (block, names), at in zip(weights, cheapest(options, limit), strict=True):
        found[block] |= {name: costs[block][name][at] for name in names}
    return [{name: own[name] for name in block} for block, own in zip(costs, found, strict=True)]


def _weights(number: int, block: dict[str, list[Cost]]) -> Iterator[tuple[int, list[str]]]:
    """The weights of a block as the engine has them: a Linear, or some that it reads as one."""
    left = dict.fromkeys(block)
    while left:
        first = next(iter(left))
        parent, dot, last = first.rpartition(".")
        ends = {last}.union(*(one for one in _ONE_WEIGHT if last in one))
        together = [name for name in left if name in {f"{parent}{dot}{end}" for end in ends}]
        for name in together:
            del left[name]
        yield number, together


def _size_of_head(settings: PruneSettings, skeleton: Skeleton, bits: int | None) -> int:
    """The bytes of the head, rounded to so many `bits`, or as a deployment stores any."""
    assert settings.bits_group is not None
    size = weight_size(skeleton.head)
    if bits is None:
        return pack.stored_bytes(size, "int8", planes=True)
    return packed_size(size, Format(bits), 0.0, settings.bits_group)


def _shapes(skeleton: Skeleton, shape: Shape) -> list[tuple[int, int]]:
    return [
        weight_size(linear)
        for index, own in enumerate(shape.linears)
        for linear in (skeleton.linears(index)[name] for name in own)
    ]


def _maker(settings: PruneSettings) -> str:
    return settings.method if METHODS[settings.method].removes else "rounding alone"


def _zeros(skeleton: Skeleton, shape: Shape, method: str) -> list[float]:
    """The share of each pruned Linear's weights that is gone already, and stays so: none where the
    `method` chooses anew.
    """
    linears = [
        f"{block}.{name}.weight"
        for block, own in zip(shape.names, shape.linears, strict=True)
        for name in own
    ]
    if METHODS[method].removes:
        return [0.0] * len(linears)
    shares = []
    with bar("Counting zeros", len(linears)) as advance:
        for one in linears:
            shares.append(zeros(skeleton.checkpoint.read(one)))
            advance(1)
    return shares


def _rest(skeleton: Skeleton, shape: Shape) -> int:
    """The bytes of all else but the head that `owl export --target owl --precision int4` stores.

    The embedding of a head that is not tied and other Linears in int4, the rest in fp32; so are the
    rotary tables.
    """
    linears = {
        f"{block}.{name}.weight": name in pruned
        for index, (block, pruned) in enumerate(zip(shape.names, shape.linears, strict=True))
        for name in skeleton.linears(index)
    }
    embedding = f"{skeleton.family.embeddings[0]}.weight"
    tied = skeleton.model.config.tie_word_embeddings
    head = embedding if tied else f"{skeleton.family.head}.weight"
    total = _tables(skeleton.model)
    for name, size in skeleton.stored_shapes().items():
        if linears.get(name) or name == head:
            continue
        if name == embedding or name in linears:
            total += pack.stored_bytes((size[0], size[1]), "int4")
        else:
            total += 4 * math.prod(size)
    return total


def _tables(model: Any) -> int:  # noqa: ANN401 - transformers is partly typed
    """The bytes of a model's rotary tables: cosine and sine of each frequency at each position."""
    frequencies: int = sum(
        buffer.numel()
        for name, buffer in model.named_buffers()
        if name.endswith("inv_freq") and not name.endswith("original_inv_freq")
    )
    return 2 * 4 * frequencies * int(model.config.max_position_embeddings)
