"""Requests in line, before a model that goes on only when a test says so."""

import ctypes
import json
import re
import signal
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx2 as httpx
import openai
import pytest

from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.inference.rows import PromptTooLong, Row
from owl_deploy.inference.speculate import Search
from owl_deploy.serve import protocol, server
from owl_deploy.serve.log import RequestLog

PATIENCE = 60  # seconds: the machine may be busy


class PanicError(BaseException):
    """What Rust's are in Python: no `Exception`."""


class FakeWriter:
    """Says a letter in each row for each `go`; `seen`: prompts and rows, as they were begun."""

    def __init__(self, batch=1):
        self.batch, self.context, self.usual = batch, 100, Search()
        self.go = threading.Semaphore(0)
        self.rows, self.seen = {}, []
        self.line, self.template = None, "{{ messages }}"

    @property
    def waiting(self):
        """How many stand in line before it."""
        return len(self.line._line)

    @property
    def running(self):
        """The prompts whose answers are being made."""
        return [prompt for prompt, row in self.rows.items() if not row.ended]

    @property
    def chat_template(self):
        return SimpleNamespace(source=self.template, render=self.rendered)

    def rendered(self, messages):
        if messages[0]["role"] == "tool":
            raise BadInput("The model's chat template does not take these messages (no such role).")
        return "|".join(f"{one['role']}: {one['content']}" for one in messages)

    def row(self, prompt, sampling, speed, *, templated):
        if prompt == "too long":
            raise PromptTooLong("The prompt is too long.", "A hint for the command line.")
        if prompt == "one word":
            raise BadInput("The word is too long.", "A hint for the command line.")
        self.templated = templated
        speed.prompt_tokens = len(prompt)
        speed.cached_tokens = 2 if prompt.startswith("anew") else 0
        search = sampling.search(self.usual)
        return Row([prompt], 1 + sampling.max_new_tokens, sampling, speed, search=search)

    def add(self, row):
        assert len(self.running) < self.batch
        self.rows[row.tokens[0]] = row
        self.seen.append((row.tokens[0], row))

    def step(self):
        if not self.running:
            return {}
        assert self.go.acquire(timeout=PATIENCE)
        live = [row for row in self.rows.values() if not row.ended]
        fails = {"fails": EngineFailed("a secret path"), "panics": PanicError("a secret")}
        for row in live:
            if row.tokens[0] in fails and row.speed.new_tokens == 1:
                for one in live:
                    one.ended = True
                raise fails[row.tokens[0]]
        for row in live:
            row.take("abcdefghij"[row.speed.new_tokens], 0.0)
        return {row: row.tokens[-1] for row in live}


@pytest.fixture
def writer(request):
    return FakeWriter(getattr(request, "param", 1))


@contextmanager
def served(writer, waiting=1, key=None, names=("tiny",), say=lambda _: None, **settings):
    """The service in a thread; its base URL. `settings`: of uvicorn."""
    service = server.Service(writer, names, waiting, key)
    writer.line = service._line
    logged = RequestLog(service.app(), say)
    running = server._http_server(logged, **{"log_level": "critical", **settings})
    writer.end = lambda: setattr(running, "should_exit", True)
    writer.interrupt = lambda: running.handle_exit(signal.SIGINT, None)
    with server._listen("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        finally:
            for _ in range(100):
                writer.go.release()
            running.should_exit = True
            thread.join(PATIENCE)


@pytest.fixture
def url(writer):
    with served(writer) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=PATIENCE) as client:
        yield client


def until(condition):
    ends = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


def ask(client, prompt, tokens=3, **more):
    return client.completions.create(model="tiny", prompt=prompt, max_tokens=tokens, **more)


def wire_form(prompt, tokens, **more):
    """Head and body of a request."""
    body = json.dumps({"model": "tiny", "prompt": prompt, "max_tokens": tokens, **more}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\n"
        f"content-length: {len(body)}\r\ncontent-type: application/json\r\n\r\n"
    )
    return head.encode(), body


@contextmanager
def asking(url, *request, **more):
    """A client that asks, and goes away when the block ends.

    Not when a time is over, in which a busy machine may not even have heard of it.
    """
    place = httpx.URL(url)
    with socket.create_connection((place.host, place.port), timeout=PATIENCE) as client:
        client.sendall(b"".join(wire_form(*request, **more)))
        yield


def prompts_of(writer):
    return [prompt for prompt, _ in writer.seen]


