from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from owl_deploy.digests import state_of
from owl_deploy.evaluate import kept
from owl_deploy.evaluate.kept import KeptAnswers


@dataclass
class Request:
    args: tuple[str, dict[str, Any]]


@dataclass
class Model:
    """Answers in capitals; stops after `patience` answers, as a run that is killed."""

    patience: int = 99
    asked: list[str] = field(default_factory=list)
    rank: int = 7

    def generate_until(self, requests: list[Request], disable_tqdm: bool) -> list[str]:
        self.patience -= len(requests)
        if self.patience < 0:
            raise KeyboardInterrupt
        self.asked += [request.args[0] for request in requests]
        return [request.args[0].upper() for request in requests]


REQUESTS = [Request((letter, {"until": ["."]})) for letter in "abcde"]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(kept, "cache_dir", lambda *_: tmp_path)
    return tmp_path


def test_a_run_that_was_ended_asks_only_for_the_rest(cache: Path) -> None:
    first = Model(patience=3)
    with pytest.raises(KeyboardInterrupt):
        KeptAnswers(first, 1, "key").generate_until(REQUESTS)
    assert first.asked == ["a", "b", "c"]
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:-4])  # killed in the middle of a line
    second = Model()
    answers = KeptAnswers(second, 1, "key")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert second.asked == ["c", "d", "e"]
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert second.asked == ["c", "d", "e"]


def test_two_at_once_leave_lines_that_can_be_read_over(cache: Path) -> None:
    KeptAnswers(Model(), 1, "key").generate_until(REQUESTS[:2])
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes() + b'swer"]\n7\n["half')
    model = Model()
    answers = KeptAnswers(model, 1, "key")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert model.asked == ["c", "d", "e"]


def test_processes_write_apart_and_read_what_any_has_kept(cache: Path) -> None:
    KeptAnswers(Model(), 1, "key", rank=0).generate_until(REQUESTS[:2])
    KeptAnswers(Model(), 1, "key", rank=2).generate_until(REQUESTS[3:])
    (other,) = cache.glob("*-2.jsonl")
    half = other.read_bytes() + b'["half'
    other.write_bytes(half)  # that process is at it
    model = Model()
    answers = KeptAnswers(model, 1, "key", rank=1)
    assert answers.generate_until(REQUESTS) == list("ABCDE")
    assert model.asked == ["c"]
    assert other.read_bytes() == half
    assert len(list(cache.iterdir())) == 3
    answers.forget()
    assert not list(cache.iterdir())


def test_answers_to_other_questions_are_not_taken() -> None:
    KeptAnswers(Model(), 1, "key").generate_until(REQUESTS)
    for key, requests in (
        ("another key", REQUESTS),
        ("key", [Request((one.args[0], {"until": ["!"]})) for one in REQUESTS]),
    ):
        model = Model()
        KeptAnswers(model, 1, key).generate_until(requests)
        assert model.asked == list("abcde")


def test_a_batch_is_asked_for_at_once_and_forgotten_answers_anew() -> None:
    model = Model()
    answers = KeptAnswers(model, 2, "key")
    assert answers.generate_until(REQUESTS[:3]) == list("ABC")
    answers.forget()
    answers.forget()
    answers.generate_until(REQUESTS[:1])
    assert model.asked == ["a", "b", "c", "a"]
    assert answers.rank == 7  # the rest is the model's own


def test_a_folder_that_changed_has_another_state(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    before = state_of(tmp_path / "folder")
    (tmp_path / "folder" / "file").write_text("x")
    assert state_of(tmp_path / "folder") != before


def test_samples_of_one_question_are_several_answers() -> None:
    class Sampling(Model):
        def generate_until(self, requests: list[Request], disable_tqdm: bool) -> list[str]:
            super().generate_until(requests, disable_tqdm)
            return [f"{one.args[0]}{len(self.asked)}" for one in requests]

    model, repeated = Sampling(), [REQUESTS[0], REQUESTS[1], REQUESTS[0], REQUESTS[0]]
    answers = KeptAnswers(model, 1, "key")
    assert answers.generate_until(repeated) == ["a1", "b2", "a3", "a4"]
    assert answers.generate_until(repeated) == ["a1", "b2", "a3", "a4"]
    assert model.asked == ["a", "b", "a", "a"]
