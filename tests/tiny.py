"""Small models, tokenizers and texts that the tests make for themselves."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SENTENCES = (
    "The river ran past the mill and under the old stone bridge. ",
    "Nobody in the village could say when the clock had stopped. ",
    "A small boat came in on the tide with salt, rope and letters. ",
    "Most of the numbers were right, and the rest were close enough. ",
)


def text(words: int = 4000) -> str:
    """English-like text of at least so many words, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(SENTENCES), (words // 10,), generator=generator)
    return "".join(SENTENCES[pick] for pick in picks)


def write_tokenizer(folder: Path, vocabulary: int = 320) -> None:
    """A byte-level BPE tokenizer trained on `text`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text()], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)


def write_llama(folder: Path, **changes: Any) -> Path:
    """A random two-block Llama with grouped-query attention and tied embeddings, and a tokenizer.

    Its weights are rounded to a coarse grid, so that scores tie, as those of real quantised models.
    """
    values: dict[str, Any] = {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_theta": 50000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(values | changes))
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_((parameter * 5 * 64).round() / 64)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
