"""Two models by the same documents."""

import pytest
from rich.console import Console
from scipy.stats import binomtest

from owl_deploy.errors import BadInput
from owl_deploy.evaluate import run
from owl_deploy.evaluate.paired import LossPairs, Pairs, beside, losses_beside
from owl_deploy.evaluate.perplexity import Perplexity
from owl_deploy.evaluate.run import Evaluation, to_json
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.show import show
from owl_deploy.evaluate.zero_shot import Metric, TaskResult


def evaluation(name: str, solved: str) -> Evaluation:
    """What solves the problems with a 1 in `solved`."""
    answers = [
        {"problem": f"HumanEval/{number}", "answer": "", "passed": bit == "1", "why": ""}
        for number, bit in enumerate(solved)
    ]
    metrics = {"pass@1": Metric(solved.count("1") / len(solved), 0.1)}
    task = TaskResult(metrics, len(solved), 0, "1", "0", 64, "owl", answers=answers)
    return Evaluation(name, None, {"humaneval": task})


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 3), (9, 2), (2, 9), (400, 300)])
def test_the_p_value_is_the_binomial_tests(lost: int, won: int) -> None:
    expected = binomtest(lost, lost + won).pvalue if lost + won else 1.0
    assert Pairs(1000, lost, won).p_value == pytest.approx(expected)


def test_what_differs_is_counted_either_way() -> None:
    reference = {"a": True, "b": True, "c": False, "d": False}
    now = {"a": True, "b": False, "c": True, "d": True}
    assert beside(reference, now) == Pairs(4, lost=1, won=2)


def test_other_documents_are_no_pairs() -> None:
    assert beside({"a": True}, {"b": True}) is None
    assert beside({}, {}) is None


def test_a_difference_of_losses_is_of_the_pairs():
    """By hand: what differs is 0.1, 0.3, 0.2, though the windows themselves are nats apart."""
    found = losses_beside([1.0, 3.0, 2.0], [1.1, 3.3, 2.2])
    assert found is not None
    assert found.windows == 3
    assert found.difference == pytest.approx(0.2)
    assert found.stderr == pytest.approx(0.1 / 3**0.5)
    assert found.may_be_chance  # 3.5 standard errors, of 4.3 that three windows take
    assert not losses_beside([1.0, 3.0, 2.0] * 2, [1.1, 3.3, 2.2] * 2).may_be_chance
    assert losses_beside([1.0, 3.0], [1.1, 2.9]) == LossPairs(
        2, pytest.approx(0), pytest.approx(0.1)
    )
    assert losses_beside([1.0], [1.1]) is None


def with_losses(name: str, losses: tuple[float, ...], tokens: str = "same") -> Evaluation:
    """What loses that on each window of a text of these tokens."""
    text = Perplexity("t", 12.345, len(losses), 8, 7 * len(losses), tokens, losses)
    return Evaluation(name, text, {})


def test_a_loss_is_told_beside_the_firsts():
    found = [
        with_losses("dense", (1.0, 3.0, 2.0)),
        with_losses("sparse", (1.1, 3.15, 2.12)),
        with_losses("same", (1.1, 2.9, 2.0)),
        with_losses("other", (1.1, 2.9, 2.0), tokens="other"),
    ]
    console = Console(width=80)
    with console.capture() as told:
        show(found, console)
    assert told.get().splitlines()[4:] == [
        "sparse beside dense: +0.1233 ± 0.0145 nats a token over the same 3 windows.",
        "same beside dense: +0.0000 ± 0.0577 nats a token over the same 3 windows, which ",
        "may be chance.",
    ]
    dense, sparse, _, other = to_json(found)["models"]
    assert sparse["loss_beside_first"]["difference"] == pytest.approx(0.37 / 3)
    assert "loss_beside_first" not in dense | other


def test_each_model_is_told_beside_the_first() -> None:
    dense, sparse, same = "1" * 12, "1" * 4 + "0" * 8, "1" * 10 + "0" * 2
    found = [
        evaluation(f"models/{n}", s) for n, s in zip("abc", (dense, sparse, same), strict=True)
    ]
    console = Console(width=80)
    with console.capture() as told:
        show(found, console)
    lines = told.get().splitlines()
    assert lines[-3] == (
        "b beside a, humaneval: 8 of 12 lost, 0 won (exact McNemar test: p = 0.0078)."
    )
    assert "".join(lines[-2:]) == (
        "c beside a, humaneval: 2 of 12 lost, 0 won (exact McNemar test: p = 0.5, which "
        "may be chance)."
    )
    first, second, _ = to_json(found)["models"]
    assert "beside_first" not in first
    (pairs,) = second["beside_first"].values()
    assert pairs == {"documents": 12, "lost": 8, "won": 0, "p_value": pytest.approx(2 / 2**8)}
    assert to_json(found[:1]) == found[0].to_json()


def test_what_was_found_before_another_failed_is_said(monkeypatch, capsys):
    monkeypatch.setattr(run, "check_subject", lambda *_: None)
    monkeypatch.setattr(run, "_check_read", lambda *_: None)

    def perplexity(folder, *_):
        if folder.name == "bad":
            raise BadInput("It is damaged.")
        return Perplexity("t", 12.345, 1, 8, 7, "", (2.51,))

    monkeypatch.setattr(run, "perplexity", perplexity)
    with pytest.raises(BadInput, match="damaged"):
        run.evaluate(["good", "bad", "good"], EvaluationSettings(text="t"))
    assert "good: perplexity 12.35." in capsys.readouterr().err


@pytest.mark.parametrize("stopped", [BadInput("no"), MemoryError(), KeyboardInterrupt()])
def test_what_was_found_is_told_whatever_stops_the_next(stopped, capsys):
    with pytest.raises(type(stopped)), run._telling([with_losses("dense", (1.0, 3.0))]):
        raise stopped
    assert "perplexity 12.35" in capsys.readouterr().err
