"""A deployment as a language model of EleutherAI's lm-evaluation-harness, so that a task's number
is that of what will run. Its own class for Hugging Face models is the measure of what is right.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from owl_deploy.engines import EngineProcess
from owl_deploy.errors import BadInput
from owl_deploy.progress import bar

_SLICE = 16  # new tokens between two looks for a stop sequence
# What is scored: a key of the harness's own, the context's tokens, the continuation's.
_Request = tuple[Any, list[int], list[int]]


class DeploymentLM(TemplateLM):  # type: ignore[misc] # the harness has no types
    """Scores requests in a running engine, which was loaded with `all_logits`.

    A request is cut on the left to the last `max_length` tokens that the model is to see.
    """

    def __init__(self, process: EngineProcess, tokenizer: Any, max_length: int) -> None:  # noqa: ANN401
        super().__init__()
        self.process, self.tokenizer, self.max_length = process, tokenizer, max_length

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context: BOS, or EOS for want of one."""
        for token in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise BadInput("The tokenizer has neither a BOS nor an EOS token to begin a text with.")

    @property
    def tokenizer_name(self) -> str:
        """What the harness tells tokenizers apart by."""
        return str(self.tokenizer.name_or_path)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Messages in the chat template; without a prompt for an answer the last one goes on."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

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
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        wanted: dict[str, Any] = normalize_gen_kwargs(options)
        if wanted.get("do_sample"):
            raise BadInput("The task samples, and a deployment is evaluated greedily.")
        end = self.tokenizer.decode(self.eot_token_id)
        stops: list[str] = handle_stop_sequences(wanted.get("until"), eos=end)
        most = int(wanted["max_gen_toks"])
        room = self.max_length - most
        if room < 1:
            raise BadInput(
                f"The task generates {most} tokens, and the model is to see {self.max_length}.",
                "Give a larger --window.",
            )
        feed = self.tok_encode(context)[-room:]
        chosen: list[int] = []
        text = ""
        while len(chosen) < most:
            count = min(_SLICE, most - len(chosen))
            answer = self.process.request("greedy", tokens=feed, count=count, fresh=not chosen)
            chosen += answer["tokens"]
            feed = chosen[-1:]
            ended = self.eot_token_id in chosen
            if ended:
                chosen = chosen[: chosen.index(self.eot_token_id)]
            text = self.tokenizer.decode(chosen, skip_special_tokens=True)
            if ended or any(stop in text for stop in stops if stop):
                break
        cut: str = postprocess_generated_text(text, stops, None)
        return cut