def in_background(call):
    """A list to which `call`'s result, or its error, is added."""
    found = []

    def run():
        try:
            found.append(call())
        except Exception as error:
            found.append(error)

    threading.Thread(target=run).start()
    return found


def test_requests_are_answered_one_after_another_and_a_full_line_says_when_to_return(
    writer, client
):
    first = in_background(lambda: ask(client, "first"))
    until(lambda: writer.running == ["first"])
    second = in_background(lambda: ask(client, "second"))
    until(lambda: writer.waiting)
    with pytest.raises(openai.RateLimitError) as refused:
        ask(client, "third")
    assert refused.value.response.headers["retry-after"] == "1"
    assert refused.value.code == "rate_limit_exceeded"
    assert writer.running == ["first"]
    for _ in range(6):
        writer.go.release()
    until(lambda: first and second)
    assert [found.choices[0].text for found in (*first, *second)] == ["abc", "abc"]
    assert prompts_of(writer) == ["first", "second"]
    assert first[0].usage.model_dump(exclude_none=True) == {
        "prompt_tokens": 5,
        "completion_tokens": 3,
        "total_tokens": 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_whoever_has_an_answer_may_ask_again_though_nobody_may_wait(writer):
    how = {"api_key": "-", "max_retries": 0, "timeout": PATIENCE}
    with served(writer, waiting=0) as url, openai.OpenAI(base_url=url, **how) as client:
        writer.go.release(6)
        assert [ask(client, name).choices[0].text for name in ("a", "b")] == ["abc", "abc"]


def test_what_is_known_of_a_prompt_is_told_and_need_not_be_used(writer, client):
    writer.go.release(2)
    for anew, more in ((False, {}), (True, {"cache_prompt": False})):
        answer = ask(client, f"anew: {anew}", 1, extra_body=more)
        assert answer.usage.prompt_tokens_details.cached_tokens == 2
        assert writer.seen[-1][1].anew is anew


def all_ask(writer, client, prompts, **more):
    """Ask while a first request is being answered, so that all of them wait; then answer that."""
    first = in_background(lambda: ask(client, "first", 1))
    until(lambda: writer.running == ["first"])
    answers = {}
    for number, prompt in enumerate(prompts, start=1):
        how = more.get(prompt, {})
        answers[prompt] = in_background(lambda prompt=prompt, how=how: ask(client, prompt, **how))
        until(lambda number=number: writer.waiting == number)  # they come in this order
    writer.go.release(1)
    until(lambda: first)
    return answers


@pytest.mark.parametrize("writer", [4], indirect=True)
def test_what_waits_is_answered_together_each_to_its_own_end(writer):
    with served(writer, waiting=8) as url, openai.OpenAI(base_url=url, api_key="-") as client:
        how = {"short": {"tokens": 1}, "stops": {"tokens": 9, "stop": "cd"}, "long": {"tokens": 6}}
        answers = all_ask(writer, client, how, **how)
        writer.go.release(1)
        until(lambda: answers["short"])
        assert writer.running == ["stops", "long"]
        writer.go.release(3)
        until(lambda: answers["stops"])
        assert writer.running == ["long"]
        writer.go.release(2)
        until(lambda: answers["long"])
    said = {name: found[0].choices[0] for name, found in answers.items()}
    assert {name: (one.text, one.finish_reason) for name, one in said.items()} == {
        "short": ("a", "length"),
        "stops": ("ab", "stop"),
        "long": ("abcdef", "length"),
    }
    assert answers["stops"][0].usage.completion_tokens == 4
    assert prompts_of(writer) == ["first", "short", "stops", "long"]


@pytest.mark.parametrize("writer", [2], indirect=True)
def test_who_comes_is_answered_beside_those_under_way_as_soon_as_there_is_a_place(writer):
    with served(writer, waiting=8) as url, openai.OpenAI(base_url=url, api_key="-") as client:
        long = in_background(lambda: ask(client, "long", 6))
        until(lambda: writer.running == ["long"])
        answers = {}
        for number, (name, tokens) in enumerate({"a": 2, "b": 1, "c": 1}.items(), start=1):
            answers[name] = in_background(lambda one=name, n=tokens: ask(client, one, n, seed=1))
            until(lambda number=number: writer.waiting == number)
        for steps, beside in ((1, ["a"]), (2, ["b"]), (1, ["c"]), (1, [])):
            writer.go.release(steps)
            until(lambda beside=beside: writer.running == ["long", *beside])
        until(lambda: all(answers.values()))
        assert not long
        writer.go.release(1)
        until(lambda: long)
    said = {name: found[0].choices[0].text for name, found in answers.items()}
    assert said == {"a": "ab", "b": "a", "c": "a"}
    assert long[0].choices[0].text == "abcdef"


@pytest.mark.parametrize("writer", [3], indirect=True)
def test_a_client_that_goes_away_does_not_hold_its_batch(writer):
    with served(writer, waiting=8) as url, openai.OpenAI(base_url=url, api_key="-") as client:
        first = in_background(lambda: ask(client, "first", 1))
        until(lambda: writer.running == ["first"])
        with asking(url, "gone", 9):
            stays = in_background(lambda: ask(client, "stays", 2))
            until(lambda: writer.waiting == 2)
            writer.go.release(2)
            until(lambda: sorted(writer.running) == ["gone", "stays"])
        until(lambda: writer.running == ["stays"])
        writer.go.release(1)
        until(lambda: first and stays)
    assert stays[0].choices[0].text == "ab"
    assert sorted(prompts_of(writer)[1:]) == ["gone", "stays"]


def test_what_is_no_exception_is_told_as_one_and_the_next_one_is_answered(writer, client):
    """As a panic in Rust is, in tokenizers."""
    writer.go.release(2)
    with pytest.raises(openai.InternalServerError) as raised:
        ask(client, "panics")
    assert "secret" not in str(raised.value.body)
    assert raised.value.response.headers["connection"] == "close"
    writer.go.release(3)
    assert ask(client, "next").choices[0].text == "abc"


@pytest.mark.parametrize("writer", [3], indirect=True)
def test_all_in_a_batch_that_fails_are_told_and_the_next_one_is_answered(writer):
    with served(writer, waiting=8) as url:
        client = openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=PATIENCE)
        how = {"short": {"tokens": 1}, "fails": {"tokens": 3}, "too long": {}, "other": {}}
        answers = all_ask(writer, client, how, **how)
        writer.go.release(2)
        until(lambda: all(answers.values()))
        assert answers["short"][0].choices[0].text == "a"
        assert isinstance(answers["too long"][0], openai.BadRequestError)
        for name in ("fails", "other"):
            assert isinstance(answers[name][0], openai.InternalServerError)
        writer.go.release(3)
        assert ask(client, "next").choices[0].text == "abc"
        client.close()
    assert prompts_of(writer)[1:] == ["short", "fails", "other", "next"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(writer, client, url, stream):
    with asking(url, "gone", 9, stream=stream):
        writer.go.release()
        until(lambda: writer.running == ["gone"] and not writer.go._value)
    until(lambda: not writer.running)
    answer = in_background(lambda: ask(client, "next"))
    writer.go.release()  # the step that was under way ends, and is the last of its answer
    until(lambda: writer.running == ["next"])
    for _ in range(3):
        writer.go.release()
    until(lambda: answer)
    assert answer[0].choices[0].text == "abc"


def test_a_client_that_goes_away_while_it_waits_frees_its_place(writer, client, url):
    first = in_background(lambda: ask(client, "first"))
    until(lambda: writer.running == ["first"])
    with asking(url, "gone", 9):
        until(lambda: writer.waiting)
    until(lambda: not writer.waiting)
    after = in_background(lambda: ask(client, "next"))
    until(lambda: writer.waiting)
    for _ in range(6):
        writer.go.release()
    until(lambda: first and after)
    assert after[0].choices[0].text == "abc"
    assert prompts_of(writer) == ["first", "next"]


def test_places_of_clients_that_left_are_free_before_anyone_is_refused(writer, monkeypatch):
    monkeypatch.setattr(server, "_LOOK_S", 15)  # what they would hold them for
    with served(writer, timeout_graceful_shutdown=1) as url:
        client = openai.OpenAI(base_url=url, api_key="-", max_retries=0, timeout=PATIENCE)
        first = in_background(lambda: ask(client, "first"))
        until(lambda: writer.running == ["first"])
        with asking(url, "gone", 9):
            until(lambda: writer.waiting)
        assert writer.waiting == 1  # nobody has looked
        after = in_background(lambda: ask(client, "next"))
        writer.go.release(6)
        until(lambda: first and after)
        client.close()
    assert after[0].choices[0].text == "abc"
    assert prompts_of(writer) == ["first", "next"]


def test_a_stream_says_who_speaks_what_it_says_and_why_it_ended(writer, client):
    for _ in range(9):
        writer.go.release()
    parts = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        max_tokens=9,
        stop="def",
        seed=2**31 + 5,
        temperature=0.5,
        top_p=0.25,
        stream=True,
        stream_options={"include_usage": True},
    )
    *said, last, usage = list(parts)
    deltas = [part.choices[0].delta for part in said]
    assert [delta.role for delta in deltas] == ["assistant", None, None, None]
    assert "".join(delta.content for delta in deltas) == "abc"
    assert last.choices[0].finish_reason == "stop"
    assert (usage.choices, usage.usage.completion_tokens) == ([], 6)
    ((prompt, row),) = writer.seen
    assert prompt == "user: Hi"
    assert row.search == Search(do_sample=True, temperature=0.5, top_p=0.25)
    assert (row.sampling.seed, row.sampling.max_new_tokens) == (5, 9)


