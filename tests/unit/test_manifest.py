import json

import pytest

from owl_deploy.artefact import MANIFEST, read_manifest
from owl_deploy.errors import BadInput


@pytest.mark.parametrize(
    ("manifest", "place"),
    [
        ({"files": 3}, "files"),
        ({"files": {"model.onnx": []}}, "files.model.onnx"),
        ({"kind": "deployment", "source": "model"}, "source"),
        ({"kind": "deployment", "sparsity": "much"}, "sparsity"),
        ({"kind": ["checkpoint"]}, "kind"),
        ({"target": 7}, "target"),
        ({"perplexity": 13.5}, "perplexity"),
        ({"perplexity": {"value": float("nan")}}, "perplexity.value"),
        ({"tasks": []}, "tasks"),
        ({"settings": {"skip": "head"}}, "settings.skip"),
        ({"blocks": [{"name": "model.layers.0"}]}, "blocks.0.achieved"),
        ({"blocks": [{"name": "model.layers.0", "achieved": 10**400}]}, "blocks.0.achieved"),
        ({"finetune": {"curve": []}}, "finetune"),
    ],
)
def test_a_field_of_another_type_gets_a_sentence(tmp_path, manifest, place):
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BadInput, match=rf"^{place}.* in .*owl\.json is .*Make the artefact again"):
        read_manifest(tmp_path)


def test_what_owl_does_not_read_is_kept(tmp_path):
    manifest = {"kind": "checkpoint", "source": "model", "sparsity": {"asked": 0.7}, "more": [1]}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert read_manifest(tmp_path) == manifest
