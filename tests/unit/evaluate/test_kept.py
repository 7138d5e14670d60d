from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.evaluate import kept
from owl_deploy.evaluate.kept import KeptAnswers
from owl_deploy.models.digests import state_of


@dataclass
class Request:
    args: tuple[str, dict[str, Any]]


@dataclass
class Model:
    """Answers in capitals; stops after `patience` answers, as a run that is killed."""

    patience: int = 99
    asked: list[str] = field(default_factory=list)
    rank: int = 7

    def answers(self, requests: list[Request]) -> Iterator[tuple[int, str]]:
        """The last one first."""
        for number, request in reversed(list(enumerate(requests))):
            self.patience -= 1
            if self.patience < 0:
                raise KeyboardInterrupt
            self.asked.append(request.args[0])
            yield number, self.answer(request)

    def answer(self, request: Request) -> str:
        return request.args[0].upper()


REQUESTS = [Request((letter, {"until": ["."]})) for letter in "abcde"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(kept, "cache_dir", lambda *_: tmp_path)
    return tmp_path


def test_a_run_that_was_ended_asks_only_for_the_rest(cache: Path) -> None:
    first = Model(patience=3)
    with pytest.raises(KeyboardInterrupt):
        KeptAnswers(first, "key").generate_until(REQUESTS)
    assert first.asked == ["e", "d", "c"]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-4])  # killed in the middle of a line
    second = Model()
    answers = KeptAnswers(second, "key")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert second.asked == ["c", "b", "a"]
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert second.asked == ["c", "b", "a"]


def test_two_at_once_leave_lines_that_can_be_read_over(cache: Path) -> None:
    KeptAnswers(Model(), "key").generate_until(REQUESTS[:2])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes() + b'swer"]\n7\n["half')
    model = Model()
    answers = KeptAnswers(model, "key")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert model.asked == ["e", "d", "c"]


def test_processes_write_apart_and_read_what_any_has_kept(cache: Path) -> None:
    KeptAnswers(Model(), "key", rank=0).generate_until(REQUESTS[:2])
    KeptAnswers(Model(), "key", rank=2).generate_until(REQUESTS[3:])
    (other,) = cache.glob("*-2.jsonl")
    half = other.read_bytes() + b'["half'
    other.write_bytes(half)  # that process is at it
    model = Model()
    answers = KeptAnswers(model, "key", rank=1)
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert model.asked == ["c"]
    assert other.read_bytes() == half
    assert len(list(cache.iterdir())) == 3
    answers.forget()
    assert not list(cache.iterdir())


def test_answers_to_other_questions_are_not_taken() -> None:
    KeptAnswers(Model(), "key").generate_until(REQUESTS)
    for key, requests in (
        ("another key", REQUESTS),
        ("key", [Request((one.args[0], {"until": ["!"]})) for one in REQUESTS]),
    ):
        model = Model()
        KeptAnswers(model, key).generate_until(requests)
        assert model.asked == list("edcba")


def test_forgotten_answers_are_asked_for_anew() -> None:
    model = Model()
    answers = KeptAnswers(model, "key")
    assert answers.generate_until(REQUESTS[:3]) == list("ABC")
    answers.forget()
    answers.forget()
    answers.generate_until(REQUESTS[:1])
    assert model.asked == ["c", "b", "a", "a"]
    assert answers.rank == 7  # the rest is the model's own


def test_a_folder_that_changed_has_another_state(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = state_of(tmp_path / "folder")
    (tmp_path / "folder" / "file").write_text("x")
    assert state_of(tmp_path / "folder") != before


def test_samples_of_one_question_are_several_answers() -> None:
    class Sampling(Model):
        def answer(self, request: Request) -> str:
            return f"{request.args[0]}{len(self.asked)}"

    model, repeated = Sampling(), [REQUESTS[0], REQUESTS[1], REQUESTS[0], REQUESTS[0]]
    answers = KeptAnswers(model, "key")
    assert answers.generate_until(repeated) == ["a4", "b3", "a2", "a1"]
    assert answers.generate_until(repeated) == ["a4", "b3", "a2", "a1"]
    assert model.asked == ["a", "a", "b", "a"]