def test_an_engine_that_fails_is_told_without_its_secrets(writer, client, caplog):
    for stream in (False, True):
        writer.go.release()
        writer.go.release()
        with pytest.raises(openai.APIError) as raised:
            list(ask(client, "fails", stream=stream))
        assert "failed" in str(raised.value)
        assert "secret" not in str(raised.value.body)
    assert [one.getMessage() for one in caplog.records] == ["a secret path"] * 2


def test_a_stream_that_fails_in_a_way_nobody_foresaw_says_so(writer, client, monkeypatch, caplog):
    def choice(*_, **__):
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(protocol.Completion, "choice", choice)
    writer.go.release(3)
    with pytest.raises(openai.APIError, match="failed") as raised:
        list(ask(client, "a", stream=True))
    assert "secret" not in str(raised.value.body)
    (logged,) = caplog.records
    assert logged.exc_info[0] is ZeroDivisionError


def test_no_proxy_keeps_a_stream_back(writer, url):
    writer.go.release()
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "stream": True}
    answer = httpx.post(f"{url}/completions", json=body, timeout=PATIENCE)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


def test_a_connection_is_the_clients_to_close(writer):
    """httpx keeps one for 5 s: closed by the server then, the next request on it would fail."""
    service = server.Service(writer, ["tiny"], 1)
    assert server._http_server(service.app()).config.timeout_keep_alive > 60


