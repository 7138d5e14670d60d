"""Through the whole verb for what a user sees, against the plain loop for the numbers."""

import json
import os
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from owl_deploy.compression import reconstruct
from owl_deploy.compression.reconstruct import Reconstruction, error, held_out_windows
from owl_deploy.compression.request import MEASURED_TOKENS
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.models import blocks
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import GRID, WEIGHTS, open_checkpoint
from owl_deploy.models.rounded_grid import limits
from tests import tiny
from tests.reference import reconstruct as reference

EPOCHS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    return {name: tiny.write_model(name, folder / name) for name in reference.HALVES}


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=12, sequence_length=48)


def pruned(model, folder, calibration, **values):
    """The manifest and the weights of a model of which half was removed."""
    asked = {"method": "sparsegpt", "allocation": "uniform", "sparsity": 0.5} | values
    manifest = prune(model, folder, PruneSettings.checked(**asked), calibration).to_json()
    return manifest, load_file(folder / WEIGHTS)


def without_half(weights):
    """The weights with the smaller half of every matrix removed."""
    return {
        name: one.masked_fill(one.abs() < one.abs().median(), 0) if one.ndim == 2 else one
        for name, one in weights.items()
    }


def test_the_error_is_that_of_every_token():
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 7, generator=generator)
    assert error(output, target) == pytest.approx(float(reference.error(output, target)))
    assert error(target, target) == 0
    huge = target * torch.tensor([1e3, 1, 1, 1, 1]).view(1, 5, 1)
    assert error(torch.zeros_like(huge), huge) == pytest.approx(1)


def test_a_token_of_no_size_does_not_count():
    """One whose embedding is zero, at the beginning of a window: nothing to divide by."""
    generator = torch.Generator().manual_seed(0)
    output, target = torch.randn(2, 3, 5, 7, generator=generator)
    target[0, 0] = 0
    output.requires_grad_()
    found = error(output, target)
    found.backward()
    others = torch.ones(3, 5, dtype=torch.bool)
    others[0, 0] = False
    sizes = target[others].square().sum(-1)
    wanted = ((output - target)[others].square().sum(-1) / sizes).mean()
    assert float(found.detach()) == pytest.approx(float(wanted.detach()))
    assert output.grad.isfinite().all()
    assert float(error(output.detach(), torch.zeros_like(target))) == 0


def test_the_windows_that_are_held_out():
    assert [held_out_windows(samples) for samples in (1, 8, 9, 128)] == [1, 1, 2, 16]


@pytest.mark.parametrize("family", reference.HALVES)
def test_two_blocks_against_the_plain_loop(models, family, tmp_path):
    """Each half, the streams that lead to it, and the errors that are told."""
    skeleton = Skeleton(open_checkpoint(str(models[family])), torch.float32, torch.device("cpu"))
    windows = torch.randint(320, (2, 8, 48), generator=torch.Generator().manual_seed(0))
    reconstruction = Reconstruction(
        skeleton, tuple(windows), batch=4, epochs=EPOCHS, dtype=torch.float32, scratch=tmp_path
    )
    arguments = reconstruction.training.pruned.arguments
    streams = [states.hidden.clone() for states in (reconstruction.training.pruned,) * 2]
    for index, name in enumerate(skeleton.names):
        dense = skeleton.checkpoint.read_module(name)
        weights = without_half(dense)
        linears = skeleton.linears(index)
        with skeleton.loaded(name, weights):
            found, outcomes = reconstruction.block(index, weights, linears, lambda _: None)
        with skeleton.loaded(name, {key: one.clone() for key, one in weights.items()}) as block:
            for half, outcome in zip(reference.HALVES[family], outcomes.values(), strict=True):
                trained = {key: one.detach().clone() for key, one in block.state_dict().items()}
                skeleton.fill(name, dense)
                with torch.no_grad():
                    streams[1] = half(block, streams[1], arguments[index])
                skeleton.fill(name, trained)
                losses = list(
                    reference.train(
                        block, half, streams, EPOCHS, reconstruct.LEARNING_RATE, arguments[index]
                    )
                )
                assert losses[-1] < losses[0]
                assert (outcome.epochs, outcome.after < outcome.before) == (EPOCHS, True)
                with torch.no_grad():
                    streams[0] = half(block, streams[0], arguments[index])
            for key, expected in block.state_dict().items():
                # Adam makes whole steps of gradients that are rounding alone; a key's bias has no
                # others, since a softmax does not see it.
                if not key.endswith("k_proj.bias"):
                    change = expected - weights[key]
                    assert (found[key] - expected).norm() <= 0.02 * change.norm(), key
                if key.removesuffix(".weight") in linears:
                    assert torch.equal(found[key] == 0, weights[key] == 0)
                    assert not torch.equal(found[key], weights[key])
        for states, expected in zip(
            (reconstruction.training.pruned, reconstruction.training.dense), streams, strict=True
        ):
            assert torch.allclose(states.hidden, expected, atol=5e-4)


