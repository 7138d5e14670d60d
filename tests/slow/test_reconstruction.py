"""On the demo model SparseGPT loses less of each block's output than Wanda, and ALPS less again."""

import pytest
import torch

from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.methods import ALPSOptions, Options, SparseGPTOptions
from owl_deploy.compression.pruning import alps, by_score, sparsegpt
from owl_deploy.data.text import calibration_windows
from owl_deploy.data.tokens import load_tokens
from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES, LENGTH, BLOCKS = 16, 512, 4


def squared_error(block, arguments, inputs, expected):
    """The summed squared difference of a block's output from `expected`, [samples, ...]."""
    return sum(
        float((block(part, **arguments) - wanted).square().sum())
        for part, wanted in zip(inputs.split(1), expected.split(1), strict=True)
    )


@torch.no_grad()
def test_each_solver_reconstructs_better_than_the_one_before(tmp_path):
    folder = demo_input() / MODEL
    skeleton = Skeleton(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    tokens = load_tokens(folder, [str(demo_input() / CALIBRATION)])
    windows = calibration_windows(tokens, SAMPLES, LENGTH, 0)
    hidden = skeleton.embed(windows, 1, tmp_path)
    methods = {
        "wanda": (by_score.wanda, Options()),
        "sparsegpt": (sparsegpt.prune, SparseGPTOptions()),
        "alps": (alps.prune, ALPSOptions()),
    }
    for index in range(BLOCKS):
        with skeleton.loaded(skeleton.names[index]) as block:
            linears = skeleton.linears(index)
            statistics = InputStatistics(linears, SAMPLES, hessian=True)
            before = hidden.hidden.clone()
            with statistics.gathering():
                hidden.through(block, index, lambda _: None, keep=True)
            dense = {name: linear.weight.clone() for name, linear in linears.items()}
            errors = {}
            for method, (function, options) in methods.items():
                for name, weight in dense.items():
                    pruned = function(weight, Inputs(statistics, name), 0.7, None, options)
                    linears[name].weight.copy_(pruned)
                errors[method] = squared_error(
                    block, hidden.arguments[index], before, hidden.hidden
                )
            assert errors["alps"] < errors["sparsegpt"] < errors["wanda"], (index, errors)
