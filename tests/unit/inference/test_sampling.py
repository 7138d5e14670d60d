"""How tokens are chosen by what is given and what the model says."""

from dataclasses import replace
from pathlib import Path

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.inference.sampling import LARGEST, Sampling, search_told
from owl_deploy.inference.speculate import Search

MODEL = Search(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1)


def told_by(**search):
    return search_told(search, Path("tiny/genai_config.json"))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens 0 is impossible. Give 1 to 2147483647, or -1 to"),
        ({"temperature": -1}, "--temperature -1 is impossible. Give 0 (the likeliest token) or m"),
        ({"temperature": float("nan")}, "--temperature nan is impossible."),
        ({"top_k": -2}, "--top-k -2 is impossible. Give 1 to 2147483647, or 0 for all tokens."),
        ({"top_k": 2.5}, "--top-k 2.5 is impossible."),
        ({"top_p": 2}, "--top-p 2 is impossible. Give 0 to 1."),
        ({"repetition_penalty": 0}, "--repetition-penalty 0 is impossible. Give more than 0; 1"),
    ],
)
def test_what_is_impossible_is_refused_with_what_is_possible(options, complaint):
    with pytest.raises(BadInput) as refused:
        Sampling(do_sample=True, **options)
    assert complaint in str(refused.value)


@pytest.mark.parametrize(
    "options", [{"temperature": 1.5}, {"temperature": 1.0}, {"top_k": 5}, {"top_p": 1}, {"seed": 3}]
)
def test_what_is_of_sampling_is_refused_without(options):
    with pytest.raises(BadInput, match="Give --do-sample as well"):
        Sampling(**options)
    Sampling(do_sample=True, **options)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, MODEL),
        ({"temperature": 1.5, "seed": 3}, replace(MODEL, temperature=1.5)),
        ({"top_k": 0}, replace(MODEL, top_k=LARGEST)),
        ({"top_k": -1}, replace(MODEL, top_k=LARGEST)),
        ({"top_p": 0}, replace(MODEL, top_p=1e-6)),
        ({"repetition_penalty": 1}, replace(MODEL, repetition_penalty=1)),
        ({"temperature": 0, "top_k": 5}, Search()),
        ({"temperature": 0, "repetition_penalty": 1.5}, Search(repetition_penalty=1.5)),
        ({"do_sample": False}, Search()),
    ],
)
def test_what_is_left_out_is_the_models_where_tokens_are_drawn(options, found):
    assert Sampling(**{"do_sample": True} | options).search(MODEL) == found


def test_a_model_has_a_sampling_where_it_says_so():
    told = vars(MODEL)
    assert told_by(**told, max_length=512) == MODEL
    assert repr(told_by(do_sample=True, top_k=20.0)) == repr(told_by(do_sample=True, top_k=20))
    assert told_by(do_sample=True, top_p=0.5) == Search(do_sample=True, top_p=0.5)
    for silent in ({**told, "do_sample": False}, {"temperature": 0.6}, {}):
        assert told_by(**silent) == Search()
    assert Sampling(do_sample=True).search(Search()) == Search(do_sample=True)


def test_a_model_whose_own_temperature_is_0_is_greedy_unless_a_request_has_another():
    usual = told_by(do_sample=True, temperature=0.0, top_k=0, top_p=0.5)
    assert usual == Search(do_sample=True, temperature=0.0, top_k=LARGEST, top_p=0.5)
    assert Sampling(do_sample=True).search(usual) == Search()
    assert Sampling(do_sample=True, temperature=0.5).search(usual).temperature == 0.5
    assert Sampling().search(usual) == Search()


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_p": [0.5]}, {"top_k": "many"}, {"top_k": 2.5}]
)
def test_a_models_sampling_that_is_none_is_said_in_a_sentence(wrong):
    with pytest.raises(
        BadInput, match=r"tiny/genai_config.json has a sampling .* and export again"
    ):
        told_by(do_sample=True, **wrong)