@pytest.mark.parametrize("method", ["magnitude", "alps"])
@pytest.mark.parametrize("family", reference.HALVES)
def test_the_first_block_keeps_its_mask_and_comes_nearer(
    models, family, method, tmp_path, calibration, monkeypatch
):
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 0.002)  # random weights leave less to gain
    _, plain = pruned(models[family], tmp_path / "plain", calibration, method=method)
    manifest, found = pruned(
        models[family], tmp_path / "out", calibration, method=method, reconstruct=EPOCHS
    )
    assert manifest["settings"]["reconstruct"] == EPOCHS
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.5, abs=1e-3)
    for block in manifest["blocks"]:
        assert list(block["halves"]) == ["attention", "mlp"]
        for half in block["halves"].values():
            assert 0 < half["epochs"] <= EPOCHS
            assert half["after"] < half["before"]
    first = [name for name in plain if ".layers.0." in name and plain[name].ndim == 2]
    assert first
    for name in first:
        assert torch.equal(plain[name] == 0, found[name] == 0)
        assert not torch.equal(plain[name], found[name])
    outside = [name for name in plain if ".layers." not in name]
    assert outside
    assert all(torch.equal(plain[name], found[name]) for name in outside)
    assert "Then reconstructed" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_what_gets_worse_is_put_back(models, tmp_path, calibration, monkeypatch):
    _, plain = pruned(models["llama"], tmp_path / "plain", calibration)
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 100.0)
    manifest, found = pruned(models["llama"], tmp_path / "out", calibration, reconstruct=EPOCHS)
    for block in manifest["blocks"]:
        for half in block["halves"].values():
            assert half["epochs"] == 0
            assert half["after"] == half["before"]
    assert all(torch.equal(plain[name], found[name]) for name in plain)


def test_it_stops_where_it_overfits(models, tmp_path, monkeypatch):
    """The held-out error has its least after two epochs; of the ten, three more are tried."""
    skeleton = Skeleton(open_checkpoint(str(models["llama"])), torch.float32, torch.device("cpu"))
    windows = torch.zeros(1, 8, dtype=torch.long)
    reconstruction = Reconstruction(
        skeleton, (windows, windows), batch=1, epochs=10, dtype=torch.float32, scratch=tmp_path
    )
    errors, seen = [5.0, 3.0, 2.0, 4.0, float("nan"), 3.0], []

    def next_error(_half, _index, weights):
        seen.append({name: one.clone() for name, one in weights.items()})
        return errors[len(seen) - 1]

    monkeypatch.setattr(reconstruction, "_held_out_error", next_error)
    weights = without_half(skeleton.checkpoint.read_module(skeleton.names[0]))
    advanced = []
    with skeleton.loaded(skeleton.names[0], weights):
        found, outcomes = reconstruction.block(0, weights, ["mlp.up_proj"], advanced.append)
    assert list(outcomes) == ["mlp"]  # nothing was removed from the attention
    outcome = outcomes["mlp"]
    assert (outcome.before, outcome.after, outcome.epochs) == (5.0, 2.0, 2)
    assert len(seen) == 6
    assert all(torch.equal(found[name], seen[2][name]) for name in found)
    # What is not trained, and what is no more, counts as done.
    assert sum(advanced) == pytest.approx(reconstruction.passes)


