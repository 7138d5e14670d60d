import math

import pytest
import torch

from owl_deploy.finetune.logits import distilled_loss
from owl_deploy.finetune.source import Source, load_teacher
from owl_deploy.finetune.trainee import Distillation, Trainee, feature_loss
from owl_deploy.models.checkpoint import open_checkpoint
from tests.reference import finetune as reference


class Fixed(torch.nn.Module):
    """Logits that are the same whatever the ids: [batch, length, vocabulary]."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits))

    def forward(self, input_ids, use_cache):
        return type("Output", (), {"logits": self.logits.expand(*input_ids.shape, -1)})


@pytest.mark.parametrize(
    ("temperature", "expected"),
    [
        # student (1/4, 3/4), teacher (1/2, 1/2)
        (1.0, 0.5 * math.log(2) + 0.5 * math.log(2 / 3)),
        # student (1, sqrt 3) / (1 + sqrt 3)
        (2.0, 4 * 0.5 * math.log(0.25 * (1 + math.sqrt(3)) ** 2 / math.sqrt(3))),
    ],
)
def test_distillation_by_hand(temperature, expected):
    student = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]])
    teacher = torch.zeros(2, 2)
    labels = torch.tensor([0, 1])
    found = distilled_loss(student, teacher, labels, temperature, 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    half = 0.5 * expected - 0.5 * (math.log(1 / 4) + math.log(3 / 4)) / 2
    found = distilled_loss(student, teacher, labels, temperature, 0.5)
    assert float(found) == pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rows", [1, 32, 75])
def test_the_loss_and_its_gradient(temperature, weight, rows):
    """Of rows that fill the parts in which they are taken, and do not."""
    generator = torch.Generator().manual_seed(rows)
    student, teacher = 3 * torch.randn(2, rows, 50, generator=generator, dtype=torch.float64)
    labels = torch.randint(50, (rows,), generator=generator)
    student.requires_grad_()
    expected = weight * reference.distillation_loss(student, teacher, temperature)
    expected += (1 - weight) * torch.nn.functional.cross_entropy(student, labels)
    (gradient,) = torch.autograd.grad(3 * expected, student)
    found = distilled_loss(student, teacher, labels, temperature, weight)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(3 * found, student)[0], gradient)


def test_the_teacher_weighs_in_training_only():
    trainee = Trainee(Fixed([0.0, math.log(3)]), Distillation(Fixed([0.0, 0.0]), weight=0.25))
    ids = torch.tensor([[0, 1, 1]])
    cross_entropy = -math.log(3 / 4)
    divergence = 0.5 * math.log(4 / 3)
    training = trainee.train()(ids, ids)["loss"].detach()
    assert float(training) == pytest.approx(0.75 * cross_entropy + 0.25 * divergence, rel=1e-6)
    assert trainee.eval()(ids, ids)["loss"].item() == pytest.approx(cross_entropy, rel=1e-6)


def test_the_teacher_drops_nothing():
    trainee = Trainee(Fixed([0.0]), Distillation(Fixed([0.0]))).train()
    assert trainee.model.training
    assert not trainee.teacher.training


def test_the_feature_loss_by_hand():
    # errors 1 and 0 of squares 4 and 1; then 3 of square 1, three times over
    student = [torch.tensor([[[3.0], [1.0]]]), torch.full((1, 3, 1), 4.0)]
    teacher = [torch.tensor([[[2.0], [1.0]]]), torch.ones(1, 3, 1)]
    assert float(feature_loss(student, teacher)) == pytest.approx(1 / 5 + 9)


def test_the_feature_loss_is_a_mean_over_windows_however_they_are_divided():
    torch.manual_seed(0)
    student, teacher = ([torch.randn(4, 6, 8) * torch.arange(1, 5).view(4, 1, 1)] for _ in "ab")
    parts = [feature_loss([student[0][i : i + 2]], [teacher[0][i : i + 2]]) for i in (0, 2)]
    assert float(feature_loss(student, teacher)) == pytest.approx(float(sum(parts)) / 2, rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_blocks_learn_from_the_teachers_blocks(models, family):
    dense, sparse = models(family)
    source = Source(sparse)
    model = source.load(torch.float32)
    teacher, blocks = load_teacher(source, open_checkpoint(dense), torch.float32, like=True)
    own = [model.get_submodule(name) for name in source.blocks]
    ids = torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(5))
    how = Distillation(teacher, 1.0, 0.25, 0.5, blocks, own)
    found = Trainee(model, how).train()(ids, ids)["loss"].detach()
    without = Trainee(model, Distillation(teacher, 1.0, 0.25)).train()(ids, ids)["loss"].detach()
    each = [reference.block_errors(model, teacher, source.blocks, one) for one in ids.split(1)]
    expected = [sum(errors) / len(each) for errors in zip(*each, strict=True)]
    assert len(expected) == 2
    assert min(expected) > 1e-4
    assert float(found - without) == pytest.approx(0.5 * sum(expected), rel=1e-4)
    assert not any(block._forward_hooks for block in (*own, *blocks))
