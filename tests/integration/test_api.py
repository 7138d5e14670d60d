"""The chain from a model to a benchmark through `owl_deploy.api`, as its page shows it."""

import os
import re
from pathlib import Path

import pytest

from owl_deploy import api
from owl_deploy.bench import machine
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.runtime import library_path
from tests import tiny

# What makes the page's example small; nothing else of it is changed.
SMALLER = {
    'Calibration("text.txt")': 'Calibration("text.txt", samples=4, sequence_length=64)',
    'EvaluationSettings(text="held-out.txt")': 'EvaluationSettings(text="held-out.txt", window=64)',
    "baselines=(dense,))": "baselines=(dense,), pairs=1)",
}


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a model and a text, which the example runs in."""
    tiny.write_llama(tmp_path / "MODEL")
    for name in ("text.txt", "held-out.txt"):
        (tmp_path / name).write_text(tiny.text())
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "busy_cores", lambda seconds: 0.0)
    monkeypatch.setattr(machine, "read_bandwidth", lambda threads: 30.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example() -> str:
    """The one block of Python in the API's reference."""
    blocks = re.findall(
        r"```python\n(.*?)```", Path("docs/reference/api.md").read_text(), re.DOTALL
    )
    (block,) = [block for block in blocks if "owl_deploy.api" in block]
    for given, smaller in SMALLER.items():
        assert block.count(given) == 1
        block = block.replace(given, smaller)
    return block


EXAMPLE = example()


def test_the_pages_example_goes_from_a_model_to_a_comparison(work, capsys):
    try:
        library_path()
    except api.EnvironmentFailed as error:
        pytest.skip(str(error))
    names = {}
    exec(EXAMPLE, names)
    manifest = read_manifest(work / "sparse", CheckpointManifest)
    assert manifest
    assert manifest.sparsity.achieved == pytest.approx(0.5, abs=0.01)
    assert api.verify(work / "deployment").whole
    weights = work / "deployment" / "model.onnx.data"
    content, before = weights.read_bytes(), weights.stat()
    for changed in (content[:-1] + bytes([content[-1] ^ 1]), content):
        weights.write_bytes(changed)
        os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert api.verify(work / "deployment").whole == (changed == content)
    result = names["result"]
    assert isinstance(result, api.Result)
    assert not result.failures
    assert {c.scenario for c in result.comparisons} == {"decode@512", "prefill@128"}
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith(("decode@", "prefill@"))]) == 2
    assert lines[-1].startswith("Deploy ")  # the quality of both is known


def test_folders_may_be_strings_and_defaults_do(work):
    settings = api.prune_settings(None, {"method": "magnitude", "allocation": "uniform"})
    manifest = api.prune("MODEL", "sparse", settings)
    assert manifest == read_manifest(work / "sparse", CheckpointManifest)
    tuned = api.finetune(
        "sparse",
        "tuned",
        "text.txt",
        api.FinetuneSettings(method="masked", max_steps=1, sequence_length=32),
    )
    assert tuned.finetune
    assert tuned.finetune.steps == 1
    api.export("tuned", "deployment", target="onnxruntime")
    speed = api.Speed()
    assert list(api.generate("deployment", "The river ran", speed=speed))
    assert speed.new_tokens > 0
    assert list(api.generate("deployment", "The river ran", api.Sampling(1)))
    (found,) = api.evaluate(
        ["deployment"], api.EvaluationSettings(text="text.txt", window=64, windows=1)
    )
    assert found.perplexity is not None
    assert api.verify("deployment").whole
    plan = api.BenchPlan(candidates=("deployment",), pairs=1, scenarios=("decode",), context=64)
    result = api.bench(plan, "result")
    assert api.read_result(work / "result") == result
    with pytest.raises(api.BadInput, match="result exists"):
        api.bench(plan, "result")


def test_one_folder_may_stand_alone_and_settings_be_a_dict(work):
    settings = {"method": "magnitude", "allocation": "uniform", "sparsity": 0.5}
    api.prune("MODEL", "sparse", settings)
    (found,) = api.evaluate("sparse", api.EvaluationSettings(text="text.txt", window=64, windows=1))
    assert found.model == "sparse"
    text = api.Calibration(Path("text.txt"), 4, 64)
    made = api.prune("MODEL", "wanda", api.PruneSettings(sparsity=0.5), text)
    assert made.calibration["source"] == "text.txt"


def test_what_is_wrong_is_said_as_a_kind_of_owl_error(work):
    with pytest.raises(api.BadInput, match="Unknown key 'sparsty'"):
        api.prune_settings(None, {"sparsty": 0.5})
    with pytest.raises(api.OwlError, match="Unknown target 'owls'"):
        api.export("MODEL", "out", target="owls")
    with pytest.raises(api.BadInput, match="not a deployment"):
        api.verify("MODEL")
    pieces = api.generate("MODEL", "The river ran")  # nothing is refused yet
    with pytest.raises(api.BadInput):
        next(pieces)
