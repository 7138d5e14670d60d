"""The prompts of `owl bench --scenario answers`, and what the worker makes of them."""

import json

import pytest

from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.prompts import read_prompts, tokens_of
from owl_deploy.errors import BadInput
from owl_deploy.inference import open_deployment
from owl_deploy.inference.speculate import Tally
from owl_deploy.inference.worker import Worker
from tests import tiny


@pytest.fixture
def fake(tmp_path):
    """A deployment with a tokenizer that runs nowhere."""
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "fake.json").write_text('{"vocab": 320}')
    (tmp_path / "config.json").write_text('{"eos_token_id": [1, 7]}')
    return open_deployment(tmp_path)


def test_prompts_are_read_from_json_lines_or_are_the_shipped_ones(tmp_path, fake):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The river", "more": 1}\n\n{"prompt": "x"}\n')
    assert read_prompts(file) == ("The river", "x")
    file.write_text('{"prompt": "One\u2028line"}', encoding="utf-8")
    assert read_prompts(file) == ("One\u2028line",)
    shipped = read_prompts(None)
    assert len(set(shipped)) == len(shipped) > 4
    found = tokens_of(("The river", "x"), fake.path, 20)
    assert [len(tokens) for tokens in found] == [len(found[0]), 1]
    assert fake.ends == [1, 7]


@pytest.mark.parametrize(
    "content",
    [
        *(None, "", "x", "[]", '{"text": "x"}', '{"prompt": 3}'),
        *("[" * 10**5, '{"prompt": "a\\ud800b"}'),
    ],
    ids=lambda content: str(content)[:20],
)
def test_what_holds_no_prompts_is_said_in_a_sentence(tmp_path, content):
    file = tmp_path / "prompts.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BadInput, match=r"prompts") as told:
        read_prompts(file)
    assert '{"prompt": "Once"}' in str(told.value)


def test_prompts_must_leave_room(fake):
    room = len(tokens_of(("The river ran",), fake.path, 99)[0])
    assert tokens_of(("The river ran",), fake.path, room)
    with pytest.raises(BadInput, match=f"longest prompt has {room} tokens, and {room - 1} leave"):
        tokens_of(("The river ran", "x"), fake.path, room - 1)
    (fake.path / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        tokens_of(("x",), fake.path, 9)


def test_a_draft_is_measured_on_answers_alone(fake):
    asked = {"candidates": (fake.path,), "draft": "lookup"}
    with pytest.raises(BadInput, match="real prompts"):
        BenchPlan(**asked, scenarios=("decode",)).described()
    assert [one.key for one in BenchPlan(**asked).described()] == ["answers@64"]
    assert BenchPlan(**asked | {"draft": fake.path}).draft == str(fake.path)
    plan = BenchPlan(**asked, scenarios=("answers",), new_tokens=9, context=(77,))
    (scenario,) = plan.described()
    assert (scenario.key, scenario.context) == ("answers@9", 77)
    # So it is by its key, which cannot name a file of prompts.
    keyed = BenchPlan(**asked, scenarios=("answers@9",), prompts=fake.path / "prompts")
    assert [one.key for one in keyed.described()] == ["answers@9"]
    assert [metric.answer for metric in scenario.metrics] == ["token_ms", "first_ms"]


class Counting:
    """A decoder that counts upwards from the prompt's last token, 1 s a prompt, 10 ms a token."""

    def __init__(self):
        self.now, self.resets = 0.0, 0

    def reset(self):
        self.resets += 1

    def restart(self):
        return Tally(steps=2, proposed=4, accepted=3, made=5)

    def prompt(self, tokens):
        self.now += 1
        self.last = tokens[-1] + 1
        return self.last

    def next(self):
        self.now += 0.01
        self.last += 1
        return self.last


def test_answers_end_and_are_timed_together():
    decoder = Counting()
    driver = type("Driver", (), {"streams": [decoder], "clock": lambda _: decoder.now})()
    found = Worker(driver).answers([[1], [5, 20], [7]], count=4, ends=[4, 8])
    assert found["tokens"] == [[2, 3, 4], [21, 22, 23, 24], [8]]
    assert found["first_ms"] == pytest.approx([1000] * 3)
    assert found["token_ms"] == pytest.approx([10])
    assert decoder.resets == 4
    assert found["draft"]["tokens_per_step"] == 2.5
    assert json.dumps(found)
    assert Worker(driver).answers([[7]], count=4, ends=[8], warm=False)["token_ms"] == []
    assert decoder.resets == 5
