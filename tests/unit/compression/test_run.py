import gc
import hashlib
import json

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from owl_deploy.cli import app
from owl_deploy.compression import recipe, request, run, write
from owl_deploy.compression.input_statistics import InputStatistics
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.compression.show import show
from owl_deploy.compression.store import Store
from owl_deploy.data import calibration as drawn
from owl_deploy.data.text import calibration_windows, load_tokenizer, tokenize
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.models.checkpoint import WEIGHTS
from owl_deploy.models.manifest import CheckpointManifest
from owl_deploy.utils.hardware import Hardware, find_device
from owl_deploy.utils.resume import partial_folder
from tests import tiny
from tests.reference import owl as reference


@pytest.fixture(scope="module")
def calibration(text_file):
    return Calibration(str(text_file), samples=6, sequence_length=64)


def windows(folder, calibration):
    tokens = tokenize(load_tokenizer(folder), tiny.text())
    return calibration_windows(
        tokens, calibration.samples, calibration.sequence_length, calibration.seed
    )


def test_owl_wanda_equals_the_naive_procedure(llama, tmp_path, calibration):
    settings = PruneSettings.checked(allocation="owl", sparsity=0.6, outlier_multiple=2, spread=0.1)
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = windows(llama, calibration)
    ratios = reference.outlier_ratios(model, ids, multiple=2)
    assert [b["outlier_ratio"] for b in manifest["blocks"]] == pytest.approx(ratios, abs=1e-9)
    sparsities = reference.owl_sparsities(ratios, 0.6, 0.1)
    assert [b["sparsity"] for b in manifest["blocks"]] == pytest.approx(sparsities, abs=1e-9)

    expected = reference.wanda_prune(model, ids, sparsities).state_dict()
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name
    assert (found["model.layers.1.mlp.down_proj.weight"] == 0).float().mean() > 0.4


def test_every_linear_keeps_its_own_n_of_8(llama, tmp_path, calibration):
    settings = PruneSettings.checked(allocation="fisher", structure="5:8")
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()
    pruned = load_file(tmp_path / "out" / "model.safetensors")
    kept = {}
    for block in manifest["blocks"]:
        for name, linear in block["linears"].items():
            weight = pruned[f"{block['name']}.{name}.weight"]
            most = int((weight.reshape(-1, 8) != 0).sum(1).max())
            kept[f"{block['name']}.{name}"] = most
            assert linear["sparsity"] == 1 - most / 8
    assert len(set(kept.values())) > 2
    assert manifest["sparsity"]["asked"] == pytest.approx(3 / 8, abs=0.02)
    prune(llama, tmp_path / "again", recipe.merged(tmp_path / "out", {}), calibration)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], pruned[name]) for name in again)


def test_a_block_that_is_skipped_stays_dense(llama, tmp_path, calibration):
    settings = PruneSettings.checked(
        allocation="owl", sparsity=0.6, skip=("model.layers.0",), outlier_multiple=2
    )
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()
    first, second = manifest["blocks"]
    assert (first["weights"], first["achieved"], first["linears"]) == (0, 0, {})
    assert first["outlier_ratio"] is None
    assert second["sparsity"] == pytest.approx(0.6)
    again = recipe.merged(tmp_path / "out", {"skip": ("model.layers.0",)})
    prune(llama, tmp_path / "again", again, calibration)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in ("out", "again"))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", tiny.REMOVING)
@pytest.mark.parametrize("allocation", ["owl", "uniform"])
def test_the_target_is_held(llama, tmp_path, calibration, method, allocation):
    settings = PruneSettings.checked(method=method, allocation=allocation, sparsity=0.7)
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()
    assert manifest["sparsity"]["asked"] == pytest.approx(0.7, abs=1e-6)
    assert manifest["sparsity"]["achieved"] == pytest.approx(0.7, abs=1e-3)


