import pytest
import torch

from owl_deploy.finetune.frozen import HalfLinear, halve
from owl_deploy.models.sparse_linear import freeze


class Model(torch.nn.Module):
    """An embedding, whose weight is a head's as well if `tied`, and two Linears between them."""

    def __init__(self, tied=False):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(10, 6)
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6, bias=False))
        self.head = torch.nn.Linear(6, 10, bias=False)
        for parameter in self.parameters():
            parameter.data = parameter.data.bfloat16().float()
        if tied:
            self.head.weight = self.embedding.weight
        self.requires_grad_(False)

    def forward(self, hidden):
        return self.head(self.inner(hidden))


def test_what_is_frozen_again_is_halved_again():
    """As a block is that an earlier run has finished, and that is put into a model anew."""
    model = torch.nn.Sequential(Model().inner)
    halve(model)
    trained = {name: 2 * one for name, one in model.state_dict().items()}
    freeze(model, trained, torch.float32)
    assert type(model[0][0]) is torch.nn.Linear
    assert model[0][0].weight.dtype == torch.float32
    halve(model)
    assert model[0][0].weight.dtype == torch.bfloat16
    assert all(torch.equal(model.state_dict()[name], one) for name, one in trained.items())


@pytest.mark.parametrize("tied", [False, True])
def test_products_and_gradients_are_those_of_float32(tied):
    plain, lean = Model(tied), Model(tied)
    halve(lean)
    x = torch.randn(2, 3, 6)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(one) for model, one in zip((plain, lean), inputs, strict=True)]
    assert outputs[1].dtype == torch.float32
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    assert all(parameter.grad is None for parameter in lean.parameters())


def test_the_weights_take_half_and_what_an_embedding_shares_stays():
    lean = Model()
    halve(lean)
    assert {one.weight.dtype for one in (*lean.inner, lean.head)} == {torch.bfloat16}
    assert lean.inner[0].bias.dtype == lean.embedding.weight.dtype == torch.float32
    tied = Model(tied=True)
    halve(tied)
    assert tied.head.weight is tied.embedding.weight
    assert tied.head.weight.dtype == torch.float32


def test_a_weight_that_bfloat16_does_not_hold_stays():
    model = Model()
    model.inner[1].weight[0, 0] = 1 + 2**-20
    halve(model)
    assert isinstance(model.inner[0], HalfLinear)
    assert model.inner[1].weight.dtype == torch.float32
    assert model.inner[1].weight[0, 0] == 1 + 2**-20
    half = model.inner[0].weight
    halve(model)  # of which one part is halved already
    assert model.inner[0].weight is half


def test_what_trains_stays():
    """Of an adapter the half that begins as zeros, which bfloat16 holds."""
    model = Model()
    model.head.requires_grad_(True)
    halve(model)
    assert model.head.weight.dtype == torch.float32
    assert isinstance(model.inner[0], HalfLinear)


def test_nothing_widened_is_kept_until_the_backward_pass():
    linear = HalfLinear(torch.ones(4, 6, dtype=torch.bfloat16), None)
    y = linear(torch.ones(2, 6, requires_grad=True))
    assert y.grad_fn.saved_tensors == ()
    assert y.grad_fn.weight is linear.weight
