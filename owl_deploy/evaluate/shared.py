"""A model of lm-evaluation-harness that several processes ask together."""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.subject import no_model_has
from owl_deploy.models import digests
from owl_deploy.utils.progress import error_console
from owl_deploy.utils.ranks import Ranks

# Of generation_kwargs what is done, or means nothing where no token is drawn; and the values by
# which others ask for nothing, such as num_beams: 1.
_HEEDED = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
_NOTHING = (0, 1, None)


class SharedModel:
    """The harness's `model`, which every rank has, answering on each the requests of its documents.

    All ranks ask for all requests, in one order, and get all answers: to the harness it is one
    process. That is the second of the two ways that its model class names. The first, to give a
    document to each rank as requests are built, draws other few-shot examples than one process.
    Each method raises `BadInput` where a rank has other requests: it would answer what the others
    did not ask.
    """

    def __init__(self, model: Any, ranks: Ranks) -> None:  # noqa: ANN401 - the harness has no types
        self._model, self._ranks = model, ranks

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._model, name)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """As the harness has it; raises `BadInput` where a log-likelihood is no number."""
        found = self._shared(requests, self._model.loglikelihood)
        _check_numbers(value for value, _ in found)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """As `loglikelihood`."""
        found = self._shared(requests, self._model.loglikelihood_rolling)
        _check_numbers(found)
        return found

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """As the harness has it; says first how many contexts will be cut.

        A context without a token begins as texts do that are scored. Raises `BadInput` for a task
        whose answers would not be the likeliest token each time, or have none.
        """
        for request in requests:
            _check_greedy(request.args[1])
        if self._ranks.leads:
            self._tell_what_is_cut(requests)
        begun = [self._begun(request) for request in requests]
        return self._shared(begun, self._model.generate_until)

    def _begun(self, request: Any) -> Any:  # noqa: ANN401
        context, options = request.args
        if context.strip() or self._model.tok_encode(context):
            return request
        begin = self._model.tokenizer.decode(self._model.prefix_token_id)
        return replace(request, arguments=(begin, options))

    def _tell_what_is_cut(self, requests: Sequence[Any]) -> None:
        """A task's text that is cut on the left asks for something else."""
        from lm_eval.models.utils import normalize_gen_kwargs

        window = self._model.max_length
        cut = sum(
            len(self._model.tok_encode(context)) + normalize_gen_kwargs(options)["max_gen_toks"]
            > window
            for context, options in (request.args for request in requests)
        )
        if cut:
            error_console().print(
                f"{cut} of {len(requests)} texts lose their beginnings: with room for an answer, "
                f"they do not fit into the {window} tokens that the model is to see (--window).",
                highlight=False,
            )

    def _shared(
        self, requests: Sequence[Any], answer: Callable[[list[Any]], Sequence[Any]]
    ) -> list[Any]:
        if self._ranks.size > 1:
            asked = [[one.task_name, one.doc_id, one.args] for one in requests]
            self._ranks.check_alike({"task data": digests.of_json(asked)})
        by_document = itertools.groupby(requests, lambda one: (one.task_name, one.doc_id))
        documents = [list(own) for _, own in by_document]  # with one context, which is read once

        def answered(mine: Sequence[list[Any]]) -> list[list[Any]]:
            flat = [request for document in mine for request in document]
            answers = iter(answer(flat) if flat else ())
            return [list(itertools.islice(answers, len(document))) for document in mine]

        return list(itertools.chain.from_iterable(self._ranks.shared(documents, answered)))


def _check_greedy(options: Mapping[str, Any]) -> None:
    """Of a task that asks for more a checkpoint would answer otherwise than its deployment does."""
    from lm_eval.models.utils import normalize_gen_kwargs

    asked = normalize_gen_kwargs(dict(options))
    if asked["do_sample"]:
        raise BadInput(
            "The task samples, and models are evaluated greedily.",
            "Set do_sample to false in its generation_kwargs.",
        )
    others = {name: value for name, value in asked.items() if value not in _NOTHING}
    beyond = [name for name in others if name not in _HEEDED]
    if beyond:
        raise BadInput(
            f"The task sets {beyond[0]} to {asked[beyond[0]]}, and models are evaluated greedily.",
            "Leave that out of its generation_kwargs.",
        )
    if asked["max_gen_toks"] < 1:
        raise BadInput(
            f"The task asks for {asked['max_gen_toks']} tokens.",
            "Set max_gen_toks to 1 or more in its generation_kwargs.",
        )


def _check_numbers(values: Iterable[float]) -> None:
    """Of NaN the first choice would be taken for the likeliest, and a share of those is right."""
    if any(math.isnan(value) for value in values):
        raise no_model_has("The model's log-likelihood of a text is nan")