def test_magnitude_uniform_needs_no_text(llama, tmp_path):
    settings = PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.5)
    manifest = prune(llama, tmp_path / "out", settings, None).to_json()
    assert manifest["calibration"] is None
    weight = load_file(llama / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    found = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    gone = reference.magnitude_mask(weight, 0.5)
    assert torch.equal(found, weight.masked_fill(gone, 0))


def test_wanda_without_a_text_is_refused(llama, tmp_path):
    with pytest.raises(BadInput, match="looks at the model's inputs"):
        prune(llama, tmp_path / "out", PruneSettings.checked(), None)
    assert list(tmp_path.iterdir()) == []


def test_embeddings_norms_and_head_are_untouched(tmp_path, calibration):
    source = tiny.write_llama(tmp_path / "untied", tie_word_embeddings=False)
    prune(source, tmp_path / "out", PruneSettings.checked(sparsity=0.9), calibration)
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        if "_proj" not in name:
            assert torch.equal(before[name], after[name]), name


def test_sharded_bfloat16_in_and_out(tmp_path, calibration, monkeypatch):
    source = tiny.write_llama(tmp_path / "source")
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source, max_shard_size="40KB")
    (source / "model.safetensors").unlink()
    monkeypatch.setattr("owl_deploy.models.checkpoint.SHARD_BYTES", 30_000)
    prune(source, tmp_path / "out", PruneSettings.checked(sparsity=0.5), calibration)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards
    assert len(shards) > 2
    size = sum(one.nbytes for name in shards for one in load_file(tmp_path / "out" / name).values())
    assert index["metadata"]["total_size"] == size
    assert {path.stat().st_nlink for path in (tmp_path / "out").glob("*")} == {1}
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.dtype == torch.bfloat16
    weight = pruned.model.layers[0].self_attn.q_proj.weight
    assert (weight == 0).float().mean() > 0.3
    kept = weight != 0
    assert torch.equal(weight[kept], model.model.layers[0].self_attn.q_proj.weight[kept])


def test_a_resolved_recipe_prunes_to_the_same_weights(llama, tmp_path, calibration):
    settings = PruneSettings.checked(sparsity=0.6, outlier_multiple=2)
    prune(llama, tmp_path / "a", settings, calibration)
    resolved = PruneSettings.checked(**recipe.load(tmp_path / "a" / "recipe.yaml"))
    assert resolved.allocation == "list"
    prune(llama, tmp_path / "b", resolved, calibration)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_config_holds_what_both_transformers_read(llama, tmp_path, calibration):
    prune(llama, tmp_path / "out", PruneSettings.checked(sparsity=0.5), calibration)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())
    assert all(isinstance(merge, str) for merge in tokenizer["model"]["merges"])
    named = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert named["tokenizer_class"] == "PreTrainedTokenizerFast"
    ids = [load_tokenizer(folder)("the mill")["input_ids"] for folder in (llama, tmp_path / "out")]
    assert ids[0] == ids[1]


def test_the_recipe_lists_the_blocks_in_model_order(llama, tmp_path, calibration):
    settings = PruneSettings.checked(allocation="owl", sparsity=0.5)
    manifest = prune(llama, tmp_path / "out", settings, calibration).to_json()
    content = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    modifier = content["oneshot_stage"]["pruning_modifiers"]["WandaPruningModifier"]
    assert modifier["targets"] == ["model.layers.0", "model.layers.1"]
    assert modifier["sparsity"] == [block["sparsity"] for block in manifest["blocks"]]


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_interrupted_run_leaves_only_what_resumes(llama, tmp_path, calibration, monkeypatch):
    monkeypatch.setattr("owl_deploy.compression.write.assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", PruneSettings.checked(), calibration)
    assert [path.name for path in tmp_path.iterdir()] == [".out.owl-partial"]


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "owl.json").write_text('{"schema_version": 99}'), "owl.json"),
        (lambda folder: linked(folder / "tokenizer_config.json"), "is a link to"),
        (lambda folder: changed(folder, "model.norm.weight", float("nan")), "norm.weight"),
        (lambda folder: changed(folder, "model.norm.weight", None), "lacks 1 tensors"),
        (lambda folder: changed(folder, "lm_head.weight", None), "lacks 1 tensors"),
    ],
)
def test_what_is_wrong_outside_the_blocks_is_found_before_any_work(
    tmp_path, calibration, monkeypatch, spoil, complaint
):
    monkeypatch.setattr("owl_deploy.compression.run.resolve", None)  # which begins it
    model = tiny.write_model("llama", tmp_path / "model", tie_word_embeddings=False)
    spoil(model)
    with pytest.raises(BadInput, match=complaint):
        prune(model, tmp_path / "out", PruneSettings.checked(), calibration)


def test_a_tied_matrix_that_is_two(tmp_path, calibration):
    """Transformers would untie it, and what else reads config.json would not."""
    model = tiny.write_model("llama", tmp_path / "model", tie_word_embeddings=False)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(BadInput, match=r"are one matrix .* the weights hold two"):
        prune(model, tmp_path / "out", PruneSettings.checked(head_sparsity=0.1), calibration)
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    prune(model, tmp_path / "out", PruneSettings.checked(head_sparsity=0.1), calibration)


