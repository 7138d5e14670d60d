"""A model of the harness that several processes ask together."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("lm_eval.models", reason="pip install 'owl-deploy[eval]'")
from lm_eval.api.instance import Instance

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.shared import SharedModel
from owl_deploy.utils.ranks import ALONE, Ranks
from tests import alike


class Model:
    """Sees ten tokens, which are words, and answers with how many there were."""

    max_length = 10
    prefix_token_id = 7
    tokenizer = SimpleNamespace(decode=str)

    def tok_encode(self, text: str) -> list[str]:
        return text.split()

    def generate_until(self, requests: list[SimpleNamespace]) -> list[str]:
        return [str(len(self.tok_encode(one.args[0]))) for one in requests]


def requests(*lengths: int) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(task_name="one", doc_id=n, args=("a " * length, {"max_gen_toks": 4}))
        for n, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(("lengths", "cut"), [((1, 6), 0), ((6, 7, 30), 2)])
def test_what_the_window_cuts_is_told(
    capsys: pytest.CaptureFixture[str], lengths: tuple[int, ...], cut: int
) -> None:
    assert SharedModel(Model(), ALONE).generate_until(requests(*lengths)) == [*map(str, lengths)]
    told = " ".join(capsys.readouterr().err.split())
    assert told.startswith(f"{cut} of {len(lengths)} texts lose their beginnings" if cut else "")
    assert bool(told) == bool(cut)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"do_sample": True, "temperature": 1.0}, "The task samples"),
        ({"temperature": 1.5}, "The task samples"),  # to the harness a temperature says so
        ({"num_beams": 4}, "The task sets num_beams to 4"),
        ({"repetition_penalty": 1.2}, "The task sets repetition_penalty to 1.2"),
        ({"max_gen_toks": 0}, "The task asks for 0 tokens"),
    ],
)
def test_a_task_that_is_not_answered_greedily_is_refused(
    asked: dict[str, Any], complaint: str
) -> None:
    one = SimpleNamespace(task_name="one", doc_id=0, args=("a", {"max_gen_toks": 4, **asked}))
    with pytest.raises(BadInput, match=complaint):
        SharedModel(Model(), ALONE).generate_until([*requests(1), one])


def test_what_asks_for_nothing_is_taken() -> None:
    asked = {"max_gen_toks": 4, "do_sample": False, "temperature": 1.0, "top_p": 0.9}
    asked |= {"num_beams": 1, "until": ["."]}
    one = SimpleNamespace(task_name="one", doc_id=0, args=("a", asked))
    assert SharedModel(Model(), ALONE).generate_until([one]) == ["1"]


def test_a_context_without_a_token_begins_as_a_text_that_is_scored() -> None:
    texts = [
        Instance("generate_until", {}, (text, {"max_gen_toks": 4}), 0, ("one", n, 1))
        for n, text in enumerate(("", "a b"))
    ]
    assert SharedModel(Model(), ALONE).generate_until(texts) == ["1", "2"]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling"])
def test_a_likelihood_that_is_no_number_is_no_answer(kind: str) -> None:
    values = [-1.0, -math.inf, math.nan]

    def answer(requests: list[SimpleNamespace]) -> list[Any]:
        found = values[: len(requests)]
        return found if kind == "loglikelihood_rolling" else [(value, True) for value in found]

    model = SharedModel(SimpleNamespace(**{kind: answer}), ALONE)
    assert len(getattr(model, kind)(requests(1, 1))) == 2
    with pytest.raises(BadInput, match="log-likelihood of a text is nan"):
        getattr(model, kind)(requests(1, 1, 1))


def test_processes_that_have_other_documents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def asking(*lengths: int) -> Callable[[Ranks], object]:
        return lambda ranks: SharedModel(Model(), ranks).generate_until(requests(*lengths))

    said = alike.refused(monkeypatch, asking(1, 2), asking(2, 1))  # as if shuffled otherwise
    assert "Not all processes of this run have the same task data." in said
