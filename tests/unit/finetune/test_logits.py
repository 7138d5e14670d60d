import math

import pytest
import torch

from owl_deploy.finetune.logits import (
    TeacherCache,
    cache_bytes,
    cut_distillation_loss,
    likeliest,
)
from tests.reference.finetune import distillation_loss


def logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_cut_loss_by_hand():
    # shares of three tokens: teacher 1/2, 1/4, 1/4 and student 1/4, 1/4, 1/2; the last two as one
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
    student = torch.tensor([[0.25, 0.25, 0.5]]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    found = cut_distillation_loss(student, likeliest(teacher, 1, 1.0), 1.0)
    assert float(found) == pytest.approx(expected, rel=1e-3)  # the shares are kept in float16


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_all_tokens_but_one_nothing_is_cut(temperature):
    student, teacher = logits(5, 7), logits(5, 7, seed=1)
    found = cut_distillation_loss(student, likeliest(teacher, 6, temperature), temperature)
    whole = distillation_loss(student, teacher, temperature)
    assert float(found) == pytest.approx(float(whole), rel=2e-3)


def test_the_least_is_where_the_teacher_is():
    teacher = logits(4, 50)
    student = teacher.clone().requires_grad_()
    loss = cut_distillation_loss(student, likeliest(teacher, 5, 1.0), 1.0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-3
    assert float(student.grad.abs().max()) < 1e-3


def test_a_teacher_that_is_certain_gives_a_loss():
    teacher = torch.tensor([[1e6, 0.0, 0.0, 0.0]])
    student = logits(1, 4).requires_grad_()
    loss = cut_distillation_loss(student, likeliest(teacher, 2, 1.0), 1.0)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(student.detach(), torch.tensor([0]))
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-3)
    assert student.grad.isfinite().all()


def test_the_teacher_is_asked_once_a_window(tmp_path):
    cache = TeacherCache(tmp_path, 0, 6, 3, 2)
    told = likeliest(logits(6 * 3, 9), 2, 1.0)
    asked = []

    def ask(numbers):
        def make(places):
            asked.extend(numbers[places].tolist())
            rows = (numbers[places, None] * 3 + torch.arange(3)).flatten()
            return told[0][rows], told[1][rows]

        return make

    for batch in ([4, 1], [1, 5], [5, 4]):
        numbers = torch.tensor(batch)
        rows = (numbers[:, None] * 3 + torch.arange(3)).flatten()
        ids, shares = cache.of(numbers, ask(numbers))
        assert torch.equal(ids, told[0][rows])
        assert torch.equal(shares, told[1][rows])
    assert asked == [4, 1, 5]
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == cache_bytes(6, 3, 2)
