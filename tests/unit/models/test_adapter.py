"""What is read of PEFT adapters that others have trained."""

import math

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.perplexity import perplexity
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.models.adapter import WEIGHTS
from tests import tiny

WINDOW = 32


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request, tmp_path):
    return tiny.write_llama(tmp_path / "model", tie_word_embeddings=request.param)


def trained(model, folder, *targets):
    """A LoRA adapter of Linears and embeddings that adds something, saved as PEFT does."""
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=list(targets), init_lora_weights=False
    )
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_what_an_adapter_adds_around_the_blocks_counts(model, text_file, tmp_path, target):
    adapted = trained(model, tmp_path / "adapter", "q_proj", target)
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    assert any(name.endswith("base_layer.weight") for name in saved)  # the model's own
    asked = EvaluationSettings(
        str(text_file), window=WINDOW, windows=1, adapter=tmp_path / "adapter"
    )
    text = text_file.read_text()
    tokens = load_tokenizer(model)(text, add_special_tokens=False)["input_ids"][:WINDOW]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        wanted = math.exp(adapted(input_ids=ids, labels=ids).loss)
        with adapted.disable_adapter():
            without = math.exp(adapted(input_ids=ids, labels=ids).loss)
    assert perplexity(model, asked).value == pytest.approx(wanted, rel=1e-4)
    assert wanted != pytest.approx(without, rel=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_with_embeddings_of_another_model_is_refused(model, text_file, tmp_path):
    trained(model, tmp_path / "adapter", "q_proj", "embed_tokens")
    saved = load_file(tmp_path / "adapter" / WEIGHTS)
    (name,) = [one for one in saved if one.endswith("base_layer.weight")]
    saved[name][3] += 1
    save_file(saved, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    asked = EvaluationSettings(
        str(text_file), window=WINDOW, windows=1, adapter=tmp_path / "adapter"
    )
    with pytest.raises(BadInput, match=r"is not for .*: 1 tensors have no counterpart"):
        perplexity(model, asked)
