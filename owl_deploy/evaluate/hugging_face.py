"""A checkpoint as the harness has it, asked as a deployment is."""

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM
from transformers import GenerationConfig

from owl_deploy.evaluate.harness import end_of, going_on, prefix_of


class CheckpointLM(HFLM):  # type: ignore[misc] # the harness has no types
    """The harness's own class for a `model` of transformers, with three things made right.

    It takes the likeliest token and nothing else: `generate` would heed a repetition penalty of the
    model's generation_config.json in greedy search, too. And a text that goes on from another keeps
    its first space. And a tokenizer without the tokens that a task needs is refused in words.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        tokenizer: Any,  # noqa: ANN401
        max_length: int,
        batch: int,
    ) -> None:
        told = model.generation_config
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{name: getattr(told, name) for name in names})
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch,
            softmax_dtype="float32",
        )

    @property
    def eot_token_id(self) -> int:
        """What ends a text: the tokenizer's, or for want of one the model's."""
        told = self.model.generation_config.eos_token_id
        ends = told if isinstance(told, list) else [] if told is None else [told]
        return end_of(self.tokenizer, ends)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        return prefix_of(self.tokenizer)

    def answers(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """What `generate_until` returns, each with its request's number, a batch at a time."""
        for start in range(0, len(requests), self.batch_size):
            some = list(requests[start : start + self.batch_size])
            yield from enumerate(self.generate_until(some, disable_tqdm=True), start)

    def tok_decode(self, tokens: int | Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of what was generated; with special tokens, of a token by itself."""
        if skip_special_tokens and not isinstance(tokens, int):
            return going_on(self.tokenizer, tokens)
        text: str = super().tok_decode(tokens, skip_special_tokens)
        return text