def test_tokens_that_the_model_does_not_have(tmp_path, calibration):
    model = tiny.write_model("llama", tmp_path / "model", vocab_size=100)
    with pytest.raises(BadInput, match=r"gives the token \d+, and the model has 100"):
        prune(model, tmp_path / "out", PruneSettings.checked(), calibration)


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"a": 1}', '{"settings": [1], "sparsities": []}']
)
def test_what_an_earlier_run_left_is_damaged(
    llama, tmp_path, calibration, monkeypatch, name, content
):
    with monkeypatch.context() as patch:
        patch.setattr("owl_deploy.compression.write.assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", PruneSettings.checked(), calibration)
    (tmp_path / ".out.owl-partial" / name).write_text(content)
    other = name == "run.json" and content.startswith('{"')
    complaint = "with other arguments" if other else f"left is damaged: .*{name}.*--force"
    with pytest.raises(BadInput, match=complaint):
        prune(llama, tmp_path / "out", PruneSettings.checked(), calibration, resume=True)


def test_half_a_file_of_a_kill_is_not_published(llama, tmp_path, calibration, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("owl_deploy.compression.write.assemble", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", PruneSettings.checked(), calibration)
    (tmp_path / ".out.owl-partial" / ".plan.json.owl-tmp-0123abcd").write_text("{")
    prune(llama, tmp_path / "out", PruneSettings.checked(), calibration, resume=True)
    assert not list((tmp_path / "out").glob(".*"))


def linked(file):
    file.rename(file.with_name("elsewhere"))
    file.symlink_to(file.with_name("elsewhere"))


def changed(folder, name, value):
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        del tensors[name]
    else:
        tensors[name][3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_another_held_out_text_is_no_run_to_resume(llama, tmp_path, calibration, monkeypatch):
    settings = PruneSettings.checked(method="sparsegpt", allocation="uniform", reconstruct=1)
    monkeypatch.setattr("owl_deploy.compression.write.assemble", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(llama, tmp_path / "out", settings, calibration)
    draw = drawn.calibration_windows

    def others(*asked):
        windows = draw(*asked)
        windows[-1] = windows[-1].flip(0)
        return windows

    monkeypatch.setattr(drawn, "calibration_windows", others)
    with pytest.raises(BadInput, match="other arguments: held_out was"):
        prune(llama, tmp_path / "out", settings, calibration, resume=True)


@pytest.mark.gpu
def test_cuda_gives_the_same_masks_but_for_rounding(llama, tmp_path, calibration):
    for device in ("cpu", "cuda"):
        settings = PruneSettings.checked(sparsity=0.5)
        prune(llama, tmp_path / device, settings, calibration, Hardware(device, "float32"))
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("cpu", "cuda"))
    for name in a:
        assert ((a[name] == 0) == (b[name] == 0)).float().mean() > 0.999


def test_a_recipe_and_what_overrides_it_are_recorded(llama, tmp_path, text_file):
    command = ["prune", str(llama), "-o", str(tmp_path / "out"), "--recipe", "owl-wanda-50"]
    command += ["--sparsity", "0.6", "-c", str(text_file), "--samples", "2"]
    done = CliRunner().invoke(app, [*command, "--sequence-length", "32"])
    assert done.exit_code == 0, done.output
    manifest = json.loads((tmp_path / "out" / "owl.json").read_text())
    assert manifest["settings"]["sparsity"] == 0.6
    shipped = recipe.find("owl-wanda-50")
    assert manifest["recipe"] == {
        "file": "owl-wanda-50.yaml",
        "sha256": hashlib.sha256(shipped.read_bytes()).hexdigest(),
        "overrides": {"sparsity": 0.6},
    }


def test_a_list_s_mean_is_what_the_recipe_and_the_manifest_say(llama, tmp_path, calibration):
    layers = {"model.layers.0": 0.4, "model.layers.1": 0.6}
    settings = PruneSettings.checked(allocation="list", layers=layers)
    manifest = prune(llama, tmp_path / "out", settings, calibration)
    assert manifest.settings.sparsity == pytest.approx(0.5)
    assert "0.5 of the weights removed" in (tmp_path / "out" / "recipe.yaml").read_text()


def test_a_mixture_of_two_models_is_not_written(tmp_path, calibration, monkeypatch):
    model, report = tiny.write_llama(tmp_path / "model"), write.report

    def replacing(*arguments):
        (model / WEIGHTS).touch()
        return report(*arguments)

    monkeypatch.setattr(write, "report", replacing)
    with pytest.raises(EnvironmentFailed, match="the model was replaced"):
        prune(model, tmp_path / "out", PruneSettings.checked(), calibration)
    assert not (tmp_path / "out").exists()


def test_the_first_block_s_statistics_go_when_it_is_done(llama, tmp_path, calibration, monkeypatch):
    alive = []
    report = write.report

    def counted(*arguments):
        gc.collect()
        alive.append(sum(type(one) is InputStatistics for one in gc.get_objects()))
        return report(*arguments)

    monkeypatch.setattr(write, "report", counted)
    prune(
        llama,
        tmp_path / "out",
        PruneSettings.checked(method="sparsegpt", sparsity=0.5),
        calibration,
    )
    assert alive == [0, 0]


@pytest.mark.parametrize("name", ["cuda:99", "mps", "meta", "gpu"])
def test_a_device_that_cannot_be_used(name):
    with pytest.raises(BadInput, match=r"no device|Unknown device"):
        find_device(name)


def test_a_run_that_resumes_takes_the_batch_that_it_had(llama, tmp_path, calibration, monkeypatch):
    """That was chosen by the memory that was free, which is another now."""
    settings = PruneSettings.checked(method="wanda", allocation="uniform", sparsity=0.5)
    batches = iter([3, 2])
    monkeypatch.setattr(
        request, "find_batch", lambda given, *_: next(batches) if given is None else given
    )
    with monkeypatch.context() as patched:
        patched.setattr(run, "_complete", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(llama, tmp_path / "out", settings, calibration)
    kept = json.loads((partial_folder(tmp_path / "out") / "run.json").read_text())
    assert kept["rounding"]["batch_size"] == 3
    assert prune(llama, tmp_path / "out", settings, calibration, resume=True).resumed
    assert next(batches) == 2  # nobody asked how much there is room for


def test_a_gain_in_speed_is_not_timed_again_when_it_is_planned(llama, monkeypatch, calibration):
    monkeypatch.setattr(request.budget, "room", lambda *_: 1 / 0)
    settings = PruneSettings.checked(method="none", budget="1.5x")
    found = request.check(llama, settings, calibration, Hardware(), planned=True)
    assert found.room is None
    with pytest.raises(ZeroDivisionError):
        request.check(llama, settings, calibration, Hardware())


@pytest.mark.parametrize("allocation", ["uniform", "owl", "fisher"])
def test_activations_that_overflow_are_refused(tmp_path, calibration, own_cache, allocation):
    model = tiny.write_llama(tmp_path / "model")
    tensors = load_file(model / WEIGHTS)
    large = {name: 300 * one for name, one in tensors.items() if "layers.0.mlp" in name}
    save_file(tensors | large, model / WEIGHTS, metadata={"format": "pt"})
    settings = PruneSettings.checked(method="wanda", allocation=allocation, sparsity=0.5)
    with pytest.raises(BadInput, match=r"overflows: what .* is infinite, or no number"):
        prune(model, tmp_path / "out", settings, calibration, Hardware(dtype="float16"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_outgrows_16_bits_while_it_is_made_is_not_written(tmp_path, calibration, own_cache):
    """In the last block no other looks at what it gives."""
    model = tiny.write_llama(tmp_path / "model")
    tensors = {name: one.half() for name, one in load_file(model / WEIGHTS).items()}
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = (tensors[name].float() * (65000 / tensors[name].float().abs().max())).half()
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    settings = PruneSettings.checked(method="sparsegpt", allocation="uniform", sparsity=0.6)
    with pytest.raises(BadInput, match=r"v_proj.* becomes larger than float16 holds"):
        prune(model, tmp_path / "out", settings, calibration, Hardware(dtype="float32"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_model_that_is_away_for_a_while_costs_no_finished_block(
    tmp_path, calibration, monkeypatch
):
    model = tiny.write_llama(tmp_path / "model")
    settings = PruneSettings.checked(method="wanda", allocation="uniform", sparsity=0.5)
    save, weights = Store.save, model / WEIGHTS

    def then_away(self, *block):
        save(self, *block)
        weights.rename(tmp_path / "away")

    with monkeypatch.context() as patched:
        patched.setattr(Store, "save", then_away)
        with pytest.raises(EnvironmentFailed, match=r"model\.safetensors cannot be read"):
            prune(model, tmp_path / "out", settings, calibration)
    (tmp_path / "away").rename(weights)
    assert prune(model, tmp_path / "out", settings, calibration, resume=True).to_json()["resumed"]


@pytest.mark.parametrize(
    "asked",
    [
        {"allocation": "uniform", "sparsity": 0.5, "skip": ("model.layers.0",)},
        {"allocation": "uniform", "structure": "2:4", "skip": ("model.layers.0", "q_proj")},
        {
            "allocation": "list",
            "structure": "4:8",
            "layers": {"model.layers.0": 0.0, "model.layers.1": 0.5},
        },
    ],
)
def test_the_recipe_repeats_a_result_with_a_dense_block(llama, tmp_path, calibration, asked):
    first = prune(
        llama, tmp_path / "a", PruneSettings.checked(method="wanda", **asked), calibration
    )
    again = recipe.merged(tmp_path / "a", {})
    second = prune(llama, tmp_path / "b", again, calibration)
    assert (second.sparsity, second.settings.skip) == (first.sparsity, first.settings.skip)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    with_another = recipe.merged(tmp_path / "a", {"skip": ("k_proj",)})
    prune(llama, tmp_path / "c", with_another, calibration)
    c, dense = (load_file(folder / WEIGHTS) for folder in (tmp_path / "c", llama))
    assert all(torch.equal(c[name], dense[name]) for name in c if "layers.0." in name)


def test_the_recipe_repeats_a_reconstruction(llama, tmp_path, calibration):
    """As much text says when it is enough, though the allocation measured by more."""
    asked = {"reconstruct": 2}
    first = PruneSettings.checked(method="sparsegpt", allocation="fisher", sparsity=0.6, **asked)
    prune(llama, tmp_path / "a", first, calibration)
    prune(llama, tmp_path / "b", recipe.merged(tmp_path / "a", asked), calibration)
    a, b = (load_file(tmp_path / name / WEIGHTS) for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_of_what_loses_nothing_no_input_is_dead(tmp_path, calibration, method):
    """Though the calibration text never has it."""
    model = tiny.write_llama(tmp_path / "model")
    weights = load_file(model / WEIGHTS)
    weights["model.layers.0.post_attention_layernorm.weight"][::4] = 0
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    layers = {"model.layers.0": 0.0, "model.layers.1": 0.5}
    settings = PruneSettings.checked(method=method, allocation="list", layers=layers)
    prune(model, tmp_path / "out", settings, calibration)
    found = load_file(tmp_path / "out" / WEIGHTS)
    assert all(torch.equal(found[name], weights[name]) for name in weights if "layers.0." in name)


def test_a_skipped_linear_may_stand_in_the_recipe(llama, tmp_path, calibration):
    settings = PruneSettings.checked(method="wanda", allocation="fisher", sparsity=0.5)
    prune(llama, tmp_path / "a", settings, calibration)
    prune(llama, tmp_path / "b", recipe.merged(tmp_path / "a", {"skip": ("q_proj",)}), calibration)
    folders = (tmp_path / "a", tmp_path / "b", llama)
    a, b, dense = (load_file(folder / WEIGHTS) for folder in folders)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(b[name], dense[name])
    assert not torch.equal(a[name], dense[name])


@pytest.mark.parametrize(
    ("structure", "sparsities", "says"),
    [
        ("2:4", (0.25, 0.5, 0.75), "Note: each Linear has its own N here, 1 to 3 of 4."),
        ("2:4", (0.5, 0.0, 0.5), ""),  # one was skipped
        ("unstructured", (0.25, 0.5, 0.75), ""),
    ],
)
def test_linears_of_other_n_are_said(capsys, structure, sparsities, says):
    linears = {
        f"part{i}": {"achieved": one, "sparsity": one, "weights": 8}
        for i, one in enumerate(sparsities)
    }
    block = {"name": "layers.0", "achieved": 0.5, "sparsity": 0.5, "linears": linears}
    settings = {"method": "wanda", "structure": structure}
    show(CheckpointManifest.model_validate({"settings": settings, "blocks": [block]}), "out")
    out = capsys.readouterr().out
    assert ("Note" in out, says in out) == (bool(says), True)
    assert ("--allocation uniform gives 2:4 throughout" in out) == bool(says)
