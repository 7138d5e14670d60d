import pytest
import torch

from owl_deploy.finetune.survivors import SparseLinear, finished, freeze, nonzero, sparsify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_rounds_to_zero_stays_in_the_mask(dtype):
    values = torch.tensor([0.5, -1e-45, 0.0, -0.25])
    kept, count = nonzero(values.to(dtype), values)
    assert (kept != 0).all()
    assert count == (1 if dtype == torch.float32 else 2)
    assert kept[0] == 0.5
    assert kept[3] == -0.25
    tiny = torch.finfo(dtype).tiny
    assert kept[2] == tiny
    if dtype != torch.float32:
        assert kept[1] == -tiny


def block():
    torch.manual_seed(0)
    inner = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.LayerNorm(4))
    with torch.no_grad():
        inner[0].weight[torch.rand(4, 6) < 0.5] = 0
    return torch.nn.Sequential(inner)


def test_gradients_are_those_of_a_dense_layer_at_its_survivors():
    linear = block()[0][0]
    sparse = SparseLinear(linear, torch.float32)
    x = torch.randn(2, 3, 6, dtype=torch.float32)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [linear(inputs[0]), sparse(inputs[1])]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(sparse.values.grad, linear.weight.grad[linear.weight != 0])


def test_there_and_back():
    one = block()
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    sparsify(one, torch.float32)
    with torch.no_grad():
        one[0][0].values.mul_(2)
        one[0][0].values[0] = 1e-45
        one[0][0].refresh()
    tensors, kept = finished(one, dict.fromkeys(before, torch.bfloat16))
    assert kept == 1
    freeze(one, tensors, torch.float32)
    assert not any(parameter.requires_grad for parameter in one.parameters())
    after = one.state_dict()
    assert after.keys() == before.keys()
    assert torch.equal(after["0.0.weight"] == 0, before["0.0.weight"] == 0)
    assert torch.equal(after["0.1.weight"], before["0.1.weight"])