def test_a_second_ctrl_c_ends_an_answer_without_a_traceback(writer, capfd):
    with served(writer, log_level="warning") as url:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 9, "stream": True}
        found = in_background(lambda: httpx.post(f"{url}/completions", json=body, timeout=PATIENCE))
        until(lambda: writer.running)
        writer.interrupt()
        writer.interrupt()
        until(lambda: found)
    assert "Traceback" not in capfd.readouterr().err


def test_who_asks_for_a_websocket_is_answered_without_advice_to_install_one(writer, capfd):
    upgrade = {"connection": "Upgrade", "upgrade": "websocket"}
    with served(writer, log_level="warning") as url:
        answer = httpx.get(f"{url}/models", headers=upgrade, timeout=PATIENCE)
        assert answer.status_code == 200
    assert "install" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "status", "code", "complaint"),
    [
        ({"model": "other"}, 404, "model_not_found", "tiny"),
        ({"max_tokens": 0}, 400, None, "max_tokens"),
        ({"temperature": 3}, 400, None, "temperature"),
        ({"stop": ["a"] * 17}, 400, None, "stop: at most 16 strings, of at most 256"),
        ({"stop": "a" * 257}, 400, None, "stop: at most 16 strings, of at most 256"),
        ({"stop": [5]}, 400, None, "stop: at most 16 strings"),
        ({"stop": 5}, 400, None, "stop: at most 16 strings"),
        ({"n": 2}, 400, "unsupported_parameter", "n is not supported"),
        ({"presence_penalty": 1}, 400, "unsupported_parameter", "presence_penalty"),
        ({"prompt": "a\0b"}, 400, None, "NUL"),
        ({"prompt": ["a", "b"]}, 400, None, "prompt: one prompt a request, as text"),
        ({"prompt": [1, 2]}, 400, None, "prompt: one prompt a request, as text"),
        ({"prompt": [[1, 2]]}, 400, None, "prompt: one prompt a request, as text"),
        ({"prompt": []}, 400, None, "prompt: one prompt a request, as text"),
        ({"prompt": ""}, 400, None, "prompt: it is empty"),
        ({"prompt": [""]}, 400, None, "prompt: it is empty"),
        ({"prompt": "too long"}, 400, "context_length_exceeded", "too long"),
        ({"prompt": "one word"}, 400, None, "word is too long"),
        ({"extra_body": {"min_p": 0.1}}, 400, "unsupported_parameter", "min_p"),
        ({"extra_body": {"guided_json": {}}}, 400, "unsupported_parameter", "guided_json"),
        ({"extra_body": {"add_generation_prompt": False}}, 400, "unsupported_parameter", "add_"),
        *(
            ({"extra_body": {name: value}}, 400, "unsupported_parameter", name)
            for name, value in {
                "include_stop_str_in_output": True,
                "skip_special_tokens": False,
                "add_special_tokens": False,
                "prompt_logprobs": 0,
                "n_probs": 2,
            }.items()
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}},
            *(400, "unsupported_parameter", "chat_template_kwargs"),
        ),
        ({"extra_body": {"repetition_penalty": 0}}, 400, None, "repetition_penalty"),
        ({"prompt": "a" * 2**21}, 413, None, "bytes"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_bad_request_is_refused_in_openais_shape(client, changes, status, code, complaint):
    with pytest.raises(openai.APIStatusError) as raised:
        client.completions.create(**{"model": "tiny", "prompt": "a", "max_tokens": 3} | changes)
    assert (raised.value.status_code, raised.value.code) == (status, code)
    assert set(raised.value.body) == {"message", "type", "param", "code"}
    assert complaint in raised.value.body["message"]


def test_letters_that_look_like_a_nul_are_text(writer, client):
    """As they stand in a program's source; in JSON the backslash is one of two."""
    prompts = ["print('\\u0000')", "\\\\u0000"]
    writer.go.release(2)
    for prompt in prompts:
        client.completions.create(model="tiny", prompt=prompt, max_tokens=1)
    assert prompts_of(writer) == [*prompts]
    with pytest.raises(openai.BadRequestError, match="NUL"):
        client.completions.create(model="tiny", prompt="\\\0", max_tokens=3)


def test_what_asks_for_nothing_is_taken(writer, client):
    writer.go.release()
    quiet = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "user": "me", "stop": []}
    others = {"typical_p": 1.0, "mirostat": 0, "bad_words": [], "add_generation_prompt": True}
    others |= {"include_stop_str_in_output": False, "prompt_logprobs": None, "n_probs": 0}
    others |= dict.fromkeys(("skip_special_tokens", "add_special_tokens"), True)
    answer = ask(client, "a", 1, **quiet, extra_body=others)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({"top_p": 0}, {"top_p": 1e-6}),
        ({"top_p": 1e-300}, {"top_p": 1e-6}),
        ({"top_k": -1}, {"top_k": 2**31 - 1}),
        ({"top_k": 3}, {"top_k": 3}),
        ({"stream_options": {"include_usage": None}}, {"top_k": 50, "top_p": 1.0}),
    ],
)
def test_what_clients_send_for_no_limit_and_for_the_least(writer, client, given, found):
    writer.go.release()
    ask(client, "a", 1, extra_body=given)
    assert {name: getattr(writer.seen[0][1].search, name) for name in found} == found


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {}),
        ({"temperature": None, "top_p": 0.5}, {"top_p": 0.5}),
        ({"temperature": 1, "top_k": 0}, {"temperature": 1.0, "top_k": 2**31 - 1}),
        ({"repetition_penalty": 1}, {"repetition_penalty": 1.0}),
    ],
)
def test_what_a_request_leaves_out_is_the_models(writer, client, given, changes):
    writer.usual = Search(True, 0.6, 20, 0.9, 1.1)
    writer.go.release()
    ask(client, "a", 1, extra_body=given)
    assert writer.seen[0][1].search == replace(writer.usual, **changes)