def test_a_half_that_is_skipped_stays_as_it_is(models, tmp_path, calibration, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 0.002)
    attention = [f"{name}_proj" for name in "qkvo"]
    manifest, found = pruned(
        models["llama"], tmp_path / "out", calibration, reconstruct=1, skip=attention
    )
    dense = load_file(models["llama"] / WEIGHTS)
    assert [list(block["halves"]) for block in manifest["blocks"]] == [["mlp"]] * 2
    assert "Pruning: done in" in capsys.readouterr().err
    for name in dense:
        trained = "mlp" in name or "post_attention" in name
        assert torch.equal(dense[name], found[name]) != trained, name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(models, tmp_path, calibration, dtype, owl):
    text, windows = calibration.source, calibration.samples
    code, out, _ = owl(
        *("prune", models["llama"], "-o", tmp_path / "out", "-m", "wanda", "-s", 0.5),
        *("-c", text, "--samples", windows, "--sequence-length", 48, "--dtype", dtype),
        *("--reconstruct", EPOCHS, "--json"),
    )
    assert code == 0
    halves = [half for block in json.loads(out)["blocks"] for half in block["halves"].values()]
    assert len(halves) == 4
    assert all(half["after"] <= half["before"] for half in halves)


def test_the_table_says_what_it_gave(models, tmp_path, calibration, owl):
    code, out, _ = owl(
        *("prune", models["llama"], "-o", tmp_path / "out", "-m", "wanda", "-s", 0.5),
        *("-c", calibration.source, "--samples", 8, "--sequence-length", 48, "--reconstruct", 2),
    )
    assert code == 0
    assert "Reconstructed: 4 of 4 halves" in out


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"reconstruct": 0}, "reconstruct.* 0"),
        ({"reconstruct": -1}, "reconstruct.* -1"),
    ],
)
def test_what_is_impossible_is_refused(values, complaint):
    with pytest.raises(BadInput, match=complaint):
        PruneSettings.checked(**values)


def on_grid(folder, bits):
    """The integers of every rounded weight of a checkpoint, by name; each lies on its grid."""
    weights, found = load_file(folder / WEIGHTS), {}
    for name, scales in load_file(folder / GRID).items():
        weight = weights[name.removesuffix("_scale")]
        wide = scales.float().repeat_interleave(32, dim=1)[:, : weight.shape[1]]
        integers = (weight / wide).round()
        assert torch.equal(integers * wide, weight), name
        least, most = limits(bits)
        assert least <= integers.min() <= integers.max() <= most
        found[name] = integers
    return found


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_what_is_rounded_comes_nearer_on_its_grid(
    models, tmp_path, calibration, monkeypatch, bits, sparsity
):
    """Zeros of a mask stay; of what was only rounded, weights come to zero and off it."""
    asked = {"bits": bits, "sparsity": sparsity, "method": "sparsegpt" if sparsity else "none"}
    asked["asymmetric"] = False  # which leaves still less
    pruned(models["llama"], tmp_path / "plain", calibration, **asked)
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 0.002)  # random weights leave less to gain
    manifest, _ = pruned(
        models["llama"], tmp_path / "out", calibration, **asked, reconstruct=2 * EPOCHS
    )
    before, after = (on_grid(tmp_path / name, bits) for name in ("plain", "out"))
    assert load_file(tmp_path / "plain" / GRID).keys() == before.keys() == after.keys()
    halves = manifest["blocks"][0]["halves"]
    assert list(halves) == ["attention", "mlp"]
    assert halves["mlp"]["after"] < halves["mlp"]["before"]
    name = "model.layers.0.mlp.up_proj.weight_scale"
    gone = ((before[name] != 0) & (after[name] == 0)).sum()
    come = ((before[name] == 0) & (after[name] != 0)).sum()
    assert (before[name] != after[name]).any()
    assert (gone > 0, come > 0) == (not sparsity, not sparsity)
    wholes = {one.get("whole") for block in manifest["blocks"] for one in block["linears"].values()}
    assert wholes == ({None} if sparsity else {True})


