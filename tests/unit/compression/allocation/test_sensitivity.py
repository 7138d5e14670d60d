"""What the formats of each Linear cost, against the definition on a whole model in memory."""

import dataclasses
import itertools

import pytest
import torch
import transformers
from pydantic import TypeAdapter

from owl_deploy.compression import request as prune_request
from owl_deploy.compression.allocation import sensitivity
from owl_deploy.compression.allocation.sensitivity import Measuring
from owl_deploy.compression.layer import Maker
from owl_deploy.compression.quantization.formats import FORMATS, Format, formats, packed_size
from owl_deploy.compression.request import check
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.store import Store
from owl_deploy.data.calibration import Calibration
from owl_deploy.utils.artefact import only_writer
from owl_deploy.utils.hardware import ANY_HARDWARE
from tests import tiny
from tests.reference import sensitivity as reference

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "opt"])
def model(request, tmp_path_factory):
    return tiny.write_model(request.param, tmp_path_factory.mktemp("model") / request.param)


def asked(model, text_file, size="4", **values):
    settings = PruneSettings.checked(budget=size, **{"asymmetric": False} | values)
    calibration = Calibration(str(text_file), samples=5, sequence_length=48, seed=3)
    return check(model, settings, calibration, ANY_HARDWARE)


def measured(request, folder):
    """The store after both passes, and the costs."""
    store = Store(folder / "out", request.deciding(), resume=False, force=True)
    return store, costs_by(request, store)


def costs_by(request, store):
    """The costs, measured in the store whatever the cache holds."""
    ways = formats(request.settings.method)
    with only_writer(store.output):
        found = Measuring(request, store, Maker(request.settings), ways).run()
    return sensitivity.costs(request, found)


def changes(store, name, key):
    """What each format changes of a Linear, float32 [formats, out, in]."""
    forward = store.measured(name, "forward")
    return forward[f"{key}.difference"] * forward[f"{key}.step"].unsqueeze(-1)


