"""Allocations that earlier versions had: refused by name, and read where a recipe lists layers."""

import json

import pytest

from owl_deploy.compression import recipe
from owl_deploy.compression.allocation.rules import GONE
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.models.manifest import CheckpointManifest, read_manifest

WRITTEN = """# Resolved by owl prune: sparsegpt, searched, unstructured, 0.5 of the weights removed.
oneshot_stage:
  pruning_modifiers:
    SparseGPTModifier:
      sparsity: [0.4, 0.6]
      mask_structure: '0:0'
      sequential_update: true
      targets: [model.layers.0.mlp.up_proj, model.layers.0.mlp.down_proj]
"""


def in_words(text):
    return " ".join(text.split())


@pytest.mark.parametrize("name", GONE)
@pytest.mark.parametrize("more", [[], ["--recipe", "recipe.yaml"]])
def test_an_allocation_that_is_gone_is_refused(owl, llama, tmp_path, monkeypatch, name, more):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(WRITTEN)
    code, _, err = owl("prune", llama, "-o", tmp_path / "out", "--allocation", name, *more)
    says = f"--allocation {name} is gone. Use fisher (the default), owl or linear."
    assert (code, says in in_words(err)) == (2, True), err


def test_tuning_is_refused(owl, llama, tmp_path):
    code, _, err = owl("prune", llama, "-o", tmp_path / "out", "--tune", "15")
    says = "--tune is gone: it gained nothing at 50 %. Use --allocation fisher."
    assert (code, says in in_words(err)) == (2, True), err


def test_a_recipe_of_a_search_is_a_list(tmp_path):
    (tmp_path / "recipe.yaml").write_text(WRITTEN)
    settings = recipe.merged(tmp_path / "recipe.yaml", {})
    assert settings.allocation == "list"
    assert list(settings.layers.values()) == [0.4, 0.6]


@pytest.mark.parametrize("name", GONE)
def test_settings_with_layers_are_a_list(name):
    layers = {"model.layers.0": 0.5}
    assert PruneSettings.checked(allocation=name, layers=layers).allocation == "list"


@pytest.mark.parametrize("name", GONE)
def test_a_manifest_that_names_it_opens(tmp_path, name):
    tuning = [{"name": "uniform", "divergence": 0.5, "seconds": 1.0}]
    written = {"kind": "checkpoint", "schema_version": 1, "tuning": tuning}
    written |= {"settings": {"method": "wanda", "allocation": name, "spread": 0.0}}
    (tmp_path / "owl.json").write_text(json.dumps(written))
    manifest = read_manifest(tmp_path, CheckpointManifest)
    assert manifest.settings.allocation == name
    assert manifest.to_json()["tuning"] == tuning
