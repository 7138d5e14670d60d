"""Clients against a server made by hand, whose every text and failure is known."""

import asyncio
import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice

import pytest

from owl_deploy.bench import BenchPlan, clients, measure, run_bench
from owl_deploy.bench.clients import Load, ask_all
from owl_deploy.bench.prompts import WORDS, other_words, tokens_of
from owl_deploy.errors import BadInput
from owl_deploy.inference import ENGINES, ServerProcess
from tests import by_hand, tiny
from tests.unit.inference.test_engine_server import ROW

PROMPTS = [f"prompt {number}" for number in range(6)]


@pytest.fixture
def says(tmp_path, monkeypatch):
    """Makes a deployment whose server behaves so."""
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["fake"], server=ROW))

    def make(name="a", **behaviour):
        folder = tmp_path / name
        folder.mkdir()
        tiny.write_tokenizer(folder)
        (folder / "fake.json").write_text('{"decode_ms": 1}')
        (folder / "server.json").write_text(json.dumps(behaviour))
        return folder

    return make


@contextmanager
def load_of(folder, tokens=4, **more):
    with ServerProcess("fake", folder, rows=3, context=8) as server:
        yield Load(server.url, server.model, tokens, **more)


def ask(load, clients=3, prompts=PROMPTS):
    return asyncio.run(ask_all(load, clients, iter(prompts)))


def test_each_prompt_is_asked_once_and_texts_are_timed(says):
    folder = says(first_s=0.1, between_s=0.03)
    with load_of(folder, key="secret") as load:
        tally = ask(load)
    assert (tally.answered, tally.tokens, tally.errors, tally.refused) == (6, 24, [], 0)
    assert (len(tally.first_s), len(tally.between_s)) == (6, 18)
    assert min(tally.first_s) >= 0.1
    # A text that is late is near the next one, so only the sum has a least value.
    assert sum(tally.first_s + tally.between_s) >= 6 * (0.1 + 3 * 0.03)
    assert tally.wall_s >= 2 * (0.1 + 3 * 0.03)
    _, bodies = by_hand.asked(folder)
    assert sorted(body["prompt"] for body in bodies) == PROMPTS
    for body in bodies:
        assert (body["path"], body["key"]) == ("/v1/completions", "Bearer secret")
        asked = {name: body[name] for name in ("model", "max_tokens", "temperature", "stream")}
        assert asked == {"model": "a", "max_tokens": 4, "temperature": 0, "stream": True}
        assert (body["ignore_eos"], body["cache_prompt"]) == (True, False)


def test_answers_may_differ_in_length_each_client_in_its_own_way(says):
    folder = says()
    with load_of(folder, tokens=3, varied=True) as load:
        assert ask(load, 2, [f"prompt {number}" for number in range(40)]).answered == 40
    _, bodies = by_hand.asked(folder)
    assert {body["max_tokens"] for body in bodies} == {1, 2, 3, 4, 5}


def test_so_many_clients_ask_at_once(says):
    with load_of(says("one", first_s=0.1)) as load:
        assert ask(load, 1, PROMPTS[:2]).wall_s >= 2 * 0.1
    with load_of(says("six", at_once=6)) as load:
        tally = ask(load, 6)
    assert (tally.answered, tally.errors) == (6, [])


@pytest.mark.parametrize("counts", [True, False])
def test_a_short_answer_counts_for_what_it_has(says, counts):
    with load_of(says(texts=3, usage=counts), 64) as load:
        tally = ask(load)
    assert (tally.answered, tally.tokens) == (6, 18)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("status", "500 a word"),
        ("error", "no memory"),
        ("break", "an answer that breaks off"),
    ],
)
def test_what_goes_wrong_is_an_error_and_no_answer(says, fails, said):
    with load_of(says(fails=fails)) as load:
        tally = ask(load)
    assert (tally.answered, tally.tokens, len(tally.errors)) == (0, 0, 6)
    assert said in tally.errors[0]


def test_an_answer_without_a_token_is_an_error(says):
    with load_of(says(texts=0)) as load:
        assert ask(load).errors == ["ValueError: an answer without a token"] * 6


def test_a_server_that_is_gone_is_an_error(says):
    with load_of(says()) as load:
        pass
    tally = ask(load)
    assert len(tally.errors) == 6
    assert "ConnectError" in tally.errors[0]


def test_who_is_refused_waits_and_asks_the_next(says):
    with load_of(says(fails="refuse")) as load:
        tally = ask(load)
    assert (tally.refused, tally.answered, tally.errors) == (3, 3, [])


def test_clients_that_leave_have_heard_a_text(says):
    with load_of(says(), leave=1.0) as load:
        tally = ask(load)
    assert (tally.left, tally.answered, len(tally.first_s), tally.between_s) == (6, 0, 6, [])


def plan(*folders, **more):
    settings = {"scenarios": ("requests@40+8x2",), "pairs": 1, "repeats": 3, **more}
    return BenchPlan(candidates=folders[:1], baselines=folders[1:], **settings)


