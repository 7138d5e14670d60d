import math

import pytest
import torch
import transformers

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.perplexity import from_nll, perplexity
from owl_deploy.text import load_tokenizer
from tests import tiny


def test_equals_the_loss_of_transformers_window_by_window(llama, text_file):
    found = perplexity(llama, str(text_file), window=300, limit=3)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor(load_tokenizer(llama)(tiny.text())["input_ids"][:900]).view(3, 300)
    with torch.no_grad():
        losses = [model(part.unsqueeze(0), labels=part.unsqueeze(0)).loss.item() for part in ids]
    assert found.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found.windows, found.window, found.tokens) == (3, 300, 897)


@pytest.mark.parametrize("nll", [1e6, math.inf, math.nan])
def test_a_loss_that_is_no_number_is_an_error(nll):
    with pytest.raises(BadInput, match="nats a token"):
        from_nll("text", nll, torch.zeros(1, 10))


@pytest.mark.parametrize(
    ("window", "limit", "complaint"),
    [(100_000, None, "less than one window"), (1, None, "too small"), (64, 0, "too small")],
)
def test_windows_that_cannot_be(llama, text_file, window, limit, complaint):
    with pytest.raises(BadInput, match=complaint):
        perplexity(llama, str(text_file), window=window, limit=limit)
