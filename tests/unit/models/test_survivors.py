import itertools

import pytest
import torch

from owl_deploy.models.sparse_linear import (
    LinearGrid,
    SparseLinear,
    finished,
    freeze,
    groups,
    nonzero,
    sparsify,
)


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


def test_where_nothing_was_removed_zero_is_an_integer_like_others():
    linear = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, 0.0, -1.0, 0.0]]))
    sparse = SparseLinear(
        linear, torch.float32, LinearGrid(4, 4, torch.tensor([[0.5]]), whole=True)
    )
    assert sparse.values.numel() == 4
    x = torch.randn(3, 4)
    sparse(x).square().sum().backward()
    rounded = linear.weight.detach().clone().requires_grad_()
    torch.nn.functional.linear(x, rounded).square().sum().backward()
    torch.testing.assert_close(sparse.values.grad, rounded.grad.flatten())
    with torch.no_grad():
        sparse.values.add_(torch.tensor([-0.3, 0.3, 0.0, 0.0]))  # to 0.4 and 0.6 of a step
        sparse.refresh()
    dense, lost = sparse.dense(torch.bfloat16)
    assert (dense.tolist(), lost) == ([[0.0, 0.5, -1.0, 0.0]], 0)
    assert torch.equal(sparse.weight, dense.float())


def test_values_lean_towards_the_dense_ones_and_round_as_before():
    linear = torch.nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, 0.0, -1.0, 3.5]]))
    dense = torch.tensor([[0.6, -2.0, -1.3, 9.0]])
    expected = {True: [0.6, -0.245, -1.245, 3.745], False: [0.6, -1.245, 3.745]}
    for whole, scale in itertools.product((True, False), (0.5, -0.5)):
        grid = LinearGrid(4, 4, torch.tensor([[scale]]), whole)
        sparse = SparseLinear(linear, torch.float32, grid)
        sparse.lean(dense)
        assert sparse.values.tolist() == pytest.approx(expected[whole])
        sparse.refresh()
        assert torch.equal(sparse.weight, linear.weight)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_16_bits_hold_only_nearly_rounds_as_before_all_the_same(whole, dtype):
    torch.manual_seed(0)
    scales = torch.full((8, 2), (1 + 5 / 16) * 2**-9)
    steps = scales.repeat_interleave(32, dim=1)
    integers = torch.randint(-127, 128, (8, 64)).float()
    linear = torch.nn.Linear(64, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_((integers * steps).to(dtype))  # up to a quarter of a step off
    sparse = SparseLinear(linear, torch.float32, LinearGrid(8, 32, scales, whole))
    for change in (0.0, 1.0, -1.0):
        sparse.lean((integers + change) * steps)
        assert torch.equal((sparse.dense(torch.float32)[0] / steps).round(), integers)


def test_the_learning_rate_of_each_tensor_goes_by_its_size():
    linear = torch.nn.Linear(4, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[3.0, 0, 0, 4], [0, 0, 0, 5]]))
        linear.bias.fill_(-2.0)
    block = torch.nn.Sequential(linear)
    sparsify(block, torch.float32)
    found = {group["params"][0].numel(): group["lr"] for group in groups(block.parameters(), 0.1)}
    assert found == pytest.approx({3: 0.1 * (50 / 3) ** 0.5, 2: 0.2})  # three are left, and a bias


def test_what_is_all_zeros_trains_too():
    zeros, *others = (torch.nn.Parameter(torch.full((3,), value)) for value in (0.0, 2.0, -1.0))
    assert [one["lr"] for one in groups([zeros, *others], 0.1)] == pytest.approx([0.1, 0.2, 0.1])
    assert groups([zeros], 0.1)[0]["lr"] == 0


@pytest.mark.parametrize(("bits", "least", "most"), [(8, -127, 127), (4, -8, 7), (3, -4, 3)])
@pytest.mark.parametrize("sign", [1, -1])
def test_what_is_rounded_trains_straight_through_and_stays_on_its_grid(bits, least, most, sign):
    linear = torch.nn.Linear(6, 2, bias=False)
    scales = sign * torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    integers = torch.tensor([[1, 2, 0, -3, 3, 1], [0, -1, 2, 3, 0, -2]]).float()
    with torch.no_grad():
        linear.weight.copy_(integers * scales.repeat_interleave(4, dim=1)[:, :6])
    sparse = SparseLinear(linear, torch.float32, LinearGrid(bits, 4, scales))
    x = torch.randn(3, 6)
    torch.testing.assert_close(sparse(x), linear(x))
    with torch.no_grad():
        moved = torch.tensor([0.2, 0.5, 1.6, -999.0, 999.0, -0.2, -1.7, 999.0, -2.6])
        sparse.values.add_(moved * scales.flatten()[[0, 0, 0, 1, 1, 2, 2, 2, 3]])
        sparse.refresh()
    # 1.2 -> 1, 2.5 -> 2 (to even), -1.4 -> -1, beyond: the ends; 0.3 -> 1, no zero ever
    dense, lost = sparse.dense(torch.bfloat16)
    assert lost == 0
    found = (dense.float() / scales.repeat_interleave(4, dim=1)[:, :6]).round()
    assert torch.equal(found == 0, integers == 0)
    assert torch.equal(dense.float(), sparse.weight.bfloat16().float())
    assert (found.min(), found.max()) == (least, most)
    assert found[1, 2] == 1
    sparse(x).square().sum().backward()
    rounded = sparse.weight.clone().requires_grad_()
    torch.nn.functional.linear(x, rounded).square().sum().backward()
    torch.testing.assert_close(sparse.values.grad, rounded.grad[rounded != 0])
