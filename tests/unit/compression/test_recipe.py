import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from owl_deploy.compression import recipe
from owl_deploy.compression.methods import METHODS, Options, SparseGPTOptions
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from tests import tiny

RECIPES = list(recipe.shipped().values())


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read(path):
    assert PruneSettings.checked(**recipe.load(path)).sparsity > 0


def test_there_are_shipped_recipes():
    assert RECIPES


@pytest.mark.parametrize("method", tiny.REMOVING)
def test_a_resolved_recipe_reads_back(tmp_path, method):
    layers = {"model.layers.0": 0.125, "model.layers.1": 0.1 + 0.2, "model.layers.10": 0.7}
    options = {"block_size": 64, "dampening": 0.02, "preserve_mask": True}
    given = PruneSettings.checked(method=method, options=options if method == "sparsegpt" else {})
    text = recipe.dump_resolved(given, layers)
    found = PruneSettings.checked(**recipe.load(write(tmp_path, text)))
    assert (found.allocation, found.layers) == ("list", layers)
    nearest = {"wanda-variant": "wanda", "alps": "sparsegpt"}  # a recipe knows no others
    assert found.method == nearest.get(method, method)
    assert found.options == (SparseGPTOptions() if method == "alps" else given.options)
    assert set(yaml.safe_load(text)) == {"oneshot_stage"}


@pytest.mark.parametrize("method", tiny.REMOVING)
def test_a_resolved_recipe_with_mixed_groups_reads_back(tmp_path, method):
    layers = {"model.layers.0": 0.875, "model.layers.1": 0.5, "model.layers.2": 0.75}
    text = recipe.dump_resolved(PruneSettings.checked(method=method, structure="2:8"), layers)
    removed = {  # by block; SparseML says how many go
        re.search(r"[012]", name).group(): group["mask_structure"]
        for group in modifiers(text)
        for name in group["targets"]
    }
    assert removed == {"0": "7:8", "1": "4:8", "2": "6:8"}
    found = PruneSettings.checked(**recipe.load(write(tmp_path, text)))
    assert (found.layers, found.group) == (layers, (2, 8))  # of 1, 4 and 2 that are kept


def modifiers(text: str) -> list[dict]:
    stage = yaml.safe_load(text)["oneshot_stage"]
    return [arguments for group in stage.values() for arguments in group.values()]


def test_a_part_of_a_mixed_structure_may_stay_dense(tmp_path):
    layers = {"model.layers.0.q": 0.0, "model.layers.0.k": 0.5}
    text = recipe.dump_resolved(PruneSettings.checked(structure="6:8"), layers)
    assert {group["mask_structure"] for group in modifiers(text)} == {"0:8", "4:8"}
    found = PruneSettings.checked(**recipe.load(write(tmp_path, text)))
    assert (found.layers, found.group) == (layers, (6, 8))


def test_a_magnitude_target_is_the_weights_of_linears():
    text = recipe.dump_resolved(
        PruneSettings.checked(method="magnitude"), {"model.layers.1": 0.5, "lm_head": 0.25}
    )
    block, head = (modifier["targets"][0].removeprefix("re:") for modifier in modifiers(text))
    assert re.match(block, "model.layers.1.mlp.up_proj.weight")
    assert re.match(head, "lm_head.weight")
    for other in (
        "model.layers.1.input_layernorm.weight",
        "model.layers.1.self_attn.q_norm.weight",
        "model.layers.10.mlp.up_proj.weight",
        "model.layers.1.mlp.up_proj.bias",
    ):
        assert not re.match(block, other)


@pytest.mark.parametrize("sparsity", ["0.5", "[0.5]"])
def test_a_recipe_for_the_head_alone_is_refused(tmp_path, sparsity):
    """What it leaves out would otherwise be pruned as a recipe without targets is."""
    path = write(
        tmp_path,
        f"""
oneshot_stage:
  pruning_modifiers:
    WandaPruningModifier:
      sparsity: {sparsity}
      targets: [lm_head]
""",
    )
    with pytest.raises(BadInput, match="names the head alone"):
        recipe.load(path)


