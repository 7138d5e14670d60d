import pytest
import torch
import transformers

from owl_deploy.compression.allocation import judge as judging
from owl_deploy.compression.allocation.interpolate import in_steps
from owl_deploy.compression.allocation.judge import Judge
from owl_deploy.compression.allocation.sparsities import Shape
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import open_checkpoint
from tests import tiny
from tests.reference import divergence as reference

WINDOWS = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))
TRIED = (0.3, 0.5, 0.8, 0.96)


def shape_of(skeleton):
    sizes = [
        {name: linear.weight.numel() for name, linear in skeleton.linears(index).items()}
        for index in range(len(skeleton.names))
    ]
    return Shape(skeleton.names, sizes)


def made_of(skeleton, shape):
    """What stands for the pass that makes each Linear: the least weights of each row are gone."""
    made = {}
    for index, name in enumerate(shape.names):
        with skeleton.loaded(name):
            for key in shape.linears[index]:
                weight = skeleton.linears(index)[key].weight.detach().float()
                even = torch.ones(weight.shape[1])
                left = [reference.lowest_removed(weight, even, one) for one in TRIED]
                made[name, key] = [in_steps(one - weight) for one in left]
    return lambda name: {
        f"{key}.{part}": torch.stack([way[at] for way in ways])
        for (block, key), ways in made.items()
        if block == name
        for at, part in enumerate(("difference", "step"))
    }


def make(folder, scratch):
    skeleton = Skeleton(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    shape = shape_of(skeleton)
    return Judge(skeleton, shape, TRIED, made_of(skeleton, shape), WINDOWS, scratch, None)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_divergence_is_that_of_the_whole_model(family, tmp_path):
    folder = tiny.write_model(family, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    judge = make(folder, tmp_path)
    count = sum(map(len, judge.shape.linears))
    divisions = [tuple(0.12 + 0.2 * (number % 5) for number in range(count)), (0.5,) * count]
    for division in divisions:
        weights = {}
        for block, own in zip(judge.shape.names, judge.shape.by_block(division), strict=True):
            for name, sparsity in own.items():
                full = f"{block}.{name}"
                dense = model.get_submodule(full).weight.detach()
                even = torch.ones(dense.shape[1])
                levels = {one: reference.lowest_removed(dense, even, one) for one in TRIED}
                weights[full] = reference.rows_mixed(dense, levels, sparsity)
        (found,) = judge.divergences([division], [0, 2])
        expected = reference.divergence(model, weights, WINDOWS[[0, 2]])
        assert found == pytest.approx(expected, rel=0.02, abs=1e-7)
        assert expected > 0


def test_models_that_begin_alike_are_run_as_one_and_judged_as_each(llama, tmp_path, monkeypatch):
    judge = make(llama, tmp_path)
    count = sum(map(len, judge.shape.linears))
    base = [0.5] * count
    divisions = [tuple(base)]
    for place in (0, count - 1, count // 2, count - 1):
        other = [value + 1e-12 for value in base]  # which rounds to the same
        other[place] = 0.25
        divisions.append(tuple(other))
    passes = []
    through = judging.Activations.through
    monkeypatch.setattr(
        judging.Activations,
        "through",
        lambda self, block, index, *rest, **how: (
            passes.append(index),
            through(self, block, index, *rest, **how),
        ),
    )
    together = judge.divergences(divisions, [0, 1, 2])
    blocks = len(judge.shape.names)
    assert len(passes) < blocks * len(divisions)
    assert passes.count(0) == 2  # one of them differs from the others in the first block
    alone = [judge.divergences([one], [0, 1, 2])[0] for one in divisions]
    assert together == alone
    assert together[2] == together[4]


def test_nothing_removed_is_the_dense_model(llama, tmp_path):
    judge = make(llama, tmp_path)
    count = sum(map(len, judge.shape.linears))
    assert judge.divergences([(0.0,) * count], [0])[0] == pytest.approx(0, abs=1e-6)
    assert judge.divergences([], [0]) == []
