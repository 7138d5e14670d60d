from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from owl_deploy.errors import BadInput
from owl_deploy.export.importance import importance
from owl_deploy.models.checkpoint import open_checkpoint
from tests import tiny


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_it_is_what_enters_the_whole_model(family: str, tmp_path: Path) -> None:
    folder = tiny.write_model(family, tmp_path / "model")
    windows = torch.arange(96).view(3, 32) * 7 % 320
    steps: list[str] = []
    found = importance(open_checkpoint(folder), windows, tmp_path, steps.append)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wanted: dict[str, np.ndarray] = {}

    def seeing(name: str) -> Callable[..., None]:
        def see(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            wanted[f"{name}.weight"] = inputs[0].square().mean(dim=(0, 1)).numpy()

        return see

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.register_forward_pre_hook(seeing(name))
    with torch.no_grad():
        model(windows)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4)
    assert steps[-1] == f"Seeing what enters the Linears (block {len(steps)} of {len(steps)})"


def test_inputs_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_llama(tmp_path / "model", rms_norm_eps=float("nan"))
    with pytest.raises(BadInput, match="is infinite, or no number"):
        importance(open_checkpoint(folder), torch.arange(32).view(1, 32), tmp_path, print)