def test_skipped_layers_leave_linears_as_targets(tmp_path):
    layers = {"model.layers.0.mlp.up_proj": 0.5, "model.layers.1": 0.25}
    for method in ("wanda", "magnitude"):
        text = recipe.dump_resolved(PruneSettings.checked(method=method), layers)
        assert recipe.load(write(tmp_path, text))["layers"] == layers


def test_sparsemls_own_owl_recipe_is_read(tmp_path):
    path = write(
        tmp_path,
        r"""
oneshot_stage:
  run_type: oneshot
  pruning_modifiers:
    WandaPruningModifier:
      sparsity: 0.7
      sparsity_profile: owl
      owl_m: 7
      owl_lmbda: 0.11
      mask_structure: "0:0"
      sequential_update: true
      targets: ['re:model.layers.\d+$']
""",
    )
    found = PruneSettings.checked(**recipe.load(path))
    assert (found.method, found.allocation, found.sparsity) == ("wanda", "owl", 0.7)
    assert (found.outlier_multiple, found.spread) == (7, 0.11)  # not the defaults


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no modifier"),
        ("[1, 2]", "holds no modifier"),
        ("a: [", "not valid YAML"),
        ("version: 1.1.0", "key 'version'"),
        ("pruning_modifiers: {}", "key 'pruning_modifiers'"),
        ("oneshot_stage: {args: {}}", "key 'args'"),
        ("oneshot_stage: {a_modifiers: {WandaPruningModifer: {sparsity: 0.5}}}", "Did you mean"),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: {sparsity: 0.5, spasity: 1}}}",
            "Unknown key 'spasity'",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: {sparsity: lots}}}",
            "sparsity",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: "
            "{sparsity: [0.5], targets: [a, b]}}}",
            "1 sparsities, 2 targets",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: "
            "{sparsity: 0.5, sparsity_profile: owl}}}",
            "needs owl_m",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: {sparsity: 0.5, owl_m: 5}}}",
            "without OWL's profile",
        ),
        ("[" * 100_000 + "]" * 100_000, "not valid YAML"),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: {sparsity: " + "1" * 10**6 + "}}}",
            "not valid YAML",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: {sparsity: 2026-13-45}}}",
            "not valid YAML .month must be in",
        ),
        (
            "oneshot_stage: {a_modifiers: {WandaPruningModifier: 2026-11-26}}",
            r"^WandaPruningModifier in .*: it should be a mapping\.",
        ),
        ("oneshot_stage: {a_modifiers: {2026-11-26: {}}}", "Unknown modifier"),
    ],
)
def test_a_wrong_recipe_gets_a_sentence(tmp_path, text, complaint):
    with pytest.raises(BadInput, match=complaint):
        recipe.load(write(tmp_path, text))


@pytest.mark.parametrize(
    ("over", "why"),
    [
        ({"method": "none", "bits": 4}, "the method none removes nothing"),
        ({"budget": "3.5"}, "a budget finds that out itself"),
    ],
)
def test_a_list_of_sparsities_goes_with_what_removes(tmp_path, over, why):
    file = tmp_path / "recipe.yaml"
    layers = {"model.layers.0": 0.125, "model.layers.1": 0.7}
    file.write_text(recipe.dump_resolved(PruneSettings.checked(method="sparsegpt"), layers))
    with pytest.raises(BadInput, match=f"lists what to remove of each layer, and {why}"):
        recipe.merged(file, over)


def test_a_method_that_sparseml_lacks_is_not_written_as_another(monkeypatch):
    row = dataclasses.replace(METHODS["wanda"], modifier=None)
    monkeypatch.setitem(METHODS, "own", row)
    with pytest.raises(BadInput, match="nothing that prunes as own does"):
        recipe.dump_resolved(PruneSettings.checked(method="own"), {"model.layers.0": 0.5})


