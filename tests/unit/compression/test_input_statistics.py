import pytest
import torch
from torch import nn

from owl_deploy.compression import input_statistics
from owl_deploy.compression.input_statistics import Inputs, InputStatistics
from owl_deploy.compression.measure import gather
from owl_deploy.compression.pruning.sparsegpt import factorise
from owl_deploy.compression.request import check
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.calibration import Calibration
from owl_deploy.errors import BadInput
from owl_deploy.models.blocks import Activations
from owl_deploy.models.checkpoint import open_checkpoint, stored_dtype
from owl_deploy.utils import hardware
from owl_deploy.utils.hardware import ANY_HARDWARE


class Block(nn.Module):
    """Two Linears that share their input, then one that counts its calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(6, 6), nn.Linear(6, 6)
        self.down = nn.Linear(6, 6)
        self.products = 0
        self.down.register_forward_hook(self._count)

    def _count(self, *_):
        self.products += 1

    def forward(self, hidden):
        return self.down(torch.relu(self.q(hidden)) * self.k(hidden))


def gathered(states, *, keep, hessian):
    block = Block()
    linears = dict(block.named_children())
    statistics = InputStatistics(linears, len(states), hessian=hessian)
    hidden = Activations(states.clone(), [{}], 2, torch.device("cpu"))
    with statistics.gathering(inputs_only=not keep):
        hidden.through(block, 0, lambda _: None, keep=keep)
    return block, statistics, hidden


@pytest.mark.parametrize("hessian", [False, True])
def test_a_pass_for_the_inputs_alone_sees_the_same_and_spares_the_last_product(hessian):
    states = torch.randn(7, 5, 6)  # batches of 2, the last of 1
    whole, expected, _ = gathered(states, keep=True, hessian=hessian)
    early, found, hidden = gathered(states, keep=False, hessian=hessian)
    assert (whole.products, early.products) == (4, 1)  # the first pass tells which is the last
    assert torch.equal(hidden.hidden, states)
    for name in ("q", "k", "down"):
        assert torch.equal(found.norm(name), expected.norm(name))
        if hessian:
            upper = [one.of_hessian(name, factorise, 0.01).upper for one in (found, expected)]
            assert torch.equal(*upper)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_matrix_is_exact_in_every_dtype(dtype):
    """Also where products are made in bfloat16, which is for those of bfloat16's values alone."""
    torch.manual_seed(0)
    linear = nn.Linear(96, 8, dtype=dtype)
    rows = torch.randn(400, 96).to(dtype)
    statistics = InputStatistics({"one": linear}, 1, hessian=True)
    with statistics.gathering():
        linear(rows)
    expected = rows.double().T @ rows.double()
    found = statistics.of_hessian("one", lambda matrix: matrix.double())
    # Zen 4 adds bfloat16's products up less exactly: 1.5e-6 here, 1.3e-6 of 65,536 rows.
    most = 2e-6 if dtype == torch.bfloat16 else 1e-6
    assert (found - expected).abs().max() < most * expected.max()
    assert torch.get_float32_matmul_precision() == "highest"


def test_half_of_the_products_makes_the_whole_matrix(monkeypatch):
    monkeypatch.setattr(input_statistics, "_COLUMNS", 4)
    states = torch.randn(4, 5, 6)
    _, found, _ = gathered(states, keep=False, hessian=True)
    rows = states.reshape(-1, 6)
    made = found.of_hessian("q", torch.clone)
    torch.testing.assert_close(made, rows.T @ rows)


def test_few_tokens_ask_for_more_dampening():
    """By the inputs over the tokens, of those that share an input alike."""
    states = torch.randn(4, 5, 6)
    _, found, _ = gathered(states, keep=True, hessian=True)
    for name in ("q", "k", "down"):
        inputs = Inputs(found, name)
        assert inputs.dampening(0.01) == pytest.approx(6 / 20)
        assert inputs.dampening(0.5) == 0.5
    _, found, _ = gathered(states[:1], keep=True, hessian=True)
    assert Inputs(found, "down").dampening(0.01) == 1  # of 5 tokens


