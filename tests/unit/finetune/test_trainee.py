import math

import pytest
import torch

from owl_deploy.finetune.trainee import Trainee, distillation_loss


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
    found = distillation_loss(student, teacher, temperature)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_teacher_weighs_in_training_only():
    trainee = Trainee(Fixed([0.0, math.log(3)]), Fixed([0.0, 0.0]), weight=0.25)
    ids = torch.tensor([[0, 1, 1]])
    cross_entropy = -math.log(3 / 4)
    divergence = 0.5 * math.log(4 / 3)
    training = trainee.train()(ids, ids)["loss"].detach()
    assert float(training) == pytest.approx(0.75 * cross_entropy + 0.25 * divergence, rel=1e-6)
    assert trainee.eval()(ids, ids)["loss"].item() == pytest.approx(cross_entropy, rel=1e-6)


def test_the_teacher_drops_nothing():
    trainee = Trainee(Fixed([0.0]), Fixed([0.0])).train()
    assert trainee.model.training
    assert not trainee.teacher.training
