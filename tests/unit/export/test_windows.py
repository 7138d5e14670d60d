"""Which blocks look at the last tokens only: held to what transformers computes."""

import pytest
import torch
import transformers

from owl_deploy.export.windows import sliding
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
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tokens = torch.arange(1, 1 + 2 * WINDOW)[None]
    other = torch.cat([torch.tensor([[50]]), tokens[:, 1:]], dim=1)
    with torch.no_grad():
        last = [model(ids).logits[0, -1] for ids in (tokens, other)]
    assert sliding(config) == [torch.equal(*last)]
