import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from owl_deploy.errors import BadInput
from owl_deploy.finetune import train as training
from owl_deploy.finetune.settings import resolved
from owl_deploy.finetune.source import Source
from owl_deploy.finetune.train import Schedule, _Clock, tokens_per_second, train
from owl_deploy.finetune.trainee import Trainee
from owl_deploy.models.sparse_linear import sparse_linears, sparsify
from tests.reference import finetune as reference

# A bias on all keys changes no attention: its gradient is rounding noise, which Adam scales up.
KEY_BIASES = ("self_attn.k_proj.bias", "attention.query_key_value.bias")


def ids(length=48):
    return torch.randint(0, 320, (length,), generator=torch.Generator().manual_seed(3))


def settings(**values):
    return resolved({"method": "masked", "warmup": 0.0, **values}, teacher=False)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_equals_dense_training_with_masked_gradients(models, tmp_path, family):
    source = Source(models(family)[1])
    plain = source.load(torch.float32)
    expected = reference.train_under_a_mask(plain, source.blocks, ids(), 5, 0.1)

    model = source.load(torch.float32)
    for name in source.blocks:
        sparsify(model.get_submodule(name), torch.float32)
    # Two equal windows a step give the gradient of one, whatever order they come in.
    windows = (ids().expand(2, -1).contiguous(), ids()[None])
    asked = settings(learning_rate=0.1, gradient_accumulation=2)
    curve = train(Trainee(model), windows, asked, Schedule(5, None), tmp_path, "Training")

    assert [row["loss"] for row in curve if "loss" in row] == pytest.approx(expected, abs=1e-6)
    told = [row["learning_rate"] for row in curve if "loss" in row]
    assert told == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])  # as asked, whatever a tensor's is
    for name in source.blocks:
        found = model.get_submodule(name).state_dict()
        for key, wanted in plain.get_submodule(name).state_dict().items():
            if key not in KEY_BIASES:
                # Adam scales up what rounding leaves of a small gradient: 1.06e-6 on Zen 4.
                most = 2e-6 if family == "opt" else 1e-6
                torch.testing.assert_close(found[key], wanted, rtol=0, atol=most)


@pytest.mark.parametrize(
    ("limit", "took", "evaluations"),
    [(600.0, 10.0, 4), (60.0, 1.9, 2), (60.0, 22.0, 1), (None, 22.0, 4)],
)
@pytest.mark.parametrize("resumed", [False, True])
def test_evaluating_takes_a_part_of_the_time(limit, took, evaluations, resumed, monkeypatch):
    monkeypatch.setattr(training.time, "monotonic", lambda: 1000.0)  # nothing takes more than told
    clock = _Clock(Schedule(100, limit), None, lambda _: None)
    log = [{"eval_loss": 3.0, "seconds": took}, {"loss": 3.0, "seconds": took + 1}]
    state = SimpleNamespace(log_history=log if resumed else [], global_step=0)
    clock.on_train_begin(None, state, None)
    if not resumed:
        clock._began -= took
        clock.on_evaluate(None, SimpleNamespace(global_step=0), None)
    control = SimpleNamespace(should_evaluate=False)
    asked = 0
    for step in range(1, 101):
        if limit:
            clock._began = time.monotonic() - limit * step / 100
        clock.on_step_end(None, SimpleNamespace(global_step=step, num_input_tokens_seen=0), control)
        asked += control.should_evaluate
    assert asked == evaluations


def rates(schedule, moments):
    """The learning rate's factor at each (step, seconds), with a fifth of the run to warm up."""
    clock = _Clock(schedule, None, lambda _: None)
    found = []
    for step, seconds in moments:
        clock.seconds = lambda seconds=seconds: seconds
        found.append(clock.rate(0.2)(step))
    return found


def test_the_rate_rises_and_falls_with_the_steps():
    by_hand = [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125, 0]
    moments = [(step, 1e6) for step in range(11)]  # without a limit time is nothing to it
    assert rates(Schedule(10, None), moments) == pytest.approx(by_hand)


def test_the_rate_rises_and_falls_with_the_time():
    moments = [(0, 0.0), (8, 10.0), (9, 20.0), (13, 60.0), (14, 90.0), (15, 100.0), (16, 110.0)]
    by_hand = [0.005, 0.505, 1, 0.5, 0.125, 0, 0]
    assert rates(Schedule(1000, 100.0), moments) == pytest.approx(by_hand)
    # Whichever is further on: half of the steps here, and half of the time.
    assert rates(Schedule(20, 100.0), [(10, 10.0), (9, 50.0)]) == pytest.approx([0.625, 0.625])