def test_a_greedy_request_has_nothing_of_the_models_sampling(writer, client):
    writer.usual = Search(True, 0.6, 20, 0.9, 1.1)
    writer.go.release()
    ask(client, "a", 1, temperature=0, seed=3)
    assert writer.seen[0][1].search == Search()


@pytest.mark.parametrize("messages", [[1] * 9, [{"role": "user", "content": [1] * 9}]])
def test_of_many_bad_messages_the_first_is_told(messages):
    body = json.dumps({"model": "tiny", "messages": messages}).encode()
    with pytest.raises(protocol.Refused) as refused:
        protocol.parse(protocol.Chat, body)
    assert refused.value.param == "messages"
    assert isinstance(refused.value.__cause__, protocol.ValidationError)
    assert refused.value.__cause__.error_count() < 4  # of those behind it nothing is kept


def test_another_method_is_told_the_right_one(url):
    answer = httpx.get(f"{url}/completions", timeout=PATIENCE)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_at_the_end_is_told_so(writer, stream):
    body, begun = {"model": "tiny", "prompt": "a", "max_tokens": 9, "stream": stream}, []

    def answer(url):
        with httpx.stream("POST", f"{url}/completions", json=body, timeout=PATIENCE) as found:
            begun.append(found.status_code)
            return found.read().decode()

    with served(writer, timeout_graceful_shutdown=1) as url:
        writer.go.release()
        found = in_background(lambda: answer(url))
        until(lambda: begun if stream else writer.running and not writer.go._value)
        writer.end()
        until(lambda: found)
    assert begun == [200 if stream else 503]
    assert "The server is shutting down." in found[0]