def test_every_modifier_names_options_that_its_method_has():
    named = set()
    for row in METHODS.values():
        if row.modifier is not None and row.modifier.name not in named:  # the first is its own
            assert row.modifier.arguments.keys() == row.options.model_fields.keys()
            named.add(row.modifier.name)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"options": None}, "The options of wanda are None"),
        ({"options": [1]}, r"The options of wanda are \[1\]"),
        ({1: 2}, "The settings name 1"),
        ({"method": "none", "bits": 4, "refit": True}, "The method none removes nothing"),
    ],
)
def test_settings_that_are_none_are_refused(values, said):
    with pytest.raises(BadInput, match=said):
        recipe.merged(None, values)


def test_options_of_a_recipe_go_with_its_method():
    gpt = {"options": {"block_size": 64}}
    kept = recipe.merged("owl-sparsegpt-50", gpt).options
    assert kept == SparseGPTOptions(block_size=64)
    assert recipe.merged("owl-sparsegpt-50", {"method": "wanda"}).options == Options()
    settings = recipe.merged("owl-wanda-50", {"method": "sparsegpt", **gpt})
    assert (settings.options, settings.sparsity) == (kept, 0.5)


def test_a_checkpoint_is_its_recipe(tmp_path, monkeypatch):
    path = write(tmp_path, "text")
    assert recipe.find(tmp_path) == path
    path.unlink()
    with pytest.raises(BadInput, match=r"holds no recipe\.yaml"):
        recipe.find(tmp_path)
    monkeypatch.chdir(tmp_path)
    Path("owl-wanda-50").mkdir()
    assert recipe.find("owl-wanda-50") == recipe.shipped()["owl-wanda-50"]


LISTED = {"model.layers.0": 0.25, "model.layers.1": 0.75}


@pytest.fixture
def listed(tmp_path):
    """A recipe whose list of layers is of a pruning to 50 % and of the head to 25 %."""
    given = PruneSettings.checked(method="sparsegpt", options={"block_size": 64}, sparsity=0.5)
    return write(tmp_path, recipe.dump_resolved(given, LISTED | {"lm_head": 0.25}))


def test_a_list_reads_back_with_the_head(listed):
    found = recipe.merged(listed, {})
    assert (found.allocation, found.layers, found.head_sparsity) == ("list", LISTED, 0.25)


@pytest.mark.parametrize(
    ("overrides", "allocation", "sparsity"),
    [
        ({"sparsity": 0.6}, "fisher", 0.6),
        ({"allocation": "linear", "structure": "2:4"}, "linear", 0.5),
        ({"allocation": "uniform", "sparsity": 0.6}, "uniform", 0.6),
    ],
)
def test_a_recipes_list_gives_way_to_a_rule(listed, overrides, allocation, sparsity):
    found = recipe.merged(listed, overrides)
    assert (found.layers, found.allocation, found.sparsity) == (None, allocation, sparsity)
    assert found.options == SparseGPTOptions(block_size=64)  # the rest of the recipe stays


def test_a_rule_of_a_recipe_stays_where_only_its_sparsity_changes():
    every = {path: recipe.load(path) for path in RECIPES}
    path = next(
        path
        for path, values in every.items()
        if values.get("allocation") == "uniform" and "structure" not in values
    )
    assert recipe.merged(path, {"sparsity": 0.3}).allocation == "uniform"


def test_a_structure_sets_the_sparsity_whatever_the_recipe_says():
    path = next(path for path in RECIPES if recipe.load(path).get("sparsity") == 0.7)
    assert recipe.merged(path, {"structure": "2:4"}).sparsity == 0.5
    assert recipe.merged("owl-wanda-50", {"structure": "unstructured"}).sparsity == 0.5