def test_the_rate_rises_for_ten_steps_however_slow_they_are():
    """Slow steps, or a slow evaluation before them, would leave the share of the time no room."""
    moments = [(step, 25.0) for step in range(11)]
    by_hand = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.9375, 0.9375]
    assert rates(Schedule(1000, 100.0), moments) == pytest.approx(by_hand)


def test_there_is_nothing_but_survivors_to_optimize(models):
    source = Source(models("llama")[1])
    model = source.load(torch.float32)
    sparsify(model.get_submodule(source.blocks[0]), torch.float32)
    trainee = Trainee(model)
    trainee(ids()[None], ids()[None])["loss"].backward()
    tensors = source.checkpoint.read_module(source.blocks[0])
    nonzeros = sum(int((tensor != 0).sum()) for tensor in tensors.values())
    assert sum(p.numel() for p in trainee.trained().values()) == nonzeros
    with_gradient = [p for p in trainee.parameters() if p.grad is not None]
    assert sum(p.grad.numel() for p in with_gradient) == nonzeros
    assert sum(one.numel() for one in trainee.state_dict().values()) == nonzeros
    names = {name for name, _ in (*trainee.named_parameters(), *trainee.named_buffers())}
    assert names - set(trainee._ddp_params_and_buffers_to_ignore) == trainee.trained().keys()


def test_bfloat16_products_keep_float32_weights(models, tmp_path):
    source = Source(models("llama")[1])
    model = source.load(torch.float32)
    sparsify(model.get_submodule(source.blocks[0]), torch.bfloat16)
    windows = (ids()[None], ids()[None])
    trainee = Trainee(model, dtype=torch.bfloat16)
    asked = settings(learning_rate=0.1, gradient_accumulation=1)
    curve = train(trainee, windows, asked, Schedule(8, None), tmp_path, "Training")
    losses = [row["loss"] for row in curve if "loss" in row]
    assert losses[-1] < losses[0] - 0.1
    for _, sparse in sparse_linears(model):
        assert sparse.values.dtype == torch.float32
        positions = sparse.positions.long()
        assert sparse.weight.flatten()[positions].equal(sparse.values.bfloat16())


def test_the_clock_ends_a_training_and_its_learning_rate(models, tmp_path, monkeypatch):
    looks = itertools.count()  # a hundredth of a second each, however busy the machine is
    monkeypatch.setattr(_Clock, "_own_seconds", lambda _: next(looks) / 100)
    source = Source(models("llama")[1])
    model = source.load(torch.float32)
    sparsify(model.get_submodule(source.blocks[0]), torch.float32)
    windows = (ids()[None], ids()[None])
    asked = settings(learning_rate=1e-3, gradient_accumulation=1)
    curve = train(Trainee(model), windows, asked, Schedule(10**6, 1.0), tmp_path, "Training")
    rates = [row["learning_rate"] for row in curve if "loss" in row]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 3 * rates[-1]
    assert curve[-1]["seconds"] >= 1
    assert "eval_loss" in curve[-1]


def test_the_speed_leaves_evaluations_out():
    curve = [
        {"step": 0, "seconds": 5.0, "tokens": 0, "eval_loss": 3.0},
        {"step": 1, "seconds": 7.0, "tokens": 100, "loss": 3.0},
        {"step": 2, "seconds": 8.0, "tokens": 200, "loss": 3.0},
        {"step": 2, "seconds": 9.5, "tokens": 200, "eval_loss": 3.0},
        {"step": 3, "seconds": 11.5, "tokens": 300, "loss": 3.0},
    ]
    assert tokens_per_second(curve) == 300 / (2 + 1 + 2)


def test_the_bar_tells_the_speed_of_its_steps(monkeypatch):
    now = iter([10.0, 12.0, 50.0, 51.0])
    monkeypatch.setattr(training.time, "monotonic", lambda: next(now))
    speed = training._Speed()
    assert speed.note() == ""
    for before, after in ((1000, 1100), (1100, 1300)):
        speed.begin(before)
        speed.end(after)
    assert speed.note() == "100 tokens/s"


def test_a_loss_that_is_no_number_is_an_error(models, tmp_path):
    source = Source(models("llama")[1])
    model = source.load(torch.float32)
    sparsify(model.get_submodule(source.blocks[0]), torch.float32)
    windows = (ids()[None], ids()[None])
    asked = settings(learning_rate=1e30, gradient_accumulation=1)
    with pytest.raises(BadInput, match="smaller --learning-rate"):
        train(Trainee(model), windows, asked, Schedule(9, None), tmp_path, "Training")


def test_a_checkpoint_that_a_kill_cut_short_pushes_none_out(tmp_path):
    """The Trainer keeps the two of the highest numbers, and deletes before the newest is whole."""
    for name in ("checkpoint-3", "checkpoint-9"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-3" / "complete").touch()
    assert training._cleared(tmp_path) == tmp_path / "checkpoint-3"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
