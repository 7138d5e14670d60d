import pytest
from safetensors.torch import load_file

from owl_deploy.compression import plan as planning
from owl_deploy.compression.allocation.interpolate import mixed, of_linear
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_search_begins_with_the_model_that_a_pruning_makes(
    llama, text_file, tmp_path, monkeypatch, method
):
    """Blocks after the first are made by what the pruned ones before them give, as in a pruning."""
    begun = {}

    class Noted(planning.Judge):
        def __init__(self, skeleton, shape, tried, made, *rest):
            for name, own in zip(shape.names, shape.linears, strict=True):
                with skeleton.loaded(name) as block:
                    for key in own:
                        weight = block.get_submodule(key).weight.detach().float()
                        left = mixed(weight, *of_linear(made(name), key), tried, 0.6)
                        begun[f"{name}.{key}.weight"] = weight, left
            super().__init__(skeleton, shape, tried, made, *rest)

    monkeypatch.setattr(planning, "Judge", Noted)
    settings = PruneSettings.checked(method=method, allocation="uniform", sparsity=0.6)
    text = Calibration(str(text_file), samples=8, sequence_length=48)
    prune(llama, tmp_path / "searched", settings, text, tune_minutes=1e-9)
    prune(llama, tmp_path / "pruned", settings, text)
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")
    for name, (dense, left) in begun.items():
        off = (left - pruned[name].float()).norm() / (dense - pruned[name].float()).norm()
        assert off < 0.3, name  # by the dense model's inputs 0.5 to 0.7 in the second block