def test_a_prompt_may_be_a_list_of_one(writer, client):
    writer.go.release()
    assert ask(client, ["a"], 1).usage.completion_tokens == 1
    assert prompts_of(writer) == ["a"]
    assert not writer.templated


def test_a_penalty_of_repetitions_is_the_samplings(writer, client):
    writer.go.release()
    ask(client, "a", 1, extra_body={"repetition_penalty": 1.5})
    assert writer.seen[0][1].search.repetition_penalty == 1.5


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "tool", "content": "Hi"}, "chat template"),
        ({"role": "nobody", "content": "Hi"}, "messages.0.role"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "'image_url'"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}, "tool calls"),
    ],
)
def test_messages_that_would_be_lost_are_refused(client, message, complaint):
    with pytest.raises(openai.BadRequestError, match=complaint):
        client.chat.completions.create(model="tiny", messages=[message])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"role": "user", "text": "Hi"}, 'messages.0: a message has its text in "content"'),
        ({"role": "user", "content": None}, 'messages.0: a message has its text in "content"'),
        (
            {"role": "user", "content": [{"type": "text", "content": "Hi"}]},
            'messages.0.content.0: a part of type "text" has its text in "text"',
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": None}]},
            "messages.0.content.0.text: Input should be a valid string",
        ),
        ({"role": "user", "content": 5}, "messages.0.content: a text, or a list of parts"),
        ({"role": "user", "content": ["Hi"]}, "messages.0.content.0: Input should be an object"),
    ],
)
def test_a_text_in_the_wrong_place_is_no_empty_one(client, message, complaint):
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="tiny", messages=[message])
    assert (raised.value.body["message"], raised.value.param) == (complaint, "messages")


def test_an_assistant_may_have_said_nothing(writer, client):
    writer.go.release()
    said = [{"role": "assistant", "content": None}, {"role": "user", "content": ""}]
    client.chat.completions.create(model="tiny", messages=said, max_tokens=1)
    assert prompts_of(writer) == ["assistant: |user: "]


def test_a_model_without_a_chat_template(writer, client):
    writer.template = None
    with pytest.raises(openai.BadRequestError, match="its texts go to /v1/completions"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "Hi"}])


def test_the_developers_word_is_the_systems(writer, client):
    writer.go.release()
    parts = [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]
    said = [{"role": "developer", "content": parts}, {"role": "user", "content": "Hi"}]
    client.chat.completions.create(model="tiny", messages=said, max_tokens=1)
    assert prompts_of(writer) == ["system: Be brief.|user: Hi"]
    assert writer.templated


def test_the_model_is_told_by_its_name(client):
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="There is no model 'a/b'"):
        client.models.retrieve("a/b")


def test_the_model_says_how_much_it_takes_and_since_when_it_is_served(client):
    (model,) = client.models.list()
    assert model.model_extra["max_model_len"] == 100
    assert abs(time.time() - model.created) < PATIENCE


def test_names_that_are_given_are_the_models_and_without_one_it_is_the_first(writer):
    with (
        served(writer, names=["gpt", "owl/7b"]) as url,
        openai.OpenAI(base_url=url, api_key="-") as client,
    ):
        assert [model.id for model in client.models.list()] == ["gpt", "owl/7b"]
        assert client.models.retrieve("owl/7b").id == "owl/7b"
        writer.go.release(3)
        asked = {"prompt": "a", "max_tokens": 1}
        for named in ({"model": "owl/7b"}, {"model": None}, {}):
            answer = httpx.post(f"{url}/completions", json=asked | named, timeout=PATIENCE)
            assert answer.json()["model"] == (named.get("model") or "gpt")
        with pytest.raises(openai.NotFoundError, match="no model 'tiny', but 'gpt', 'owl/7b'"):
            ask(client, "a")


