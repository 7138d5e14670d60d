import json

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.models.measurements import keep_measurement, measurement
from owl_deploy.utils.artefact import MANIFEST, write_json


def test_what_is_measured_lies_beside_a_manifest_that_stays(tmp_path):
    write_json(tmp_path / MANIFEST, {"kind": "deployment", "perplexity": {"value": 13.0}})
    before = (tmp_path / MANIFEST).read_bytes()
    assert measurement(tmp_path, "perplexity") == {"value": 13.0}  # as earlier versions kept it
    keep_measurement(tmp_path, "perplexity", {"value": 14.0})
    assert measurement(tmp_path, "perplexity") == {"value": 14.0}
    assert measurement(tmp_path, "tasks") is None
    assert (tmp_path / MANIFEST).read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", '{"value": "low"}', '{"value": NaN}', '{"value": -1}'])
def test_a_damaged_measurement_is_refused(tmp_path, text):
    keep_measurement(tmp_path, "perplexity", {"value": 1.0})
    (tmp_path / "measured" / "perplexity.json").write_text(text)
    with pytest.raises(BadInput, match="Measure again"):
        measurement(tmp_path, "perplexity")


def test_what_is_damaged_keeps_nothing_from_being_kept(tmp_path):
    keep_measurement(tmp_path, "tasks", {"a": {"documents": 1}}, add=True)
    (tmp_path / "measured" / "tasks.json").write_text('{"a": ')
    keep_measurement(tmp_path, "tasks", {"b": {"documents": 2}}, add=True)
    assert measurement(tmp_path, "tasks") == {"b": {"documents": 2}}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("perplexity", 13.5),
        ("perplexity", {"value": float("nan")}),
        ("tasks", []),
        ("tasks", {"humaneval": {"window": "abc"}}),
    ],
)
def test_a_damaged_measurement_in_an_earlier_manifest_is_refused(tmp_path, name, value):
    (tmp_path / MANIFEST).write_text(json.dumps({name: value}))
    with pytest.raises(BadInput, match=rf"^{name}.* in .*owl\.json is .*Measure again"):
        measurement(tmp_path, name)


@pytest.mark.parametrize("which", ["measured", "measured/tasks.json", "measured/.tasks.owl-lock"])
def test_nothing_is_measured_through_a_link(tmp_path, which):
    """A stranger's folder could have it overwrite whatever its reader may write."""
    model, secret = tmp_path / "model", tmp_path / "secret"
    model.mkdir()
    link = model / which
    if link.parent == model:
        secret.mkdir()
    else:
        link.parent.mkdir()
        secret.write_text("mine")
    link.symlink_to(secret)
    with pytest.raises(OSError, match="it is a link"):
        keep_measurement(model, "tasks", {})
    assert list(secret.iterdir()) == [] if secret.is_dir() else secret.read_text() == "mine"
