"""The adapter for the harness, against figures worked out by hand with the fake engine.

Its logits are 1 at the successor of a token, of ten, and 0 elsewhere.
"""

import json
import math

import pytest
from lm_eval.api.instance import Instance

from owl_deploy.errors import BadInput
from owl_deploy.evaluate import humaneval
from owl_deploy.evaluate.harness import DeploymentLM, _Text
from owl_deploy.inference import EngineProcess
from owl_deploy.inference.generate import _words

LIKELY, OTHER = 1 - math.log(math.e + 9), -math.log(math.e + 9)


class Digits:
    """A tokenizer whose tokens are the digits of a text; 0 begins one and 9 ends it."""

    bos_token_id, eos_token_id = 0, 9

    def encode(self, text, add_special_tokens):
        return [0] * add_special_tokens + [int(letter) for letter in text]

    def decode(self, tokens, skip_special_tokens=False):
        tokens = [tokens] if isinstance(tokens, int) else tokens
        return "".join(str(t) for t in tokens if not (skip_special_tokens and t in (0, 9)))


def asked(kind, *arguments):
    return Instance(kind, {}, arguments, 0)


@pytest.fixture
def opened(tmp_path):
    (tmp_path / "fake.json").write_text(json.dumps({"vocab": 10}))
    with EngineProcess("fake", tmp_path, all_logits=True) as process:
        requests = []
        ask = process.request

        def note(operation, **rest):
            requests.append(rest)
            return ask(operation, **rest)

        process.request = note

        def model(max_length=8, places=0):
            return DeploymentLM(process, Digits(), max_length, places)

        yield model, requests


def test_sums_and_the_greedy_flag(opened):
    model, requests = opened
    pairs = [("12", "3"), ("12", "345"), ("12", "346"), ("3", "4"), ("12", "8")]
    found = model().loglikelihood([asked("loglikelihood", *pair) for pair in pairs])
    assert [value for value, _ in found] == pytest.approx(
        [LIKELY, 3 * LIKELY, 2 * LIKELY + OTHER, LIKELY, OTHER]
    )
    assert [greedy for _, greedy in found] == [True, True, False, True, False]
    assert [asking["context"] for asking in requests] == [[0, 1, 2], [0, 3]]  # each is read once


def test_an_empty_context_is_the_beginning_of_a_text(opened):
    model, requests = opened
    ((value, greedy),) = model().loglikelihood([asked("loglikelihood", "", "12")])
    assert (value, greedy) == (pytest.approx(2 * LIKELY), True)
    assert requests[0]["context"] == [0]
    # A continuation that begins with BOS brings its context itself, as the harness has it.
    model().loglikelihood([asked("loglikelihood", "", "012")])
    assert requests[1] == {"context": [0], "targets": [[1, 2]]}


def test_a_long_context_is_cut_on_the_left(opened):
    model, requests = opened
    model(4).loglikelihood(
        [asked("loglikelihood", "12345", "67"), asked("loglikelihood", "1", "2")]
    )
    # 4 tokens are read, of which the last predicts 7, itself never read.
    assert requests[0] == {"context": [3, 4, 5], "targets": [[6, 7]]}
    assert requests[1] == {"context": [0, 1], "targets": [[2]]}
    with pytest.raises(BadInput, match="has 5 tokens, and the model is to see 4"):
        model(4).loglikelihood([asked("loglikelihood", "1", "23456")])


def test_a_text_is_rolled_over_with_each_token_predicted_once(opened):
    model, requests = opened
    texts = ["123456", "13"]
    found = model(4).loglikelihood_rolling([asked("loglikelihood_rolling", one) for one in texts])
    # BOS stands before the text's own BOS: 0 | 0 1 2 3, then 3 | 4 5 6.
    assert found == pytest.approx([OTHER + 6 * LIKELY, 2 * OTHER + LIKELY])
    predicted = [token for asking in requests for target in asking["targets"] for token in target]
    assert sorted(predicted) == sorted([0, 1, 2, 3, 4, 5, 6, 0, 1, 3])
    assert all(len(a["context"] + a["targets"][0]) <= 5 for a in requests)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"until": ["6"], "max_gen_toks": 30}, "345"),
        ({"until": ["0"], "max_gen_toks": 2}, "34"),
        ({"until": [], "max_gen_toks": 30}, "345678"),  # 9 ends the text
    ],
)
def test_generation_ends(opened, options, text):
    model, _ = opened
    assert model(64).generate_until([asked("generate_until", "12", options)]) == [text]


def test_generation_ends_at_any_of_the_models_ends(opened):
    model, _ = opened
    lm = model(64)
    lm.ends = [6]
    options = {"until": [], "max_gen_toks": 30}
    assert lm.generate_until([asked("generate_until", "12", options)]) == ["345"]


