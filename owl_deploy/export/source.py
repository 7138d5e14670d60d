"""The checkpoint that is exported: checked, and what PyTorch computes with it in fp32."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.filesize import decimal

from owl_deploy.data.text import load_tokenizer, tokenize
from owl_deploy.errors import BadInput
from owl_deploy.export import windows
from owl_deploy.models.blocks import Skeleton
from owl_deploy.models.checkpoint import check_links, has_tokenizer, open_checkpoint
from owl_deploy.models.families import Family
from owl_deploy.models.manifest import CheckpointManifest, read_manifest
from owl_deploy.utils.ranks import free_memory

Progress = Callable[[str], None]

GREEDY_TOKENS = 32
PROMPT_TOKENS = 64
_PROMPT = (
    "The water clock is one of the oldest instruments for measuring time. A vessel with a small "
    "hole near its base was filled to a mark, and the falling level showed how many hours had "
    "passed since sunrise. In 1656 a Dutch scientist built the first pendulum clock, which lost "
    "only 15 seconds a day; before that, a good clock was wrong by a quarter of an hour."
)


@dataclass(frozen=True)
class Reference:
    """What PyTorch computes: `prompt` ids, the `greedy` ids after it, and the logits.

    `logits`: float32 [prompt + greedy - 1, vocabulary]; row i follows the token at i, so that row
    `len(prompt) - 1` gives the first greedy token.
    """

    prompt: list[int]
    greedy: list[int]
    logits: np.ndarray

    @property
    def fed(self) -> list[int]:
        """The tokens that go in: one for each row of `logits`."""
        return self.prompt + self.greedy[:-1]


class Source:
    """A checkpoint of a supported family.

    Attributes: `folder`; `family`; `config`, the parsed config.json; `skeleton`, the model without
    its weights; `tokenizer`, None when the folder has none; `manifest`, that of the checkpoint,
    None if owl did not write it.
    """

    def __init__(self, folder: Path) -> None:
        self.checkpoint = open_checkpoint(folder)
        folder = self.checkpoint.folder
        check_links(folder)
        self.folder, self.config = folder.absolute(), self.checkpoint.config
        self.family: Family = self.checkpoint.family
        self.manifest = read_manifest(folder, CheckpointManifest)
        _check_causal(self.config, folder)
        self.tokenizer = self._load_tokenizer()
        self.skeleton = Skeleton(self.checkpoint, torch.float32, torch.device("cpu"))
        _check_windows(self.skeleton.model.config, folder)

    @cached_property
    def model(self) -> Any:  # noqa: ANN401 - transformers has no types
        """The whole model in memory, in fp32: 4 bytes a parameter."""
        needed = 4 * self.checkpoint.weights()
        available = free_memory()
        if needed > available:
            raise BadInput(
                f"The model needs {decimal(needed)} in fp32, and only "
                f"{decimal(available)} of memory are free.",
                "Free memory, or export on a larger machine.",
            )
        return self.checkpoint.load(torch.float32)

    def _load_tokenizer(self) -> Any:  # noqa: ANN401 - transformers' tokenizers share no type
        if not has_tokenizer(self.folder):
            return None
        return load_tokenizer(self.folder)

    def prompt(self) -> list[int]:
        """Ids to compare on: English text, or arbitrary ids when there is no tokenizer."""
        limit = int(self.config.get("max_position_embeddings") or 2**30)
        if limit <= GREEDY_TOKENS:
            raise BadInput(
                f"The model takes {limit} tokens, and an export is compared with it on "
                f"{GREEDY_TOKENS + 1} and more.",
                "Export a model with more positions.",
            )
        length = min(PROMPT_TOKENS, limit - GREEDY_TOKENS)
        vocabulary = int(self.skeleton.model.config.vocab_size)
        ids = [] if self.tokenizer is None else tokenize(self.tokenizer, _PROMPT).tolist()
        ids = [token for token in ids if token < vocabulary]
        while len(ids) < length:  # no tokenizer, or one that made few tokens
            ids.append((7 + 13 * len(ids)) % vocabulary)
        return ids[:length]

    @cached_property
    def reference(self) -> Reference:
        """The prompt's logits and those of 32 greedy tokens, by transformers with its own cache.

        Of a model that is not in memory, no more than a block at a time is.
        """
        if "model" in vars(self):
            return _computed(self.model, self.prompt())
        with self.skeleton.running() as model:
            return _computed(model, self.prompt())


def _computed(model: Any, prompt: list[int]) -> Reference:  # noqa: ANN401
    rows: list[torch.Tensor] = []
    greedy: list[int] = []
    step = torch.tensor([prompt])
    keyword = cache_keyword(model)
    # From the config it would make windows for layers that are only named for one.
    slides = any(windows.sliding(model.config))
    cache = transformers.DynamicCache(config=model.config if slides else None)
    with torch.inference_mode():
        for _ in range(GREEDY_TOKENS):
            output = model(input_ids=step, use_cache=True, **{keyword: cache})
            rows.append(output.logits[0].float())
            greedy.append(int(rows[-1][-1].argmax()))
            step = torch.tensor([greedy[-1:]])
    return Reference(prompt, greedy, torch.cat(rows).numpy())


def cache_keyword(model: torch.nn.Module) -> str:
    """How the model's forward calls its KV cache: transformers 5.24 renamed the argument."""
    import inspect

    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _check_windows(config: Any, folder: Path) -> None:  # noqa: ANN401
    if windows.is_lacking(config):
        raise BadInput(
            f"{folder / 'config.json'} names layers with a sliding window (layer_types), and gives "
            "no window.",
            "Give its sliding_window, or name these layers full_attention.",
        )


def _check_causal(config: dict[str, Any], folder: Path) -> None:
    architectures = config.get("architectures") or []
    if not any(str(name).endswith("ForCausalLM") for name in architectures):
        names = ", ".join(map(str, architectures)) or "no architecture"
        raise BadInput(f"{folder} is no causal language model: its config.json names {names}.")
    if config.get("use_bidirectional_attention"):
        raise BadInput(
            f"The model in {folder} sees the tokens to come, too (use_bidirectional_attention).",
            "Only models that read from left to right are exported.",
        )
