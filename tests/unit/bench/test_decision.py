import math

import pytest

from owl_deploy.bench import decision
from owl_deploy.errors import BadInput
from tests.unit.bench.made import result


def option(name: str, speed: float, loss: float, *, dense: bool = False) -> decision.Option:
    return decision.Option(name, name, dense, speed, 15 ** (1 + loss), loss)


@pytest.mark.parametrize(
    ("text", "share"), [("2%", 0.02), ("0.02", 0.02), (" 0 % ", 0.0), ("150%", 1.5)]
)
def test_a_share_is_read(text: str, share: float) -> None:
    assert decision.read_loss(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "two", "-1%", "nan", "inf"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="such as 2%"):
        decision.read_loss(text)


def test_the_fastest_that_loses_no_more_is_chosen() -> None:
    every = [
        option("fp32", 50, 0.0, dense=True),
        option("int8", 200, 0.004, dense=True),
        option("int4", 260, 0.09, dense=True),
        option("half", 300, 0.28),
    ]
    names = [decision.choose(every, loss) for loss in (None, 0.0, 0.1, 0.5)]
    assert [one and one.name for one in names] == ["int8", "fp32", "int4", "half"]
    assert decision.choose([], None) is None


def test_losses_are_shares_of_the_best_dense_ones_log_perplexity() -> None:
    by_name = {option.name: option for option in decision.options(result())}
    assert by_name["dense-fp32"].loss == 0
    expected = math.log(16.2 / 13.7) / math.log(13.7)
    assert by_name["owl-50-deepsparse"].loss == pytest.approx(expected)


def test_sentences() -> None:
    # int8's 13.8 for 13.7 is a loss of 0.28 %: nothing that one would notice.
    assert decision.sentence(result()).startswith("Deploy dense-int8 (onnxruntime, int8): 54 ")
    said = decision.sentence(result(), 0.02)
    assert "the fastest here that loses at most 2 % of log-perplexity" in said
    assert "owl-50-deepsparse (deepsparse, fp32) is 1.0" in said
    assert "it would be the choice if that were 2 % or less" in said
    assert "Sparsity pays: it is 3.5" in decision.sentence(result(), 0.5)


def test_without_perplexities_nothing_is_said_to_deploy() -> None:
    made = result()
    blind = tuple(s.model_copy(update={"perplexity": None}) for s in made.subjects)
    said = decision.sentence(made.model_copy(update={"subjects": blind}))
    assert said.startswith("Nothing here says what to deploy")


def test_a_dense_candidate_that_wins_is_not_sparsity_s_merit() -> None:
    made = result()
    dense = [subject for subject in made.subjects if not subject.is_sparse]
    assert [subject.role for subject in dense] == ["baseline"] * len(dense)
    asked = dense[0].model_copy(update={"role": "candidate", "zeros": 0.12})
    found = made.model_copy(update={"subjects": (asked, *dense[1:])})
    assert all(option.dense for option in decision.options(found))
    assert "parsity pays" not in decision.sentence(found)
    # What another tool pruned has no blocks in a manifest of ours.
    assert asked.model_copy(update={"zeros": 0.5}).is_sparse
    assert not asked.model_copy(update={"zeros": None}).is_sparse
