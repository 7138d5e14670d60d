"""A deployment as a language model of EleutherAI's lm-evaluation-harness, so that a task's number
is that of what will run. Its own class for Hugging Face models is the measure of what is right.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from owl_deploy.data.json_lines import in_template
from owl_deploy.data.text import token_before
from owl_deploy.errors import BadInput
from owl_deploy.inference import EngineProcess
from owl_deploy.utils.progress import bar

_SLICE = 8  # new tokens between two looks for a stop sequence
# What is scored: a key of the harness's own, the context's tokens, the continuation's.
_Request = tuple[Any, list[int], list[int]]


class DeploymentLM(TemplateLM):  # type: ignore[misc] # the harness has no types
    """Answers requests in a running engine, which was loaded with `all_logits`, or with `places`.

    A request is cut on the left to the last `max_length` tokens that the model is to see. With
    places so many texts are written side by side, and nothing can be scored. A text ends at any of
    `ends`, and at the tokenizer's own.
    """

    def __init__(
        self,
        process: EngineProcess,
        tokenizer: Any,  # noqa: ANN401 - transformers' tokenizers share no type
        max_length: int,
        places: int = 0,
        ends: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.process, self.tokenizer, self.max_length = process, tokenizer, max_length
        self.places, self.ends = places, ends

    @property
    def eot_token_id(self) -> int:
        """What ends a text: the tokenizer's, or for want of one the deployment's."""
        return end_of(self.tokenizer, self.ends)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS for want of one."""
        return prefix_of(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells tokenizers apart by."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages in the chat template; without a prompt for an answer the last one goes on."""
        return in_template(
            "The task",
            chat_history,
            self.tokenizer,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        **_: Any,  # noqa: ANN401
    ) -> list[int]:
        """The tokens of a text, with the special ones unless it begins with one."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self.tokenizer.decode(self.prefix_token_id))
        tokens: list[int] = self.tokenizer.encode(string, add_special_tokens=add_special_tokens)
        return tokens

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """As the harness has it; the only progress shown is our own."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self,
        requests: Sequence[_Request],
        **_: Any,  # noqa: ANN401
    ) -> list[tuple[float, bool]]:
        """For each request the sum of its log-probabilities, in nats, and whether it is greedy.

        Requests with one context go to the engine together, which then reads it once.
        """
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (_key, context, target) in enumerate(requests):
            if len(target) > self.max_length:
                raise BadInput(
                    f"A continuation has {len(target)} tokens, and the model is to see "
                    f"{self.max_length}.",
                    "Give a larger --window.",
                )
            if target:
                # The last token is predicted and never read: one more than max_length is no harm.
                seen = (context + target)[-(self.max_length + 1) : -len(target)]
                groups.setdefault(tuple(seen), []).append(index)
        with bar("Scoring", len(requests)) as advance:
            for seen_tokens, members in groups.items():
                targets = [requests[index][2] for index in members]
                answer = self.process.request(
                    "continuations", context=list(seen_tokens), targets=targets
                )
                for index, values, greedy in zip(
                    members, answer["logprobs"], answer["greedy"], strict=True
                ):
                    found[index] = (sum(values), greedy)
                advance(len(members))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of each whole text, in windows of `max_length`, each token once."""
        windows: list[_Request] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            rolled = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            own = [(None, *make_disjoint_window(pair)) for pair in rolled]
            windows += own
            owners += [index] * len(own)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += value
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """The greedy continuation of each context, up to a stop sequence or the end of text."""
        return [answer for _, answer in sorted(self.answers(requests))]

    def answers(self, requests: Sequence[Any]) -> Iterator[tuple[int, str]]:
        """What `generate_until` returns, each with its request's number, as they come."""
        texts = [self._begun(*request.args) for request in requests]
        if self.places:
            yield from self._side_by_side(texts)
            return
        for number, text in enumerate(texts):
            self._write(text)
            yield number, text.cut()

    def _begun(self, context: str, options: dict[str, Any]) -> "_Text":
        wanted: dict[str, Any] = normalize_gen_kwargs(options)
        end = self.tokenizer.decode(self.eot_token_id)
        stops: list[str] = handle_stop_sequences(wanted.get("until"), eos=end)
        most = int(wanted["max_gen_toks"])
        room = self.max_length - most
        if room < 1:
            raise BadInput(
                f"The task generates {most} tokens, and the model is to see {self.max_length}.",
                "Give a larger --window.",
            )
        prompt = self.tok_encode(context)[-room:]
        return _Text(self.tokenizer, prompt, stops, most, {self.eot_token_id, *self.ends})

    def _write(self, text: "_Text") -> None:
        """Write one to its end, in a cache of its own."""
        feed = text.prompt
        while not text.ended:
            count = min(_SLICE, text.room)
            answer = self.process.request("greedy", tokens=feed, count=count, fresh=not text.chosen)
            text.take(answer["tokens"])
            feed = text.chosen[-1:]

    def _side_by_side(self, texts: "Sequence[_Text]") -> Iterator[tuple[int, str]]:
        """Write all to their ends: where one ends, the next begins."""
        waiting = enumerate(texts)
        written: dict[int, _Text] = {}
        while True:
            keep = [*written]
            written |= islice(waiting, self.places - len(written))
            if not written:
                return
            begin = [(number, text.prompt) for number, text in written.items() if not text.chosen]
            room = min(text.room - (not text.chosen) for text in written.values())
            answer = self.process.request(
                "together", count=min(_SLICE, room), keep=keep, begin=begin
            )
            for number, tokens in answer["tokens"]:
                written[number].take(tokens)
            for number in [number for number, text in written.items() if text.ended]:
                yield number, written.pop(number).cut()