def test_without_its_structure_a_recipe_removes_as_much(tmp_path):
    assert recipe.merged("wanda-2of4", {"structure": "unstructured"}).sparsity == 0.5
    asked = {"structure": "unstructured", "sparsity": 0.3}
    assert recipe.merged("wanda-2of4", asked).sparsity == 0.3
    within = {"structure": "unstructured", "allocation": "budget", "budget": "4"}
    assert recipe.merged("wanda-2of4", within).sparsity == 0  # which its plan finds
    layers = {"model.layers.0": 0.75, "model.layers.1": 0.75}
    text = recipe.dump_resolved(PruneSettings.checked(structure="2:8"), layers)
    path = write(tmp_path, text)
    assert recipe.merged(path, {"structure": "unstructured"}).layers == layers
    asked = {"structure": "unstructured", "allocation": "uniform"}
    assert recipe.merged(path, asked).sparsity == 0.75


def test_what_a_list_does_not_say_is_not_made_up(listed):
    with pytest.raises(BadInput, match="Give --sparsity as well"):
        recipe.merged(listed, {"allocation": "uniform", "structure": "unstructured"})
    with pytest.raises(BadInput, match="Give --sparsity as well"):
        recipe.merged(listed, {"allocation": "uniform"})
    with pytest.raises(BadInput, match="the structure 2:4 is another"):
        recipe.merged(listed, {"structure": "2:4"})


@pytest.mark.parametrize(
    "overrides",
    [
        {"allocation": "uniform", "spread": 0.1},
        {"allocation": "linear", "outlier_multiple": 3.0},
        {"budget": "4", "spread": 0.1},
    ],
)
def test_what_means_nothing_to_the_allocation_is_refused(overrides):
    with pytest.raises(BadInput, match="means nothing to the allocation"):
        recipe.merged(None, overrides)


def test_a_recipe_s_origin_is_its_file_by_digest(listed):
    assert recipe.origin(listed, {"sparsity": 0.6}) == {
        "file": "recipe.yaml",
        "sha256": recipe.sha256(listed),
        "overrides": {"sparsity": 0.6},
    }


def test_magnitude_prunes_in_sparsemls_first_step():
    text = recipe.dump_resolved(PruneSettings.checked(method="magnitude"), LISTED)
    for modifier in modifiers(text):
        assert (modifier["start"], modifier["end"]) == (0.0, 1.0)
        assert modifier["mask_structure"] == "unstructured"
    text = recipe.dump_resolved(PruneSettings.checked(), LISTED)
    assert all(modifier["sequential_update"] is True for modifier in modifiers(text))


MIXED = """
oneshot_stage:
  first_modifiers:
    WandaPruningModifier: {targets: TARGETS, sparsity: 0.5, mask_structure: "STRUCTURE"}
  second_modifiers:
    SECOND: {targets: [model.layers.1], sparsity: 0.5, mask_structure: "4:8"}
"""


@pytest.mark.parametrize(
    ("modifiers", "complaint"),
    [
        (
            "{WandaPruningModifier: {sparsity: 0.5, targets: ['re:.*self_attn.*']}}",
            "neither a layer",
        ),
        (
            "{WandaPruningModifier: {sparsity: 0.5, targets: ['re:model.layers.(0|1).*']}}",
            "neither a layer",
        ),
        (
            r"{WandaPruningModifier: {sparsity: 0.5, targets: ['re:model.layers.\d?[0-8]$']}}",
            "neither a layer",
        ),
        ("{WandaPruningModifier: {sparsity: 0.5, targets: []}}", "has no targets"),
        ("{WandaPruningModifier: {sparsity: 0.9, mask_structure: '2:4'}}", "contradicts its"),
        (
            "{WandaPruningModifier: {sparsity: 0.7, mask_structure: '2:4', "
            "targets: [model.layers.0, model.layers.1]}}",
            "sparsity of 0.7, which contradicts its structure, 2 removed of 4",
        ),
        (
            "{WandaPruningModifier: {sparsity: [0.5, 0.7], mask_structure: '2:4', "
            "targets: [model.layers.0, model.layers.1]}}",
            "sparsity of 0.7, which contradicts",
        ),
        (
            "{WandaPruningModifier: {sparsity: [0.5, 0.7], mask_structure: '2:4', "
            "targets: [model.layers.0, lm_head]}}",
            "sparsity of 0.7, which contradicts",
        ),
        (
            "{WandaPruningModifier: {sparsity: 0.1, mask_structure: '0:4', "
            "targets: model.layers.0}}",
            "0 removed of 4",
        ),
        ("{WandaPruningModifier: {sparsity: 0.0, mask_structure: '0:4'}}", "removes nothing"),
        (
            "{WandaPruningModifier: {sparsity: [0.0, 0.0], mask_structure: '0:4', "
            "targets: [model.layers.0, model.layers.1]}}",
            "removes nothing",
        ),
        ("{WandaPruningModifier: {sparsity: 0.5, mask_structure: '0:00'}}", "neither 'unstr"),
        ("{WandaPruningModifier: {sparsity: 0.5, sequential_update: false}}", "sequential_update"),
        (
            "{WandaPruningModifier: {sparsity: 0.5, sparsity_profile: owl, owl_m: 5, "
            "owl_lmbda: 0.08, targets: [model.layers.0, model.layers.1]}}",
            "names layers, and lets OWL divide",
        ),
    ],
)
def test_a_recipe_that_would_be_half_heeded(tmp_path, modifiers, complaint):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"test_stage: {{pruning_modifiers: {modifiers}}}")
    with pytest.raises(BadInput, match=complaint):
        recipe.load(path)