def test_the_scenario_counts_tokens_and_so_a_short_answer_is_not_a_fast_one(says, monkeypatch):
    whole, short = says("whole", first_s=0.1), says("short", first_s=0.06, texts=2)
    took = []

    async def timed(*asked):
        tally = await ask_all(*asked)
        took.append(1e3 * tally.wall_s)
        return tally

    monkeypatch.setattr(clients, "ask_all", timed)
    result = run_bench(plan(whole, short))
    assert result.failures == []
    keys = [f"requests@40+8x2:{part}" for part in ("answer", "first", "text")]
    assert list(result.statistics) == keys
    (sample,) = result.subjects[0].samples
    assert [len(sample.latencies_ms[key]) for key in keys] == [1, 6, 6 * 7]
    assert sample.load_s > 0
    assert sample.peak_bytes > 1_000_000
    # Two clients at once: whole answers take 100 ms or more, quarters of one 60.
    rows = result.statistics[keys[0]]
    assert rows["whole"]["median_ms"] >= 100 / 2
    assert rows["short"]["median_ms"] >= 60 / 2 * 4
    _, whole_ms, _, short_ms = took  # of six answers, after each client has had one
    assert rows["whole"]["median_ms"] == pytest.approx(whole_ms / 6)
    assert rows["short"]["median_ms"] == pytest.approx(short_ms / 6 * 4)
    assert rows["whole"]["tokens_per_s"] == pytest.approx(8e3 / rows["whole"]["median_ms"])
    for name in ("whole", "short"):
        started, bodies = by_hand.asked(whole.parent / name)
        assert started["arguments"][:2] == ["2", "512"]
        prompts = [body["prompt"] for body in bodies]
        assert len(set(prompts)) == len(prompts) == 2 + 6  # each client warms it up once
    assert {c.scenario for c in result.comparisons} == set(keys)


@pytest.mark.parametrize(
    ("behaviour", "settings", "said"),
    [
        ({"fails": "status"}, {}, "bad's server failed: ValueError: 500 a word"),
        ({"fails": "refuse"}, {}, "bad's server failed: 429 Too Many Requests"),
        ({"first_s": 60}, {"time_limit_s": 6}, "bad's server did not answer within 6 s"),
        ({"fails": "end"}, {}, "no such model"),
    ],
)
def test_a_server_that_fails_keeps_the_others_results(says, monkeypatch, behaviour, settings, said):
    def patient(*asked, **options):  # the limit is for answers: a busy machine starts slowly
        return ServerProcess(*asked, **options | {"timeout_s": 60})

    monkeypatch.setattr(measure, "ServerProcess", patient)
    result = run_bench(plan(says("bad", **behaviour), says("good"), **settings))
    (failure,) = result.failures
    assert said in failure
    assert len(result.subjects[1].samples) == 1


def test_answers_of_one_text_have_no_later_ones_to_time(says):
    result = run_bench(plan(says("brief", texts=1)))
    assert result.failures == []
    assert any("brief, requests@40+8x2:text: each answer ended" in note for note in result.notes)
    assert "requests@40+8x2:first" in result.statistics


def test_servers_are_measured_beside_engines(says):
    mixed = ("decode@128", "requests@40+8x2", "decode@128x2", "requests@40+8x1", "throughput@512x2")
    found = run_bench(plan(says(), scenarios=mixed))
    assert found.failures == []
    assert [scenario.key for scenario in found.scenarios] == [
        *("decode@128", "requests@40+8x2", "decode@128x2", "requests@40+8", "throughput@512x2")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenarios": ("requests",), "clients": 0}, "--clients 0 is too small"),
        ({"scenarios": ("requests@40+8x0",)}, "--scenario requests@40.8x0 is none"),
        ({"scenarios": ("requests@40",)}, "--scenario requests@40 is none"),
        ({"scenarios": ("requests@0+8",)}, "--prompt 0 is too small"),
        ({"scenarios": ("requests@1+8",)}, "--prompt 1 is too small for a word"),
        ({"scenarios": ("requests@250+8",)}, "requests@250.8 is more than the 256 tokens"),
        ({"scenarios": ("requests",), "prompt": 250, "new_tokens": 8}, "Give --prompt 248 or less"),
    ],
)
def test_what_cannot_be_asked_is_said_before_a_server_starts(says, settings, message):
    folder = says()
    (folder / "owl.json").write_text(json.dumps({"target": "fake", "max_context": 256}))
    with pytest.raises(BadInput, match=message):
        run_bench(plan(folder, **settings))
    assert not (folder / "asked.jsonl").exists()


def test_an_engine_without_a_server_is_refused(says, monkeypatch):
    folder = says()
    monkeypatch.setitem(ENGINES, "fake", replace(ENGINES["fake"], server=None))
    with pytest.raises(BadInput, match="'fake' has no server"):
        run_bench(plan(folder))


def test_as_many_words_as_the_tokens_hold(says):
    folder = says()
    one, two = (list(islice(other_words(folder, 40, seed), 50)) for seed in (0, 0))
    assert one == two
    assert len(set(one)) == 50
    lengths = [len(tokens) for tokens in tokens_of(tuple(one), folder, 40)]
    longest = max(len(tokens) for tokens in tokens_of(tuple(f" {w}" for w in WORDS), folder, 40))
    assert 40 - longest < min(lengths) <= max(lengths) == 40


def test_what_is_asked_is_awaited_here_and_apart_where_a_loop_runs():
    async def thread():
        return threading.current_thread()

    async def within():
        return measure._awaited(thread())

    assert measure._awaited(thread()) is threading.current_thread()  # where Ctrl-C comes
    assert asyncio.run(within()) is not threading.current_thread()
