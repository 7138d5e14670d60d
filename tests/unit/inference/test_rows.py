"""A text that is written, and what is told of the speed."""

from owl_deploy.inference.rows import Row, Speed
from owl_deploy.inference.sampling import Sampling
from owl_deploy.inference.speculate import Tally


def test_a_text_ends_with_its_last_token_or_for_want_of_room():
    row = Row([5, 6], 4, Sampling(), ends=[9])
    row.take(7, 0.5)
    assert (row.ended, row.room, row.speed.new_tokens) == (False, 1, 1)
    row.take(8, 0.75)
    assert (row.ended, row.tokens, row.speed.decode_s) == (True, [5, 6, 7, 8], 0.25)
    row = Row([5], 4, Sampling(), ends=[9])
    row.take(9, 0.5)
    assert row.ended


def test_one_token_has_no_speed():
    speed = Speed(prompt_tokens=3, draft=Tally())
    speed.count(0.5)
    assert speed.sentence() == "3 tokens read in 0.50 s"
    assert speed.to_json()["tokens_per_s"] is None
    speed.count(1.0)
    assert speed.sentence() == "3 tokens read in 0.50 s, then 2.0 tokens/s"
    assert speed.to_json()["tokens_per_s"] == 2
