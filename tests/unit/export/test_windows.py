"""Which blocks look at the last tokens only: held to what transformers computes."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from owl_deploy.export.windows import is_lacking, sliding
from tests import tiny

WINDOW = 8
SLIDING, FULL = ["sliding_attention"], ["full_attention"]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),  # a key that its code does not read
        ("gpt_neox", {}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("phi3", {}),
        ("phi3", {"layer_types": FULL}),  # nor these
        ("phi3", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("qwen2", {}),
        ("qwen3", {"use_sliding_window": True, "layer_types": SLIDING}),
        ("gemma3_text", {"layer_types": SLIDING}),
        ("gemma3_text", {"layer_types": FULL}),
    ],
)
def test_a_block_that_slides_forgets_the_first_token(family: str, changes: dict) -> None:
    config = tiny.config_of(
        family, **{"num_hidden_layers": 1, "layer_types": None, "sliding_window": WINDOW} | changes
    )
    assert sliding(config) == [forgets(config)]


@pytest.mark.parametrize("layers", [SLIDING, FULL])
def test_a_mistral_whose_layers_are_listed(tmp_path: Path, layers: list[str]) -> None:
    """Transformers reads another class's config from its folder."""
    given = tiny.config_of("mistral", num_hidden_layers=1, sliding_window=WINDOW)
    told = given.to_dict() | {"layer_types": layers}
    (tmp_path / "config.json").write_text(json.dumps(told))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert sliding(config) == [forgets(config)]


def forgets(config: Any) -> bool:
    """Whether a model of one block does."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(1, 1 + 2 * WINDOW)[None]
    other = torch.cat([torch.tensor([[50]]), tokens[:, 1:]], dim=1)
    with torch.no_grad():
        last = [model(ids).logits[0, -1] for ids in (tokens, other)]
    return torch.equal(*last)


@pytest.mark.parametrize(
    ("family", "layers", "window", "lacks"),
    [
        ("qwen2", SLIDING, None, True),
        ("qwen2", FULL, None, False),
        ("ministral", SLIDING, None, True),
        ("ministral", SLIDING, WINDOW, False),
        ("mistral", SLIDING, None, False),
        ("llama", SLIDING, None, False),
        ("opt", None, None, False),
    ],
)
def test_a_list_without_a_window(family: str, layers: list, window: int, lacks: bool) -> None:
    config = SimpleNamespace(model_type=family, layer_types=layers, sliding_window=window)
    assert is_lacking(config) == lacks
