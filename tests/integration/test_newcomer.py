"""A method, an allocation and a family from outside the package: a row of a table each, no more.

Each goes the whole way: pruned, exported, benched in a real engine, reported, and written as a
recipe that is read back.
"""

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file

from owl_deploy.bench import BenchPlan, run_bench
from owl_deploy.bench.report import write_report
from owl_deploy.compression import recipe
from owl_deploy.compression.allocation.rules import ALLOCATIONS, Allocation, hold_mean
from owl_deploy.compression.methods import METHODS, Method, Modifier, Options
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.perplexity import perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.export.targets import export
from owl_deploy.models.families import FAMILIES, Family
from tests import tiny


class DiceOptions(Options):
    throws: int = Field(default=1, ge=1, description="how often the dice are thrown")


def dice(weight, inputs, sparsity, group, options):
    """Removes weights at random, those with the lowest of the throws."""
    generator = torch.Generator().manual_seed(0)
    shape = (options.throws, weight.numel())
    scores = torch.rand(shape, generator=generator).sum(0) + inputs.norm().sum()
    count = round(sparsity * weight.numel())
    return weight.flatten().index_fill(0, scores.argsort()[:count], 0).view_as(weight)


def by_rank(sparsity, sizes, values, spread):
    """Sparsity by equal steps in the order of the outlier ratios."""
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
    steps = [2 * spread * order.index(i) / (len(values) - 1) for i in range(len(values))]
    return hold_mean(steps, sizes, sparsity)


@pytest.fixture
def calibration(text_file):
    return Calibration(str(text_file), samples=3, sequence_length=32)


def the_whole_way(dense, settings, calibration, tmp_path):
    """Prune, export, bench and report; return the manifest of the checkpoint."""
    manifest = prune(dense, tmp_path / "sparse", settings, calibration).to_json()
    assert manifest["sparsity"]["asked"] == pytest.approx(settings.sparsity, abs=1e-6)
    assert manifest["sparsity"]["achieved"] >= settings.sparsity - 1e-3  # some are 0 before
    asked = EvaluationSettings(calibration.source, window=32, windows=2)
    assert perplexity(tmp_path / "sparse", asked).value > 1
    for name, folder in (("candidate", tmp_path / "sparse"), ("baseline", dense)):
        deployed = export(folder, tmp_path / name, target="deepsparse").to_json()
        assert deployed["parity"]["relative_difference"] < 1e-4
    plan = BenchPlan(
        candidates=(tmp_path / "candidate",),
        baselines=(tmp_path / "baseline",),
        engines=("onnxruntime",),
        context=64,
        prompt=16,
        pairs=1,
    )
    result = run_bench(plan)
    assert result.failures == []
    assert [one.role for one in result.subjects] == ["candidate", "baseline"]
    write_report([result], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"{block['achieved']:.4f}" in page for block in manifest["blocks"])
    return manifest


def repeats(dense, settings, calibration, tmp_path):
    """Whether the recipe in the checkpoint prunes to the same weights."""
    again = recipe.merged(tmp_path / "sparse", {})
    assert (again.allocation, again.options) == ("list", settings.options)
    prune(dense, tmp_path / "again", again, calibration)
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("sparse", "again")
    )
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_method(llama, tmp_path, calibration, monkeypatch):
    row = Method(f"{__name__}:dice", "norms", DiceOptions)
    monkeypatch.setitem(METHODS, "dice", row)
    settings = PruneSettings.checked(method="dice", sparsity=0.6, options={"throws": 3})
    manifest = the_whole_way(llama, settings, calibration, tmp_path)
    assert manifest["settings"]["options"] == {"throws": 3}
    with pytest.raises(BadInput, match=r"sparse holds no recipe\.yaml.*SparseML has a modifier"):
        recipe.merged(tmp_path / "sparse", {})
    with pytest.raises(BadInput, match="throws in the options of dice is 0"):
        PruneSettings.checked(method="dice", options={"throws": 0})


def test_a_method_that_sparseml_has(llama, tmp_path, calibration, monkeypatch):
    modifier = Modifier("DiceModifier", {"throws": "num_throws"})
    monkeypatch.setitem(METHODS, "dice", Method(f"{__name__}:dice", "norms", DiceOptions, modifier))
    settings = PruneSettings.checked(method="dice", sparsity=0.6, options={"throws": 2})
    prune(llama, tmp_path / "sparse", settings, calibration)
    assert "num_throws: 2" in (tmp_path / "sparse" / "recipe.yaml").read_text()
    assert repeats(llama, settings, calibration, tmp_path)


def test_an_allocation(llama, tmp_path, calibration, monkeypatch):
    monkeypatch.setitem(ALLOCATIONS, "by-rank", Allocation(by_rank, 0.1, counts_outliers=True))
    settings = PruneSettings.checked(allocation="by-rank", sparsity=0.6, outlier_multiple=2)
    assert settings.spread == 0.1
    manifest = the_whole_way(llama, settings, calibration, tmp_path)
    asked = [block["sparsity"] for block in manifest["blocks"]]
    assert max(asked) - min(asked) == pytest.approx(0.2)
    assert repeats(llama, settings, calibration, tmp_path)


def test_a_family(tmp_path, calibration, monkeypatch):
    monkeypatch.setitem(FAMILIES, "olmo2", Family("model", "model.layers", ("model.embed_tokens",)))
    monkeypatch.setitem(tiny.FAMILIES, "olmo2", tiny.FAMILIES["qwen2"])
    dense = tiny.write_model("olmo2", tmp_path / "dense")
    settings = PruneSettings.checked(sparsity=0.6, head_sparsity=0.3)
    manifest = the_whole_way(dense, settings, calibration, tmp_path)
    assert manifest["head"]["name"] == "lm_head"
    assert repeats(dense, settings, calibration, tmp_path)
