import pytest
import torch
import transformers

from owl_deploy.blocks import Skeleton
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.prune import judge as judging
from owl_deploy.prune import mask
from owl_deploy.prune.judge import Judge
from owl_deploy.prune.sparsities import Shape
from tests import tiny
from tests.reference import divergence as reference

WINDOWS = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))


def shape_of(skeleton):
    sizes = [
        {name: linear.weight.numel() for name, linear in skeleton.linears(index).items()}
        for index in range(len(skeleton.names))
    ]
    return Shape(skeleton.names, sizes)


def norms_of(skeleton, shape):
    draw = torch.Generator().manual_seed(2)
    return [
        {
            name: torch.rand(skeleton.linears(index)[name].in_features, generator=draw) + 0.5
            for name in own
        }
        for index, own in enumerate(shape.linears)
    ]


def make(folder, scratch):
    skeleton = Skeleton(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    shape = shape_of(skeleton)
    return Judge(skeleton, shape, norms_of(skeleton, shape), WINDOWS, scratch, None)


def test_room_for_all_orders_is_asked_for_at_once(tmp_path, monkeypatch):
    """Each by itself would find half of what is left enough, until nothing is."""
    asked = []

    def room_for(shape, dtype, *_):
        asked.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(judging, "room_for", room_for)
    judge = make(tiny.write_llama(tmp_path / "model"), tmp_path)
    assert asked == [(sum(judge.shape.sizes),)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_divergence_is_that_of_the_whole_model(family, tmp_path):
    folder = tiny.write_model(family, tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).float().eval()
    judge = make(folder, tmp_path)
    every = norms_of(judge.skeleton, judge.shape)
    for orders, norms, block in zip(judge.orders, every, judge.shape.names, strict=True):
        for name, order in orders.items():
            scores = model.get_submodule(f"{block}.{name}").weight.abs() * norms[name]
            assert torch.equal(order, judging.levels(scores.detach(), None))
    count = sum(map(len, judge.shape.linears))
    divisions = [tuple(0.2 + 0.1 * (number % 4) for number in range(count)), (0.5,) * count]
    for division in divisions:
        weights = {}
        for index, own in enumerate(judge.shape.by_block(division)):
            for name, sparsity in own.items():
                full = f"{judge.shape.names[index]}.{name}"
                removed = round(judge.levels * sparsity)
                weight = model.get_submodule(full).weight.detach()
                level = judge.orders[index][name]
                weights[full] = weight.masked_fill(level < removed, 0)
        (found,) = judge.divergences([division], [0, 2])
        expected = reference.divergence(model, weights, WINDOWS[[0, 2]])
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert expected > 0


def test_levels_are_the_order_in_which_the_method_removes():
    scores = torch.rand(6, 500, generator=torch.Generator().manual_seed(3))
    levels = judging.levels(scores, None)
    for sparsity in (0.1, 0.5, 0.7):
        removed = levels < round(sparsity * judging.LEVELS)
        assert torch.equal(removed, mask.lowest_in_rows(scores, sparsity))
    left = reference.lowest_removed(scores, torch.ones(500), 0.3)
    assert torch.equal(left == 0, levels < round(0.3 * judging.LEVELS))


def test_levels_of_groups_are_whole_weights():
    scores = torch.rand(6, 64, generator=torch.Generator().manual_seed(3))
    levels = judging.levels(scores, (4, 8))
    for kept in range(1, 8):
        assert torch.equal(levels < 8 - kept, mask.lowest_in_groups(scores, kept, 8))


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
