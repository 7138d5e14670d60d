"""What leaving out the smallest inputs of every Linear costs a model: nothing is trained.

    python benchmarks/activation_sparsity.py MODEL calibration.txt evaluation.txt -o FILE.json

While one token is decoded, a column of a weight whose input is near zero need not be read (TEAL,
arXiv 2408.14690). An input x_j is left out where |x_j|, or, `by_weight`, |x_j| times the norm of
column j (WINA, arXiv 2505.19427), is below a threshold that the Linear keeps for all tokens: the
quantile of the wanted fraction on the calibration text. A prompt is multiplied whole, so the first
half of each window is dense, and the second half alone counts. After the uniform fractions half of
the inputs are left out of the Linears of one name at a time, and what these lose divides the same
fractions over the names: loss taken in proportion to the squares of the products left out, by the
steepest descent. `kept` is the share of the weights' columns that were read, by their sizes.
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from owl_deploy.bench.machine import look
from owl_deploy.evaluate.perplexity import windows_of
from owl_deploy.utils.artefact import write_json

HALF = 0.5
STEPS = 20  # fractions that thresholds are kept for: multiples of 1 / STEPS
SKIPPED = 64  # first positions of a calibration window, whose inputs are unlike all others
TOKENS = 16  # of each calibration window

Fractions = Mapping[str, float]  # by the name that Linears have within their blocks


@dataclass
class Sparse:
    """A Linear whose smallest inputs are left out."""

    linear: torch.nn.Linear
    norms: torch.Tensor = field(init=False)  # [inputs], of the columns
    seen: list[torch.Tensor] = field(default_factory=list)  # |x| [tokens, inputs]
    thresholds: dict[bool, torch.Tensor] = field(default_factory=dict)  # [STEPS + 1]
    errors: torch.Tensor = field(init=False)  # [STEPS + 1]: squares left out, over all squares
    fraction: float = 0.0
    by_weight: bool = False
    kept: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.norms = self.linear.weight.norm(dim=0)

    def calibrate(self) -> None:
        """Thresholds and errors, from the inputs seen."""
        inputs = torch.cat(self.seen)
        for by_weight in (False, True):
            scores = (inputs * self.norms if by_weight else inputs).flatten().sort().values
            places = torch.arange(STEPS + 1) * (len(scores) - 1) // STEPS
            self.thresholds[by_weight] = scores[places]
        sums = scores.square().double().cumsum(0)
        self.errors = sums[places] / sums[-1]
        self.seen.clear()

    def collect(self, _module: torch.nn.Module, given: tuple[torch.Tensor]) -> None:
        """A hook that keeps some tokens' inputs."""
        tokens = given[0].flatten(0, -2)[SKIPPED:].abs()
        self.seen.append(tokens[torch.linspace(0, len(tokens) - 1, TOKENS).long()])

    def drop(
        self, _module: torch.nn.Module, given: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor] | None:
        """A hook that leaves the smallest inputs out of the second half of a window."""
        if not self.fraction:
            self.kept.append(1.0)
            return None
        first, second = given[0].tensor_split(2, dim=1)
        scores = second.abs() * self.norms if self.by_weight else second.abs()
        threshold = self.thresholds[self.by_weight][round(self.fraction * STEPS)]
        mask = scores > threshold
        self.kept.append(mask.float().mean().item())
        return (torch.cat([first, second * mask], dim=1),)


class Model:
    """The dense model, and its Linears but the head."""

    def __init__(self, path: Path, calibration: torch.Tensor, windows: torch.Tensor) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.windows = windows
        self.linears: dict[str, list[Sparse]] = defaultdict(list)
        for name, module in self.model.base_model.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.linears[name.rsplit(".", 1)[-1]].append(Sparse(module))
        hooks = [one.linear.register_forward_pre_hook(one.collect) for one in self.all()]
        for window in calibration:
            self.model.base_model(window[None])
        for hook in hooks:
            hook.remove()
        for one in self.all():
            one.calibrate()
            one.linear.register_forward_pre_hook(one.drop)
        self.sizes = {
            name: sum(one.linear.weight.numel() for one in own)
            for name, own in self.linears.items()
        }

    def all(self) -> list[Sparse]:
        """The Linears."""
        return [one for own in self.linears.values() for one in own]

    def run(self, fractions: Fractions, by_weight: bool) -> dict[str, Any]:
        """The mean negative log-likelihood of the windows' second halves, in nats a token."""
        for name, own in self.linears.items():
            for one in own:
                one.fraction, one.by_weight = fractions.get(name, 0.0), by_weight
                one.kept.clear()
        losses = []
        for window in self.windows:
            begin = (len(window) + 1) // 2
            hidden = self.model.base_model(window[None]).last_hidden_state[0, begin:-1]
            losses.append(
                torch.nn.functional.cross_entropy(self.model.lm_head(hidden), window[begin + 1 :])
            )
        read = sum(one.linear.weight.numel() * sum(one.kept) / len(one.kept) for one in self.all())
        return {"nll": torch.stack(losses).mean().item(), "kept": read / sum(self.sizes.values())}

    def divided(self, alone: Mapping[str, float], fraction: float) -> dict[str, float]:
        """`fraction` of all columns over the names, whose losses are `alone` with half left out."""
        rates = {
            name: torch.stack([one.errors for one in own]).mean(0)
            for name, own in self.linears.items()
        }
        rates = {
            name: max(alone[name], 0.0) * rate / rate[STEPS // 2] for name, rate in rates.items()
        }
        steps = dict.fromkeys(rates, 0)

        def cost(name: str) -> float:
            step = steps[name]
            if step == STEPS - 1:
                return math.inf
            return (rates[name][step + 1] - rates[name][step]).item() / self.sizes[name]

        total = sum(self.sizes.values())
        while sum(steps[name] * self.sizes[name] for name in steps) < fraction * STEPS * total:
            steps[min(steps, key=cost)] += 1
        return {name: step / STEPS for name, step in steps.items()}


@torch.no_grad()
def main() -> None:
    """Measure, write after each row, and print it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("calibration", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--fraction", type=float, action="append", help="[0.25, 0.4, 0.5]")
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    model = Model(
        given.model,
        windows_of(given.model, str(given.calibration), 512, 8),
        windows_of(given.model, str(given.text), given.window, given.windows),
    )
    cpu, rows = look().cpu, list[dict[str, Any]]()

    def row(label: str, fractions: Fractions, by_weight: bool) -> float:
        found = model.run(fractions, by_weight)
        found["loss"] = found["nll"] - (rows[0]["nll"] if rows else found["nll"])
        rows.append({"label": label, "by_weight": by_weight, "fractions": dict(fractions), **found})
        print(label, "by weight" if by_weight else "", found, flush=True)
        result = {"cpu": cpu, "windows": given.windows, "window": given.window, "rows": rows}
        write_json(given.output, result)
        return float(found["loss"])

    row("dense", {}, False)
    asked = given.fraction or [0.25, 0.4, 0.5]
    for fraction in asked:
        for by_weight in (False, True):
            row("uniform", dict.fromkeys(model.linears, fraction), by_weight)
    alone = {name: row(f"{name} alone", {name: HALF}, True) for name in model.linears}
    for fraction in asked:
        row("divided", model.divided(alone, fraction), True)


if __name__ == "__main__":
    main()
