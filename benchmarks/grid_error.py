"""What a scale's form is worth: the squared error of weights that are rounded to nearest.

python benchmarks/grid_error.py MODEL [-o RESULT.json]

Of some Linears of a model (two of its blocks), and of weights drawn from a normal distribution,
groups of 32 take the scale with the least squared error, of those that clip nothing down to 0.4
of them: with 4 bits of mantissa, above zero only; with 3 and a sign; with 4 and a sign, which a
byte has no room for beside 16 binades; and by a zero point for each group, another 4 bits. The
first is `relative_error`, squared, over the weights' squares; the others are shares of it.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch

from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.utils.artefact import write_json

GROUP = 32
_REACH = 4 / 3  # binades down from the scale that clips nothing
_MOST_GROUPS = 20_000  # of a weight, drawn


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rows = [
        {"weight": name, "bits": bits, **errors(groups, bits)}
        for name, groups in weights(arguments.model)
        for bits in (4, 3)
    ]
    for row in rows:
        print(*(f"{one:.4g}" if isinstance(one, float) else one for one in row.values()))
    if arguments.output:
        write_json(arguments.output, {"rows": rows})


def weights(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Groups [n, 32] of normal numbers, and of the Linears of an early and a middle block."""
    yield "normal", torch.randn(_MOST_GROUPS, GROUP)
    checkpoint = open_checkpoint(folder)
    names = [name for name in checkpoint.names() if name.endswith("proj.weight")]
    blocks = 1 + max(int(name.split(".")[2]) for name in names)
    for name in names:
        if int(name.split(".")[2]) in (2, blocks // 2):
            groups = checkpoint.read(name).float().reshape(-1, GROUP)
            yield name, groups[torch.randperm(len(groups))[:_MOST_GROUPS]]


def errors(groups: torch.Tensor, bits: int) -> dict[str, float]:
    """What each form leaves of `groups` [n, 32]."""
    whole = groups.square().sum()
    plain = by_scale(groups, bits, 16, (1,)).sum()
    return {
        "relative_error": (plain / whole).item(),
        "sign, 3 bits of mantissa": (by_scale(groups, bits, 8, (1, -1)).sum() / plain).item(),
        "sign, 4 bits of mantissa": (by_scale(groups, bits, 16, (1, -1)).sum() / plain).item(),
        "zero point": (by_zero_point(groups, bits).sum() / plain).item(),
    }


def by_scale(groups: torch.Tensor, bits: int, steps: int, signs: tuple[int, ...]) -> torch.Tensor:
    """The least squared error of each group, [n], by scales of so many `steps` to a binade."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    found = []
    for sign in signs:
        turned = sign * groups
        reach = torch.maximum(turned.amax(1) / high, turned.amin(1) / low).clamp(min=1e-30)
        binade = reach.log2().floor()
        largest = binade * steps + ((reach / 2**binade - 1) * steps).ceil()
        for down in range(int(_REACH * steps)):
            code = largest - down
            binade = (code / steps).floor()
            scale = (2**binade * (1 + code / steps - binade)).unsqueeze(1)
            rounded = (turned / scale).round().clamp(low, high) * scale
            found.append((rounded - turned).square().sum(1))
    return torch.stack(found).amin(0)


def by_zero_point(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The least squared error of each group, [n], of grids with zero on them at any place."""
    found = []
    for above in torch.linspace(0.6, 1, 9):
        for below in torch.linspace(0.6, 1, 9):
            top = (groups.amax(1) * above).clamp(min=0)
            bottom = (groups.amin(1) * below).clamp(max=0)
            scale = ((top - bottom) / (2**bits - 1)).clamp(min=1e-30).unsqueeze(1)
            zero = (-bottom.unsqueeze(1) / scale).round()
            rounded = ((groups / scale).round() + zero).clamp(0, 2**bits - 1) - zero
            found.append((rounded * scale - groups).square().sum(1))
    return torch.stack(found).amin(0)


if __name__ == "__main__":
    main()