def test_the_loss_of_a_difference_is_that_of_its_definition(
    model, text_file, tmp_path, monkeypatch
):
    monkeypatch.setattr(prune_request, "MEASURED_TOKENS", 3 * 48)
    request = asked(model, text_file)
    store, costs = measured(request, tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    assert request.held_out is not None
    assert len(request.held_out) == 3
    for name, block in zip(request.shape.names, costs, strict=True):
        for key, options in block.items():
            weight = whole.get_submodule(f"{name}.{key}").weight
            for option, change in zip(options, changes(store, name, key), strict=True):
                expected = reference.loss_of(whole, weight, change, request.held_out, seed=3)
                assert option.loss == pytest.approx(expected, rel=1e-3), (name, key, option)


def test_each_linear_has_a_cost_of_every_format(llama, text_file, tmp_path):
    request = asked(llama, text_file)
    _, costs = measured(request, tmp_path)
    for block, linears in zip(costs, request.shape.linears, strict=True):
        assert block.keys() == linears.keys()
        for options in block.values():
            assert [(one.bits, one.sparsity) for one in options] == [
                (form.bits, form.sparsity) for form in FORMATS
            ]
            dense = [one for one in options if not one.sparsity]
            of_four = [one for one in options if one.bits == 4]
            for less_and_less in (dense, of_four):
                losses = [one.loss for one in less_and_less]
                assert losses == sorted(losses)
                sizes = [one.bytes for one in less_and_less]
                assert sizes == sorted(sizes, reverse=True)


def test_the_loss_is_near_the_divergence(text_file, tmp_path):
    """Summed over the Linears: one by itself is known only as well as some windows tell."""
    model = tiny.write_model("llama", tmp_path / "model")
    request = asked(model, text_file)
    store, costs = measured(request, tmp_path)
    whole = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for at in map(FORMATS.index, (Format(4), Format(3), Format(4, 0.5))):
        expected = 0.0
        for name, block in zip(request.shape.names, costs, strict=True):
            for key in block:
                weight = whole.get_submodule(f"{name}.{key}").weight
                change = changes(store, name, key)[at]
                expected += reference.divergence(whole, weight, change, request.held_out)
        found = sum(options[at].loss for block in costs for options in block.values())
        assert found == pytest.approx(expected, rel=0.3), FORMATS[at]


@pytest.mark.parametrize("kept", [1, 3])  # in the forward pass, and in the one backward
def test_a_stopped_measurement_goes_on_to_the_same_costs(
    llama, text_file, tmp_path, monkeypatch, kept
):
    request = asked(llama, text_file)
    _, whole = measured(request, tmp_path / "whole")
    keep, calls = Store.keep, []

    def stopping(self, *arguments):
        if len(calls) == kept:
            raise KeyboardInterrupt
        calls.append(arguments[:2])
        keep(self, *arguments)

    monkeypatch.setattr(Store, "keep", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(request, tmp_path)
    monkeypatch.setattr(Store, "keep", keep)
    store = Store(tmp_path / "out", request.deciding(), resume=True, force=False)
    assert store.has_work
    assert costs_by(request, store) == whole
    assert [way for _, way in calls] == ["forward", "forward", "backward"][:kept]


def test_what_is_measured_once_is_known_for_other_budgets(llama, text_file, tmp_path, monkeypatch):
    request = asked(llama, text_file)
    store = Store(tmp_path / "out", request.deciding(), resume=False, force=True)
    with only_writer(tmp_path / "out"):
        first = sensitivity.measure_costs(request, store)
    other = dataclasses.replace(
        request, settings=request.settings.model_copy(update={"budget": "3"})
    )
    monkeypatch.setattr(sensitivity, "Measuring", None)  # not again
    assert sensitivity.measure_costs(other, store) == first
    fewer = dataclasses.replace(request, batch=1)  # at once, as where memory is short
    assert fewer.deciding() != request.deciding()
    assert sensitivity.measure_costs(fewer, store) == first
    rounder = dataclasses.replace(
        request, settings=request.settings.model_copy(update={"bits_group": 64})
    )
    with pytest.raises(TypeError):
        sensitivity.measure_costs(rounder, store)


def test_what_a_v_proj_loses_counts_less_where_it_is_made_up_for(llama, text_file, tmp_path):
    plain, made_up_for = (
        measured(asked(llama, text_file, method="none", asymmetric=one), tmp_path)[1]
        for one in (False, True)
    )
    for before, after in zip(plain, made_up_for, strict=True):
        for key, options in before.items():
            share = 0.45 if key == "self_attn.v_proj" else 1
            left = [one.loss * share for one in options]
            assert [one.loss for one in after[key]] == pytest.approx(left)


def test_a_method_that_removes_nothing_has_the_dense_formats(llama, text_file, tmp_path):
    _, costs = measured(asked(llama, text_file, "6", method="none"), tmp_path)
    found = {(one.bits, one.sparsity) for own in costs[0].values() for one in own}
    assert found == {(8, 0.0), (4, 0.0), (3, 0.0)}


def test_sizes_are_those_of_the_engine():
    dense, sparse = Format(4), Format(4, 0.5)
    assert packed_size((64, 128), dense, 0.2, 32) == 64 * 128 // 2 + 64 * 4 + 128 + 64
    assert packed_size((64, 128), dense, 0.2, 128) == 64 * 128 // 2 + 64 + 128 + 64
    assert packed_size((64, 128), Format(3), 0.2, 32) == 64 * 128 * 3 // 8 + 64 * 4 + 128 + 64
    assert packed_size((512, 512), sparse, 0.5, 32) < 0.8 * packed_size((512, 512), dense, 0, 32)
    # Too few zeros for a mask: stored whole.
    assert packed_size((512, 512), sparse, 0.29, 32) == packed_size((512, 512), dense, 0, 32)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"options": {"dampening": 0.5}}, {}),
        ({"structure": "2:4"}, {}),
        ({"skip": ("lm_head", "down_proj")}, {}),
        ({"refit": True}, {}),
        ({"bits_group": 64}, {}),
        ({"method": "wanda"}, {}),
        ({}, {"seed": 1}),
        ({}, {"samples": 4}),
        ({}, {"sequence_length": 40}),
    ],
    ids=str,
)
def test_other_questions_are_measured_anew(llama, text_file, values, text):
    count = itertools.count()

    def losses(values, text):
        settings = PruneSettings.checked(
            **{"method": "sparsegpt", "sparsity": 0.5, "bits": 4} | values
        )
        whole = {"samples": 5, "sequence_length": 48} | text
        calibration = Calibration(str(text_file), **whole)
        request = check(llama, settings, calibration, ANY_HARDWARE)
        kind = TypeAdapter(int)
        return sensitivity.remembered(request, settings, {}, kind, lambda: next(count))

    assert losses({}, {}) == losses({}, {}) == 0
    assert losses(values, text) == 1
    assert losses({}, {}) == 0