@pytest.mark.parametrize("all_of_it", ["__ALL__", "Linear", r"re:.*\.weight$", "re:.*"])
def test_words_for_all(tmp_path, all_of_it):
    path = tmp_path / "recipe.yaml"
    modifier = f"{{sparsity: 0.5, targets: ['{all_of_it}']}}"
    path.write_text(f"test_stage: {{pruning_modifiers: {{WandaPruningModifier: {modifier}}}}}")
    assert recipe.load(path)["sparsity"] == 0.5


def test_modifiers_with_other_options(tmp_path):
    path = tmp_path / "recipe.yaml"
    one = (
        "{SparseGPTModifier: {sparsity: 0.5, targets: [model.layers.LAYER], dampening_frac: SHARE}}"
    )
    first, second = (
        one.replace("LAYER", layer).replace("SHARE", share)
        for layer, share in (("0", "0.01"), ("1", "0.3"))
    )
    path.write_text(f"test_stage:\n  a_modifiers: {first}\n  b_modifiers: {second}\n")
    with pytest.raises(BadInput, match="differ in more than sparsities"):
        recipe.load(path)


def test_an_allocation_that_is_asked_for_has_its_own_spread():
    asked = {"allocation": "linear", "sparsity": 0.5}
    assert recipe.merged("owl-wanda-70", asked).spread == recipe.merged(None, asked).spread
    assert recipe.merged("owl-wanda-70", {"sparsity": 0.5}).spread == 0.08


@pytest.mark.parametrize("structure", ["1:2", "3:4", "2:4"])
def test_a_dense_head_leaves_the_structure_as_it_is(tmp_path, structure):
    settings = PruneSettings.checked(
        method="sparsegpt", structure=structure, allocation="uniform", head_sparsity=0.0
    )
    path = tmp_path / "recipe.yaml"
    layers = {f"model.layers.{index}": settings.sparsity for index in range(2)} | {"lm_head": 0.0}
    path.write_text(recipe.dump_resolved(settings, layers))
    assert recipe.load(path)["structure"] == structure


def test_a_head_has_a_sparsity_that_its_structure_has(tmp_path):
    given = PruneSettings.checked(structure="4:8", allocation="uniform", head_sparsity=0.6)
    assert given.head_sparsity == 0.625
    text = recipe.dump_resolved(given, {"model.layers.0": 0.5, "lm_head": 0.6})
    assert [one["sparsity"] for one in modifiers(text)] == [[0.625], [0.5]]
    found = recipe.merged(write(tmp_path, text), {})
    assert (found.head_sparsity, found.layers) == (0.625, {"model.layers.0": 0.5})
    with pytest.raises(BadInput, match=r"sparsity of 0\.95 keeps none of 8"):
        PruneSettings.checked(structure="4:8", head_sparsity=0.95)


