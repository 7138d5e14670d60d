"""What texts are written together, and what is told of the speed."""

from dataclasses import replace

from owl_deploy.engines.sampling import Sampling
from owl_deploy.engines.speculate import Search, Tally
from owl_deploy.engines.rows import Row, Speed

MODEL = Search(do_sample=True, temperature=0.6, top_k=20, top_p=0.9, repetition_penalty=1.1)


def test_what_goes_alone_and_what_in_a_batch():
    def shared(usual=MODEL, **options):
        sampling = Sampling(**options)
        return Row([1], 2, sampling, search=sampling.search(usual)).shared

    drawn = replace(MODEL, repetition_penalty=1.0)
    assert shared(drawn, do_sample=True) == shared(Search(), **vars(drawn)) == (drawn, False)
    assert shared(do_sample=True, temperature=0, seed=1) == shared() == (Search(), False)
    assert shared(ignore_eos=True) == (Search(), True)
    assert shared(do_sample=True) is None  # the model's penalty
    assert shared(drawn, do_sample=True, seed=1) is None


def test_one_token_has_no_speed():
    speed = Speed(prompt_tokens=3, draft=Tally())
    speed.count(0.5)
    assert speed.sentence() == "3 tokens read in 0.50 s"
    assert speed.to_json()["tokens_per_s"] is None
    speed.count(1.0)
    assert speed.sentence() == "3 tokens read in 0.50 s, then 2.0 tokens/s"
    assert speed.to_json()["tokens_per_s"] == 2