def test_more_context_than_the_model_takes_is_refused():
    opened = SimpleNamespace(max_context=512, path=Path("tiny"))
    assert [server._context(opened, asked) for asked in (None, 99, 512)] == [4096, 99, 512]
    with pytest.raises(BadInput, match=r"--context 513 .* 512 tokens .* Give 512 or less"):
        server._context(opened, 513)


@pytest.mark.parametrize(
    ("batch", "threads", "limits"),
    [(8, 2, "context 100, 2 threads, up to 8 at once"), (1, 1, "context 100, 1 thread, one at a")],
)
@pytest.mark.parametrize(
    ("usual", "told"),
    [
        (Search(), []),
        (Search(True, 0.6, 2**31 - 1, 0.9), ["temperature 0.6, top_p 0.9."]),
        (Search(True, 1.0, 2**31 - 1, 1.0), []),
    ],
)
def test_the_start_tells_limits_and_the_models_own_sampling(
    monkeypatch, batch, threads, limits, usual, told
):
    writer, said = FakeWriter(batch), []
    writer.usual = usual
    running = SimpleNamespace(handle_exit=signal.getsignal(signal.SIGTERM), run=lambda _: None)
    opened = SimpleNamespace(max_context=100)
    monkeypatch.setattr(server, "open_deployment", lambda *_, **__: opened)
    monkeypatch.setattr(server, "open_writer", lambda *_: writer)
    monkeypatch.setattr(server, "_http_server", lambda _: running)
    server.serve("a/tiny", port=0, batch=batch, threads=threads, say=said.append)
    where, *more = said
    assert where.startswith(f"tiny ({limits}")
    assert where.split()[-1].startswith("http://127.0.0.1:")  # where scripts look for it
    assert more == [f"Requests that do not say otherwise have the model's own {x}" for x in told]


def test_a_body_that_does_not_come_is_not_waited_for(url, monkeypatch):
    monkeypatch.setattr(server, "_BODY_S", 0.2)
    place = httpx.URL(url)
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9\r\n"
        "content-type: Application/JSON\r\n\r\n{"
    )
    with socket.create_connection((place.host, place.port), timeout=PATIENCE) as slow:
        slow.sendall(head.encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_a_body_that_came_while_the_server_stood_still_is_read(url, writer, monkeypatch):
    """As it does while the model's library holds Python's lock."""
    monkeypatch.setattr(server, "_BODY_S", 1)
    monkeypatch.setattr(server, "_READ_S", PATIENCE)  # the machine may stand still as well
    writer.go.release()
    place = httpx.URL(url)
    head, body = wire_form("a", 1)
    with socket.create_connection((place.host, place.port), timeout=PATIENCE) as client:
        client.sendall(head)
        time.sleep(0.5)
        held = threading.Thread(target=ctypes.PyDLL(None).sleep, args=(2,))
        held.start()
        client.sendall(body)  # before the sleep, or after it
        assert client.recv(100).startswith(b"HTTP/1.1 200")
        held.join()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ({"content": b"{", "headers": {"content-type": "application/json"}}, 400),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        ({"json": {}, "headers": {"host": "evil.example"}}, 400),
        ({"json": {"model": "tiny", "prompt": "\ud800"}}, 400),
    ],
)
def test_what_a_browsers_page_could_send_is_refused(url, sent, status):
    if "json" in sent:
        sent = {**sent, "content": json.dumps(sent["json"])}
        del sent["json"]
        sent["headers"] = {"content-type": "application/json"} | sent.get("headers", {})
    with httpx.Client(timeout=PATIENCE) as other:
        assert other.post(f"{url}/completions", **sent).status_code == status
        assert other.get(f"{url}/nothing").json()["error"]["type"] == "invalid_request_error"
        assert "access-control-allow-origin" not in other.get(f"{url}/models").headers


HOSTS = {  # whether the server without a key answers to it
    "localhost": True,
    "LOCALHOST:8000": True,
    "localhost.:8000": True,
    "127.0.0.1": True,
    "[::1]:8000": True,
    "evil.example": False,
    "localhost.evil.example": False,
    "127.0.0.1.evil.example:8000": False,
    "10.0.0.1": False,
    "[": False,
}


@pytest.mark.parametrize("host", HOSTS)
def test_only_this_machines_names_are_answered_to_without_a_key(url, host):
    answer = httpx.get(f"{url}/models", headers={"host": host}, timeout=PATIENCE)
    assert (answer.status_code == 200) == HOSTS[host]
    if not HOSTS[host]:
        said = answer.json()["error"]["message"]
        assert repr(host) in said
        assert "Host localhost" in said
        assert server.KEY in said