def test_generation_goes_on_over_slices(opened):
    model, requests = opened
    lm = model(64)
    lm.tokenizer.eos_token_id = 10  # never comes
    (text,) = lm.generate_until(
        [asked("generate_until", "8", {"until": ["x"], "max_gen_toks": 36})]
    )
    assert text == "".join(str((9 + n) % 10) for n in range(36)).replace("0", "").replace("9", "")
    assert [(one["tokens"], one["count"], one["fresh"]) for one in requests] == [
        ([0, 8], 8, True),
        ([6], 8, False),
        ([4], 8, False),
        ([2], 8, False),
        ([0], 4, False),
    ]


def test_texts_are_written_side_by_side_each_to_its_own_end(opened):
    """One ends at the stop, one at the end of text, 9, one where it has enough."""
    model, requests = opened
    lm = model(64, places=2)
    wanted = {
        "12": ({"until": ["6"]}, "345"),
        "6": ({"until": []}, "78"),
        "3": ({"until": []}, "4"),
    }
    texts = [
        asked("generate_until", text, {**options, "max_gen_toks": 1 if text == "3" else 20})
        for text, (options, _) in wanted.items()
    ]
    assert lm.generate_until(texts) == [answer for _, answer in wanted.values()]
    assert [(one["begin"], one["keep"], one["count"]) for one in requests] == [
        ([(0, [0, 1, 2]), (1, [0, 6])], [], 8),
        ([(2, [0, 3])], [], 0),
    ]


def test_where_a_text_ends_the_next_begins(opened):
    model, requests = opened
    lm = model(64, places=3)
    lm.tokenizer.eos_token_id = 10  # never comes
    most = [20, 3, 20, 20, 11]
    texts = [
        asked("generate_until", start, {"until": [], "max_gen_toks": many})
        for start, many in zip("86425", most, strict=True)
    ]
    found = list(lm.answers(texts))
    assert [number for number, _ in found] == [1, 0, 2, 3, 4]
    assert [([n for n, _ in one["begin"]], one["keep"], one["count"]) for one in requests] == [
        ([0, 1, 2], [], 2),
        ([3], [0, 2], 8),
        ([], [0, 2, 3], 8),
        ([], [0, 2, 3], 1),
        ([4], [3], 2),
        ([], [4], 8),
    ]
    lm.places = 0
    assert [answer for _, answer in sorted(found)] == lm.generate_until(texts)


def test_generation_that_cannot_be(opened):
    model, _ = opened
    text = asked("generate_until", "1", {"until": ["x"], "max_gen_toks": 8})
    with pytest.raises(BadInput, match="generates 8 tokens"):
        model(8).generate_until([text])


class Letters(Digits):
    """A tokenizer whose tokens are letters."""

    def encode(self, text, add_special_tokens):
        return [*map(ord, text)]

    def decode(self, tokens, skip_special_tokens=False):
        return "".join(map(chr, tokens))


class Pieces(Letters):
    """One that, as SentencePiece, leaves out a space where a text begins."""

    def decode(self, tokens, skip_special_tokens=False):
        return super().decode(tokens).removeprefix(" ")


def test_what_goes_on_keeps_its_first_space():
    text = _Text(Pieces(), [*map(ord, "def f():\n")], [], 20, {0})
    text.take([*map(ord, "    pass")])
    assert text.cut() == "    pass"


def test_what_an_engine_generates_keeps_its_first_space():
    words = ["    pass", " and"]
    assert [*_words(map(ord, "".join(words)), Pieces())] == [*"".join(words)]


def test_a_text_ends_at_any_of_the_models_ends():
    text = _Text(Letters(), [], [], 20, {0, ord("$")})
    text.take([*map(ord, "pass$and")])
    assert (text.ended, text.cut()) == (True, "pass")


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("Here is it:\n\n```\ndef f(x):\n    return x\n```\n\nIt", "def f(x):\n    return x\n"),
        ("```python\ndef f(x):\n    return x\n```\n\nIt is", "def f(x):\n    return x\n"),
        ("```python\ndef f(x):\n    return x\n```", "def f(x):\n    return x\n"),
    ],
)
def test_an_answer_to_humaneval_ends_behind_its_block_of_code(answer, program):
    _, stops = humaneval._ASKED[True]
    text = _Text(Letters(), [], stops, 99, {0})
    for letter in answer:
        assert not text.ended
        text.take([ord(letter)])
        if text.ended:
            break
    problem = {"prompt": "def f(x):\n", "entry_point": "f"}
    assert humaneval.program_of(problem, text.cut()).strip("\n") == program.strip("\n")
    assert not text.cut().endswith("It")


def test_a_deployment_says_what_ends_a_text_where_its_tokenizer_does_not(opened):
    model, _ = opened
    lm = model()
    lm.tokenizer.eos_token_id = None
    with pytest.raises(BadInput, match="a token that ends a text"):
        lm.eot_token_id  # noqa: B018
    lm.ends = (9, 8)
    assert lm.eot_token_id == 8
