import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from owl_deploy import recipe
from owl_deploy.blocks import Skeleton
from owl_deploy.checkpoint import open_checkpoint
from owl_deploy.errors import BadInput
from owl_deploy.prune import tune
from owl_deploy.prune.run import Calibration, prune
from tests import tiny


def test_the_values_asked_for_are_a_candidate_and_all_differ():
    found = tune.candidates(recipe.settings(outlier_multiple=4, spread=0.11))
    pairs = [(one.outlier_multiple, one.spread) for one in found]
    assert pairs[0] == (4, 0.11)
    assert len(set(pairs)) == len(pairs) == 1 + 4 * 6
    assert len(tune.candidates(recipe.settings(allocation="dlp"))) == 1 + 6
    groups = tune.candidates(recipe.settings(structure="4:8"))
    assert {one.spread for one in groups} == {0.0625, 0.125, 0.1875, 0.25}


@pytest.mark.parametrize("allocation", ["uniform"])
def test_nothing_to_tune(allocation):
    with pytest.raises(BadInput, match="nothing to tune"):
        tune.candidates(recipe.settings(allocation=allocation))


def test_the_lowest_loss_wins_and_of_equals_the_first():
    trials = [tune.Trial(5, 0.08, 2.0), tune.Trial(3, 0.1, 1.5), tune.Trial(7, 0.1, 1.5)]
    chosen = tune.best(recipe.settings(), trials)
    assert (chosen.outlier_multiple, chosen.spread) == (3, 0.1)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_of_the_dense_states_are_the_models_own(family, tmp_path):
    folder = tiny.write_model(family, tmp_path / "model")
    windows = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    states = skeleton.embed(windows, 3, tmp_path)
    for index in range(2):
        with skeleton.loaded(skeleton.names[index]) as block:
            states.through(block, index, lambda _: None, keep=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.item() for ids in windows]
    for _ in range(2):  # the weights that were loaded for it are gone again, and can come back
        assert skeleton.losses(windows, [states]) == pytest.approx([sum(losses) / 3], rel=1e-5)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("allocation", ["owl", "dlp", "linear"])
@pytest.mark.parametrize("structure", ["unstructured", "4:8"])
def test_tuning_never_ends_worse_than_what_was_asked(
    llama, text_file, tmp_path, allocation, structure
):
    settings = recipe.settings(allocation=allocation, structure=structure)
    text = Calibration(str(text_file), samples=3, sequence_length=48)
    manifest = prune(llama, tmp_path / "out", settings, text, tune_allocation=True).to_json()
    trials = manifest["tuning"]
    assert len(trials) == len(tune.candidates(settings))
    assert all(math.isfinite(trial["loss"]) for trial in trials)
    chosen = manifest["settings"]
    (own,) = [
        trial["loss"]
        for trial in trials
        if (trial["outlier_multiple"], trial["spread"])
        == (chosen["outlier_multiple"], chosen["spread"])
    ]
    assert own == min(trial["loss"] for trial in trials) <= trials[0]["loss"]
    assert json.loads((tmp_path / "out" / "owl.json").read_text())["tuning"] == trials


@pytest.mark.parametrize("allocation", ["owl", "owl-per-linear"])
def test_what_was_tuned_is_pruned_by_the_values_that_won(llama, text_file, tmp_path, allocation):
    settings = recipe.settings(allocation=allocation, outlier_multiple=4, spread=0.01)
    text = Calibration(str(text_file), samples=3, sequence_length=48)
    tuned = prune(llama, tmp_path / "tuned", settings, text, tune_allocation=True)
    assert tuned.settings.spread != 0.01
    chosen = recipe.PruneSettings(**tuned.settings.model_dump())
    plain = prune(llama, tmp_path / "plain", chosen, text)
    assert plain.blocks == tuned.blocks
    assert len({block.outlier_ratio for block in plain.blocks}) == 2
    found = [load_file(tmp_path / name / "model.safetensors") for name in ("tuned", "plain")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