def going_on(tokenizer: Any, tokens: Sequence[int]) -> str:  # noqa: ANN401
    """The text of `tokens` that go on from others."""
    before = token_before(tokenizer)
    whole: str = tokenizer.decode([*before, *tokens], skip_special_tokens=True)
    return whole[len(tokenizer.decode(before, skip_special_tokens=True)) :]


@dataclass
class _Text:
    """What comes after a `prompt`: tokens, until one is of `ends`, one of `stops` is in the text,
    or there are `most`.
    """

    tokenizer: Any
    prompt: list[int]
    stops: list[str]
    most: int
    ends: Collection[int]
    chosen: list[int] = field(default_factory=list)
    ended: bool = False
    _text: str = ""

    @property
    def room(self) -> int:
        """How many more tokens there may be."""
        return self.most - len(self.chosen)

    def take(self, tokens: Sequence[int]) -> None:
        """Add the `tokens` that come next, as far as there is room."""
        self.chosen += tokens[: self.room]
        end = next((i for i, token in enumerate(self.chosen) if token in self.ends), None)
        told = self.chosen[:end]
        self._text = going_on(self.tokenizer, told)
        stopped = any(stop in self._text for stop in self.stops if stop)
        self.ended = stopped or len(told) < len(self.chosen) or not self.room

    def cut(self) -> str:
        """The text before whatever ended it."""
        text: str = postprocess_generated_text(self._text, self.stops, None)
        return text


def prefix_of(tokenizer: Any) -> int:  # noqa: ANN401
    """The BOS token, or EOS for want of one; raises `BadInput` where there is neither."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise BadInput("The tokenizer has neither a BOS nor an EOS token to begin a text with.")


def end_of(tokenizer: Any, ends: Collection[int]) -> int:  # noqa: ANN401
    """The EOS token, or for want of one a model's own of `ends`; raises `BadInput` without any."""
    found = tokenizer.eos_token_id
    found = min(ends, default=None) if found is None else found
    if found is None:
        raise BadInput("Neither the tokenizer nor the model has a token that ends a text.")
    return int(found)
