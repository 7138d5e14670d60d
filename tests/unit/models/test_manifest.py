import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from owl_deploy.errors import BadInput
from owl_deploy.models.manifest import (
    VERSION,
    AdapterManifest,
    BenchmarkManifest,
    CheckpointManifest,
    DeploymentManifest,
    Manifest,
    read_manifest,
    what_it_is,
)
from owl_deploy.models.measurements import measurement
from owl_deploy.utils.artefact import MANIFEST, write_json

EARLIER = Path("tests/earlier")  # what 0.1.0.dev wrote, see its README


@pytest.mark.parametrize(
    ("kind", "manifest", "place"),
    [
        ("deployment", {"files": 3}, "files"),
        ("deployment", {"files": {"model.onnx": []}}, "files.model.onnx"),
        ("deployment", {"source": "model"}, "source"),
        ("deployment", {"sparsity": "much"}, "sparsity"),
        ("deployment", {"target": 7}, "target"),
        (["checkpoint"], {}, "kind"),
        ("checkpoint", {"settings": {"skip": "head"}}, "settings.skip"),
        ("checkpoint", {"blocks": [{"name": "model.layers.0"}]}, "blocks.0.achieved"),
        ("checkpoint", {"blocks": [{"name": "a", "achieved": 10**400}]}, "blocks.0.achieved"),
        ("checkpoint", {"finetune": {"curve": []}}, "finetune"),
    ],
)
@pytest.mark.parametrize("version", [{}, {"schema_version": VERSION}], ids=["earlier", "current"])
def test_a_field_of_another_type_gets_a_sentence(tmp_path, kind, manifest, place, version):
    (tmp_path / MANIFEST).write_text(json.dumps({"kind": kind} | version | manifest))
    with pytest.raises(BadInput, match=rf"^{place}.* in .*owl\.json is .*Make the artefact again"):
        read_manifest(tmp_path, Manifest)


@pytest.mark.parametrize(
    "content", ["{", "[1]", "[" * 100_000, '{"schema_version": 1}', '{"a": ' + "1" * 10_000 + "}"]
)
def test_a_damaged_manifest_gets_a_sentence(tmp_path, content):
    (tmp_path / MANIFEST).write_text(content)
    with pytest.raises(BadInput, match=r"owl\.json"):
        read_manifest(tmp_path, Manifest)


@pytest.mark.parametrize("version", ["one", None, 0, 1.5])
def test_a_format_that_is_no_number_is_damaged(tmp_path, version):
    content = {"kind": "checkpoint", "schema_version": version}
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(BadInput, match=r"^schema_version in .*owl\.json is "):
        read_manifest(tmp_path, Manifest)


def test_fields_that_owl_does_not_know_are_kept(tmp_path):
    content = {
        "kind": "checkpoint",
        "schema_version": VERSION,
        "sparsity": {"asked": 0.7, "achieved": 0.7, "by": "hand"},
        "more": [1],
    }
    write_json(tmp_path / MANIFEST, content)
    manifest = read_manifest(tmp_path, CheckpointManifest)
    assert manifest is not None
    manifest.write(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text()) == content
    assert read_manifest(tmp_path, DeploymentManifest) is None
    with pytest.raises(ValidationError, match="frozen"):
        manifest.source = "another"


def test_a_kind_of_tomorrow_is_no_kind_of_today(tmp_path):
    write_json(tmp_path / MANIFEST, {"kind": "merger", "schema_version": VERSION})
    assert read_manifest(tmp_path, Manifest).kind == "merger"
    assert read_manifest(tmp_path, CheckpointManifest) is None
    assert read_manifest(tmp_path / "none", Manifest) is None


def test_a_later_format_is_refused_with_both_numbers(tmp_path):
    write_json(tmp_path / MANIFEST, {"kind": "checkpoint", "schema_version": VERSION + 1})
    words = rf"owl\.json has format {VERSION + 1}, .* up to {VERSION}\. Update owl-deploy"
    with pytest.raises(BadInput, match=words):
        read_manifest(tmp_path, DeploymentManifest)


def earlier(name, tmp_path):
    """An artefact's folder as an earlier version left it, but for its weights."""
    write_json(tmp_path / MANIFEST, json.loads((EARLIER / f"{name}.json").read_text()))
    return tmp_path


def test_an_earlier_checkpoint(tmp_path):
    folder = earlier("checkpoint", tmp_path)
    manifest = read_manifest(folder, CheckpointManifest)
    assert manifest.schema_version == VERSION
    assert [block.name for block in manifest.blocks] == ["model.layers.0", "model.layers.1"]
    assert manifest.sparsity.achieved == pytest.approx(0.5, abs=0.01)
    assert (manifest.settings.method, manifest.settings.allocation) == ("wanda", "owl")
    assert measurement(folder, "perplexity")["value"] == pytest.approx(409.4, rel=1e-2)
    assert "checkpoint" in what_it_is(folder)


def test_an_earlier_fine_tuning(tmp_path):
    manifest = read_manifest(earlier("adapter", tmp_path), AdapterManifest)
    assert manifest.finetune.settings.method == "lora"
    assert manifest.finetune.held_out_loss.after < manifest.finetune.held_out_loss.before
    masked = read_manifest(earlier("masked", tmp_path), CheckpointManifest)
    assert masked.finetune.steps == 4
    assert len(masked.blocks) == 2


def test_an_earlier_deployment(tmp_path):
    folder = earlier("deployment", tmp_path)
    manifest = read_manifest(folder, DeploymentManifest)
    assert (manifest.target, manifest.precision) == ("onnxruntime", "int8")
    assert len(manifest.files["model.onnx"].sha256) == 64
    assert measurement(folder, "perplexity")["engine"] == "onnxruntime"


def test_an_earlier_deployment_for_owl_had_two_words_for_its_precision(tmp_path):
    content = json.loads((EARLIER / "deployment-owl.json").read_text())
    assert (content["precision"], content["values"]) == ("fp32", "int8")
    manifest = read_manifest(earlier("deployment-owl", tmp_path), DeploymentManifest)
    assert manifest.precision == "int8"
    assert "values" not in manifest.to_json()


def test_an_earlier_benchmark(tmp_path):
    assert read_manifest(earlier("benchmark", tmp_path), BenchmarkManifest).created


def test_a_deployment_that_lost_its_kind_is_one_still(tmp_path):
    write_json(tmp_path / MANIFEST, {"files": {}})
    assert read_manifest(tmp_path, DeploymentManifest) is not None


def test_an_adapter_has_ways_to_a_deployment(owl, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    code, _, err = owl("export", tmp_path, "-o", tmp_path.parent / "out")
    assert code == 2
    said = " ".join(err.split())
    assert "It is an adapter: owl eval CHECKPOINT --adapter takes it." in said
    assert "--merge masked, or merge it with PEFT's merge_and_unload: owl export takes" in said