def test_zeros_of_a_model_that_was_pruned_before_stay(models, tmp_path, calibration, monkeypatch):
    _, sparse = pruned(models["llama"], tmp_path / "sparse", calibration, skip=("q_proj",))
    monkeypatch.setattr(reconstruct, "LEARNING_RATE", 0.02)
    settings = {"method": "none", "sparsity": 0.0, "bits": 3, "reconstruct": EPOCHS}
    manifest, _ = pruned(tmp_path / "sparse", tmp_path / "out", calibration, **settings)
    found = on_grid(tmp_path / "out", 3)
    for block in manifest["blocks"]:
        for linear, one in block["linears"].items():
            name = f"{block['name']}.{linear}.weight"
            assert one.get("whole") == (True if linear.endswith("q_proj") else None)
            if not one.get("whole"):
                assert not found[f"{name}_scale"][sparse[name] == 0].any()


def test_a_budget_is_reconstructed_in_each_format(models, tmp_path, calibration):
    settings = PruneSettings.checked(budget="5", reconstruct=1)
    manifest = prune(models["llama"], tmp_path / "out", settings, calibration).to_json()
    bits = {one["bits"] for block in manifest["blocks"] for one in block["linears"].values()}
    assert len(bits) > 1
    assert all(list(block["halves"]) == ["attention", "mlp"] for block in manifest["blocks"])


def test_it_needs_a_text(models, tmp_path):
    settings = PruneSettings.checked(method="magnitude", allocation="uniform", reconstruct=1)
    with pytest.raises(BadInput, match="A reconstruction trains what is left on a text"):
        prune(models["llama"], tmp_path / "out", settings, None)


def test_it_needs_windows_to_hold_out(models, tmp_path):
    (tmp_path / "text.txt").write_text(tiny.text(400))
    text = Calibration(str(tmp_path / "text.txt"), samples=10**6, sequence_length=2)
    with pytest.raises(BadInput, match="not 1000000") as refused:
        prune(models["llama"], tmp_path / "out", PruneSettings.checked(allocation="owl"), text)
    there = int(re.search(r"holds (\d+) windows", str(refused.value))[1])
    enough = replace(text, samples=there)
    others = max(held_out_windows(there), MEASURED_TOKENS // 2)
    with pytest.raises(BadInput, match=f"not {there} and {others} others"):
        prune(
            models["llama"],
            tmp_path / "out",
            PruneSettings.checked(allocation="owl", reconstruct=1),
            enough,
        )
    assert not (tmp_path / "out").exists()


def test_what_memory_does_not_hold_lies_in_a_file_twice(models, tmp_path, calibration, monkeypatch):
    monkeypatch.setattr(blocks, "free_memory", lambda: 0)
    made = []
    fallocate = os.posix_fallocate
    monkeypatch.setattr(
        blocks.os, "posix_fallocate", lambda *given: made.append(given) or fallocate(*given)
    )
    windows = torch.zeros(2, 16, dtype=torch.long)
    skeleton = Skeleton(open_checkpoint(models["llama"]), torch.float32, torch.device("cpu"))
    states = skeleton.embed(windows, 1, tmp_path)
    other = states.copy(tmp_path)
    assert len(made) == 2
    assert not any(tmp_path.iterdir())  # they have no names, which a kill would leave
    assert torch.equal(states.hidden, other.hidden)
    other.hidden.zero_()
    assert states.hidden.any()