def test_norms_are_those_of_the_definition():
    states = torch.randn(4, 5, 6)
    _, found, _ = gathered(states, keep=False, hessian=False)
    expected = (states.reshape(-1, 6).double().square().sum(0) / 4).sqrt()
    torch.testing.assert_close(found.norm("q").double(), expected)


@pytest.mark.parametrize(
    ("stored", "fast", "expected"),
    [
        ("bfloat16", True, torch.bfloat16),
        ("bfloat16", False, torch.float32),
        ("float16", True, torch.float32),
        ("float32", True, torch.float32),
    ],
)
def test_a_cpu_computes_in_the_stored_dtype_where_it_is_fast_in_it(
    llama, monkeypatch, stored, fast, expected
):
    checkpoint = open_checkpoint(llama)
    checkpoint.config["dtype"] = stored
    monkeypatch.setattr(hardware, "multiplies_bfloat16", lambda _: fast)
    cpu = torch.device("cpu")
    assert hardware.find_dtype("auto", stored_dtype(checkpoint.config), cpu) == expected
    assert (
        hardware.find_dtype("auto", stored_dtype(checkpoint.config), cpu, exact=True)
        == torch.float32
    )


def test_what_attention_reads_counts_the_running_means_too():
    torch.manual_seed(0)
    linears = {name: torch.nn.Linear(5, 3) for name in ("q", "v")}
    inputs = InputStatistics(linears, 2, hessian=True, read=["v"])
    batches = [torch.randn(2, 7, 5), torch.randn(1, 7, 5)]
    with inputs.gathering():
        for x in batches:
            for linear in linears.values():
                linear(x)
    plain, means = torch.zeros(5, 5), torch.zeros(5, 5)
    for window in torch.cat(batches):
        for end in range(1, 8):
            plain += window[end - 1].outer(window[end - 1])
            mean = window[:end].mean(0)
            means += mean.outer(mean)
    for name, expected in (("q", plain), ("v", plain + 64 * means)):
        found = inputs.of_hessian(name, torch.clone)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.allclose(inputs.norm(name), (plain.diagonal() / 2).sqrt(), rtol=1e-4)
    assert [Inputs(inputs, name).dampening(0.01) for name in "qv"] == [5 / 21, 0.01]


def test_what_is_crossed_counts_as_the_statistic_does():
    torch.manual_seed(0)
    linears = {name: torch.nn.Linear(5, 3) for name in ("q", "v")}
    inputs = InputStatistics(linears, 2, hessian=True, read=["v"])
    batches = [(torch.randn(size, 7, 5), torch.randn(size, 7, 4)) for size in (2, 1)]
    with inputs.gathering():
        for x, other in batches:
            for linear in linears.values():
                linear(x)
            inputs.cross("q", other)
    plain, means = torch.zeros(4, 5), torch.zeros(4, 5)
    for x, other in batches:
        for rows, others in zip(x, other, strict=True):
            for end in range(1, 8):
                plain += others[end - 1].outer(rows[end - 1])
                means += others[:end].mean(0).outer(rows[:end].mean(0))
    for name, expected in (("q", plain), ("v", plain + 64 * means)):
        found = Inputs(inputs, name).crossed()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hessian", [False, True])
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e38])
def test_what_overflows_is_refused_by_its_name(hessian, value):
    states = torch.randn(2, 5, 6)
    states[1, 2, 3] = value
    with pytest.raises(BadInput, match=r"what enters q is infinite, or no number.*float32"):
        gathered(states, keep=False, hessian=hessian)


@pytest.mark.parametrize(("bits", "counts"), [(4, 1), (None, 0)])
def test_running_means_count_where_values_are_rounded(llama, text_file, tmp_path, bits, counts):
    text = Calibration(str(text_file), samples=2, sequence_length=16)
    settings = PruneSettings.checked(
        method="sparsegpt", sparsity=0.5, bits=bits, allocation="uniform"
    )
    request = check(llama, settings, text, ANY_HARDWARE)
    hidden = request.skeleton.embed(request.own_windows, request.batch, tmp_path)
    with request.skeleton.loaded(request.skeleton.names[0]) as block:
        found = gather(request, block, 0, hidden, print, keep=False, hessian=True)
    names = [name for name in request.shape.linears[0] if found.unsure(name) == 0]
    assert names == ["self_attn.v_proj"] * counts