def test_a_head_as_earlier_versions_wrote_it_is_read(tmp_path):
    text = """
oneshot_stage:
  keep_3_of_8_modifiers:
    WandaPruningModifier:
      {sparsity: [0.625, 0.6], mask_structure: "5:8", targets: [model.layers.0, lm_head]}
"""
    found = recipe.merged(write(tmp_path, text), {})
    assert (found.head_sparsity, found.layers) == (0.625, {"model.layers.0": 0.625})


@pytest.mark.parametrize("method", tiny.REMOVING)
def test_what_is_skipped_reads_back(tmp_path, method):
    given = PruneSettings.checked(method=method, skip=("model.layers.0", "q_proj", "lm_head"))
    text = recipe.dump_resolved(given, {"model.layers.1": 0.5, "model.layers.2": 0.5})
    path = write(tmp_path, text)
    assert recipe.merged(path, {}).skip == ("model.layers.0", "q_proj")
    more = recipe.merged(path, {"skip": ("q_proj", "up_proj"), "head_sparsity": 0.5})
    assert more.skip == ("model.layers.0", "q_proj", "up_proj")  # the list has nothing for them
    anew = recipe.merged(path, {"skip": ("up_proj",), "sparsity": 0.5})
    assert anew.skip == ("up_proj",)
    with pytest.raises(BadInput, match="skip"):
        recipe.merged(path, {"skip": "up_proj"})


@pytest.mark.parametrize(
    ("targets", "structure", "second", "complaint"),
    [
        ("[model.layers.0]", "4:8", "SparseGPTModifier", "mixes the methods sparsegpt, wanda"),
        ("[model.layers.0]", "2:4", "WandaPruningModifier", "different M"),
        ("[model.layers.0]", "0:0", "WandaPruningModifier", "different M"),
        ("__ALL__", "4:8", "WandaPruningModifier", "one of which names no layers"),
    ],
)
def test_modifiers_that_do_not_fit_together(tmp_path, targets, structure, second, complaint):
    text = MIXED.replace("TARGETS", targets).replace("STRUCTURE", structure)
    with pytest.raises(BadInput, match=complaint):
        recipe.load(write(tmp_path, text.replace("SECOND", second)))


def test_one_target_needs_no_list(tmp_path):
    text = MIXED.replace("TARGETS", "model.layers.0").replace("STRUCTURE", "4:8")
    found = recipe.load(write(tmp_path, text.replace("SECOND", "WandaPruningModifier")))
    assert found["layers"] == {"model.layers.0": 0.5, "model.layers.1": 0.5}
    assert found["structure"] == "4:8"


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(BadInput) as refused:
        recipe.read_yaml(tmp_path / "none.yaml")
    way_out = "cannot be read (No such file or directory). Check the path."
    assert str(refused.value) == f"{tmp_path / 'none.yaml'} {way_out}"


def test_a_recipe_that_is_no_text(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xff\xfe")
    for read in (recipe.read, recipe.read_yaml):
        with pytest.raises(BadInput, match=r"r\.yaml cannot be read"):
            read(tmp_path / "r.yaml")


def test_the_list_fits_a_terminal(owl):
    code, out, _ = owl("recipes", "ls")
    assert (code, max(map(len, out.splitlines())) <= 80) == (0, True)
    told = " ".join(out.split())
    for path in recipe.shipped().values():
        assert f"{path.stem} {path.read_text().splitlines()[0].removeprefix('# ')}" in told


@pytest.mark.parametrize("ignored", ["down_proj", "re:.*down_proj", "re:.*down_proj$"])
def test_what_a_recipe_ignores_is_skipped(tmp_path, ignored):
    path = tmp_path / "recipe.yaml"
    modifier = f"{{sparsity: 0.5, targets: __ALL__, ignore: ['{ignored}']}}"
    path.write_text(f"oneshot_stage: {{a_modifiers: {{WandaPruningModifier: {modifier}}}}}")
    assert recipe.merged(path, {}).skip == ("down_proj",)
