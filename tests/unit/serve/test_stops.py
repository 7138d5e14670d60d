"""Strings that end an answer: found however the text is cut, and nothing of them is said."""

import itertools

import pytest

from owl_deploy.serve.stops import Stops


def cut(text: str) -> list[list[str]]:
    """Every way to cut `text` into pieces."""
    places = range(1, len(text))
    found = []
    for count in range(len(text)):
        for ends in itertools.combinations(places, count):
            bounds = [0, *ends, len(text)]
            found.append([text[a:b] for a, b in itertools.pairwise(bounds)])
    return found


@pytest.mark.parametrize(
    ("text", "strings", "said"),
    [
        ("abcd", [], "abcd"),
        ("abcd", ["c"], "ab"),
        ("aabab", ["ab"], "a"),
        ("aaab", ["aab"], "a"),
        ("abxab", ["abc"], "abxab"),
        ("abcd", ["cd", "bcx"], "ab"),
        ("ab", ["abc"], "ab"),
        ("abc", ["abc"], ""),
    ],
)
def test_the_text_ends_before_the_first_string(text, strings, said):
    for pieces in cut(text):
        stops, heard = Stops(strings), ""
        for piece in pieces:
            heard += stops.feed(piece)
            if stops.found:
                break
        assert heard + stops.rest() == said, pieces
        assert stops.found == (said != text)


def test_only_what_may_be_a_beginning_is_kept_back():
    stops = Stops(["\n\n"])
    assert [stops.feed(piece) for piece in ("one", "\n", "two\n")] == ["one", "", "\ntwo"]


def test_a_text_ends_before_a_string_and_nothing_behind_it_is_made():
    pieces = iter(["a", "b", "c", "d", "e"])
    assert "".join(Stops(["cd"]).before(pieces)) == "ab"
    assert list(pieces) == ["e"]
    assert "".join(Stops(["ef"]).before("abcde")) == "abcde"
