import json
from types import SimpleNamespace

import pytest
import torch

from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.subject import load_model
from owl_deploy.models.checkpoint import open_checkpoint
from tests import tiny

pytest.importorskip("lm_eval", reason="pip install 'owl-deploy[eval]'")
from lm_eval.api.instance import Instance

from owl_deploy.evaluate.hugging_face import CheckpointLM


def test_a_checkpoint_takes_the_likeliest_token_whatever_its_files_say(tmp_path):
    tiny.write_llama(tmp_path)
    settings = {"bos_token_id": 0, "eos_token_id": 1, "repetition_penalty": 1.3}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    device = torch.device("cpu")
    model = load_model(open_checkpoint(tmp_path), torch.float32, device, None)
    tokenizer = load_tokenizer(tmp_path)
    lm = CheckpointLM(model, tokenizer, max_length=256, batch=1)
    context = "The river ran past the mill"
    options = {"until": ["\n\n\n"], "max_gen_toks": 24, "do_sample": False}
    (text,) = lm.generate_until(
        [Instance("generate_until", {}, (context, options), 0)], disable_tqdm=True
    )
    tokens = tokenizer(context, return_tensors="pt").input_ids
    begun = tokens.shape[1]
    for _ in range(24):
        chosen = model(tokens).logits[0, -1].argmax()
        if chosen == 1:
            break
        tokens = torch.cat([tokens, chosen.view(1, 1)], dim=1)
    assert text == tokenizer.decode(tokens[0, begun:], skip_special_tokens=True)


def test_a_tokenizer_without_the_tokens_for_a_task_is_refused():
    lm = CheckpointLM.__new__(CheckpointLM)
    lm.tokenizer = SimpleNamespace(bos_token_id=None, eos_token_id=None)
    lm._model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=None))
    with pytest.raises(BadInput, match="neither a BOS nor an EOS token"):
        lm.prefix_token_id  # noqa: B018
    with pytest.raises(BadInput, match="a token that ends a text"):
        lm.eot_token_id  # noqa: B018
    for told, end in ((7, 7), ([9, 8], 8)):
        lm._model.generation_config.eos_token_id = told
        assert lm.eot_token_id == end
    lm.tokenizer.eos_token_id = 5
    assert (lm.prefix_token_id, lm.eot_token_id) == (5, 5)


class Pieces:
    """A tokenizer of letters that, as SentencePiece, leaves out a space where a text begins."""

    def encode(self, text, add_special_tokens):
        return [*map(ord, text)]

    def decode(self, tokens, skip_special_tokens=False):
        tokens = [tokens] if isinstance(tokens, int) else tokens
        return "".join(map(chr, tokens)).removeprefix(" ")


def test_what_goes_on_keeps_its_first_space():
    lm = CheckpointLM.__new__(CheckpointLM)
    lm.tokenizer = Pieces()
    assert lm.tok_decode([*map(ord, "    pass")]) == "    pass"
    assert lm.tok_decode(ord("$"), skip_special_tokens=False) == "$"