def test_with_a_key_any_name_will_do(writer):
    with served(writer, key="right") as url:
        headers = {"host": "owl.example", "authorization": "Bearer right"}
        answer = httpx.get(f"{url}/models", headers=headers, timeout=PATIENCE)
        assert answer.status_code == 200


def test_a_key_is_asked_for_everywhere_but_for_health(writer):
    with served(writer, key="right") as url:
        given = {"Bearer right": True, "bearer  right": True, "Bearer wrong": False}
        given |= {"Bearer righ": False, "Basic right": False, "Bearer schlüssel": False}
        for key, fits in given.items():
            with httpx.Client(headers={"authorization": key.encode()}, timeout=PATIENCE) as other:
                assert other.get(f"{url}/models").status_code == (200 if fits else 401)
        with httpx.Client(timeout=PATIENCE) as other:
            refused = other.get(f"{url}/models")
            assert refused.json()["error"]["code"] == "invalid_api_key"
            assert other.get(url.replace("/v1", "/health")).json() == {"status": "ok"}


def test_other_machines_are_let_in_only_with_a_key(monkeypatch, tmp_path):
    monkeypatch.delenv(server.KEY, raising=False)
    with pytest.raises(BadInput, match="no key is asked for"):
        server.serve(tmp_path, "0.0.0.0")


@pytest.mark.parametrize("key", ["sk-x\n", " sk-x\t"])
def test_a_key_has_no_space_around_it(monkeypatch, key):
    """A file that a secret is read from ends with a line's end."""
    monkeypatch.setenv(server.KEY, key)
    assert server._key() == "sk-x"


@pytest.mark.parametrize("key", ["", "\n", "schlüssel", "a b", "a\x7f", "k\udcff"])
def test_a_key_that_no_client_can_send_is_refused(monkeypatch, tmp_path, key):
    monkeypatch.setenv(server.KEY, key)
    with pytest.raises(BadInput, match="unset it") as refused:
        server.serve(tmp_path, "0.0.0.0")
    assert "lüssel" not in str(refused.value)


@pytest.mark.parametrize("host", ["é..", "a" * 70, "192.0.2.1", "::1%zz"])
def test_a_host_that_is_none_of_this_machine_is_what_the_hint_names(monkeypatch, tmp_path, host):
    monkeypatch.setenv(server.KEY, "right")
    with pytest.raises(BadInput, match=r"cannot be listened at .* Give a --host"):
        server.serve(tmp_path, host, 0)


def test_an_address_that_is_taken_is_said_in_a_sentence(tmp_path):
    with server._listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=r"cannot be listened at .* Give another --port"):
            server.serve(tmp_path, port=port)


def test_a_line_says_what_a_request_took_and_nothing_of_its_text(writer):
    said = []
    with served(writer, key="secret", say=said.append) as url:
        with openai.OpenAI(base_url=url, api_key="secret", max_retries=0) as client:
            for more in ({}, {"stream": True}):
                writer.go.release(3)
                list(ask(client, "private", **more))
        httpx.get(url.removesuffix("v1") + "health", timeout=PATIENCE)
        pretended = {"x-forwarded-for": "6.6.6.6"}  # anybody can say so
        httpx.get(url + "/completions", headers=pretended, timeout=PATIENCE)
        httpx.get(url + "/no%0Asuch", timeout=PATIENCE)
        until(lambda: len(said) == 4)
    lines = [re.sub(r"^\S+ \S+ 127.0.0.1 |, \d+\.\d\d s$", "", told) for told in said]
    answered = "POST /v1/completions 200, 7 + 3 tokens"
    assert lines == [answered, answered, "GET /v1/completions 405", "GET /v1/no%0Asuch 404"]
    assert "private" not in str(said)


def test_the_refusals_shape_is_openais():
    assert protocol.Refused(429, "Later.", "full").body() == {
        "error": {
            "message": "Later.",
            "type": "invalid_request_error",
            "param": None,
            "code": "full",
        }
    }


def test_an_end_that_is_the_last_token_there_is_room_for_is_no_cut(writer, client, monkeypatch):
    made = writer.row

    def row(*asked, **how):
        found = made(*asked, **how)
        found.ends = ["c"]
        return found

    monkeypatch.setattr(writer, "row", row)
    for tokens, reason in ((3, "stop"), (2, "length")):
        for _ in range(tokens):
            writer.go.release()
        assert ask(client, "a", tokens).choices[0].finish_reason == reason
