"""Speculative decoding, with models that are tables: what comes of it, and by how much work."""

import hashlib
import math

import numpy as np
import pytest

from owl_deploy.inference import speculate
from owl_deploy.inference.speculate import Choice, Lookup, Proposer, Search, Speculation, accept
from tests.reference import speculate as reference

PROMPT = [3, 1, 4, 1, 0]
ANY_MATCHES = [0, 0, 1, 0, 2, 0, 3, 0]  # of four tokens: whatever follows has done so before


class Table:
    """A model whose logits are random numbers made from all of the text before; of `seed`.

    `echo`: the share of logits that are those of another table, which it resembles so.
    """

    def __init__(self, seed, vocabulary=6, like=None, echo=0.0):
        self.seed, self.vocabulary, self.like, self.echo = seed, vocabulary, like, echo
        self.text, self.runs, self.kept = [], [], {}

    def logits(self, text):
        key = tuple(text)
        if key not in self.kept:
            digest = hashlib.sha256(repr((self.seed, key)).encode()).digest()
            own = np.random.default_rng(list(digest)).normal(size=self.vocabulary) * 2
            if self.like is not None:
                own = (1 - self.echo) * own + self.echo * self.like.logits(text)
            self.kept[key] = own.astype(np.float32)
        return self.kept[key]

    def run(self, tokens):
        assert len(tokens)
        self.runs.append(len(tokens))
        rows = []
        for token in tokens:
            self.text.append(token)
            rows.append(self.logits(self.text))
        return np.stack(rows)

    def rewind(self, count):
        assert 0 < count < len(self.text)
        del self.text[count:]


def speculation(target, draft, most, search=None, seed=0):
    search = search or Search()
    proposing = Lookup() if draft is None else Proposer(draft, search)
    return Speculation(target, proposing, search, most, np.random.default_rng(seed))


@pytest.mark.parametrize("most", [0, 1, 2, 3, 7, 15])
@pytest.mark.parametrize("echo", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_the_likeliest_text_is_the_models_own(most, echo, penalty):
    for seed in range(3):
        target = Table(seed)
        wanted = reference.greedy(target.logits, PROMPT, 40, repetition_penalty=penalty)
        search = Search(repetition_penalty=penalty)
        for draft in (None, Table(-1, like=target, echo=echo)):
            made = speculation(Table(seed), draft, most, search)
            assert list(made.tokens(PROMPT, 40)) == wanted


def test_it_ends_with_the_first_end_wherever_that_stands_in_a_step():
    target = Table(0)
    whole = reference.greedy(target.logits, PROMPT, 40)
    for end in set(whole):
        wanted = whole[: whole.index(end) + 1]
        for most in (1, 4, 9):
            alike = speculation(Table(0), Table(0), most)
            assert list(alike.tokens(PROMPT, 40, {end})) == wanted


def test_it_ends_at_the_length_and_keeps_the_caches_below_it():
    for length in range(len(PROMPT) + 1, len(PROMPT) + 9):
        target, draft = Table(0), Table(0)
        made = list(speculation(target, draft, 5).tokens(PROMPT, length))
        assert len(made) == length - len(PROMPT)
        assert max(len(target.text), len(draft.text)) < length


def test_a_draft_that_is_right_makes_all_it_may_and_costs_a_run_a_token():
    target, draft = Table(0), Table(0)
    made = speculation(target, draft, 3)
    assert len(list(made.tokens(PROMPT, len(PROMPT) + 1 + 4 * 5))) == 21
    assert vars(made.tally) == {"steps": 5, "proposed": 15, "accepted": 15, "made": 20}
    assert (made.tally.share_accepted, made.tally.tokens_per_step) == (1.0, 4.0)
    assert target.runs == [5, 4, 4, 4, 4, 4]
    # Of a step that is accepted whole the draft has not run the last: that goes with the next.
    assert draft.runs == [6, 1, 1] + [2, 1, 1] * 4


def test_a_draft_that_is_wrong_costs_no_token():
    target, draft = Table(0), Table(0)
    draft.logits = lambda text: -target.logits(text)
    made = speculation(target, draft, 3)
    assert list(made.tokens(PROMPT, 20)) == reference.greedy(target.logits, PROMPT, 20)
    assert (made.tally.accepted, made.tally.tokens_per_step) == (0, 1.0)
    assert made.tally.to_json()["share_accepted"] == 0


def test_steps_make_what_the_draft_agrees_to():
    target = Table(0)
    draft = Table(1, like=target, echo=0.6)
    text = PROMPT + reference.greedy(target.logits, PROMPT, 60)

    def proposals(at):
        count = min(4, 60 - at - 1)
        return reference.greedy(draft.logits, text[:at], at + count)

    wanted = reference.steps(text, proposals, len(PROMPT))
    made = speculation(Table(0), draft, 4)
    list(made.tokens(PROMPT, 60))
    assert made.tally.steps == len(wanted)
    assert made.tally.made == sum(wanted)
    assert 0 < made.tally.share_accepted < 1


@pytest.mark.parametrize(
    ("chance", "cost", "count"),
    [
        (1.0, 0.5, 15),  # (1 + n) / (1 + n / 2) grows with n
        (0.0, 0.1, 0),
        (0.5, 0.125, 2),  # 1.5 / 1.125 = 1.33, 1.75 / 1.25 = 1.4, 1.875 / 1.375 = 1.36
        (0.8, 0.75, 1),  # 1.8 / 1.75 = 1.03, 2.44 / 2.5 = 0.98
        (0.7, 0.75, 0),  # 1.7 / 1.75 = 0.97
    ],
)
def test_as_many_are_worth_proposing_by_hand(chance, cost, count):
    assert speculate.most_worth(chance, cost) == count


def test_as_many_are_proposed_as_pay():
    """All that may be while all are accepted, and one in eight steps where none is."""
    target = Table(0)
    list(speculation(target, Table(0), 0).tokens(PROMPT, len(PROMPT) + 100))
    proposed = [run - 1 for run in target.runs[1:-1]]  # the last as room is left
    assert proposed == sorted(proposed)
    assert proposed[-1] == 15
    target, draft = Table(0), Table(0)
    draft.logits = lambda text: -target.logits(text)
    list(speculation(target, draft, 0).tokens(PROMPT, len(PROMPT) + 60))
    proposed = [run - 1 for run in target.runs[1:]]
    first = proposed.index(0)
    assert 0 < first < 16
    assert sorted(proposed[:first], reverse=True) == proposed[:first]
    assert proposed[first : first + 24] == 3 * [*7 * [0], 1]


def test_a_draft_that_takes_long_proposes_less():
    """Of steps in which a token is accepted as often."""
    steps = {}
    for share in (0.0, 0.2, 0.6):
        pace = speculate.Pace(share)
        for _ in range(30):
            pace.tell(3, 2)
        steps[share] = pace.next()
    assert steps[0.0] > steps[0.2] > steps[0.6] == 0


def test_the_share_is_that_of_the_weights(tmp_path):
    for name, size in (("draft", 30), ("model", 120)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").write_bytes(b"0" * (size // 2))
        (tmp_path / name / "model.onnx.data").write_bytes(b"0" * (size // 2))
        (tmp_path / name / "tokenizer.json").write_bytes(b"0" * 500)
    assert speculate.share_of(tmp_path / "draft", tmp_path / "model") == 0.25


def test_a_draft_goes_on_from_what_was_accepted():
    model, random = Table(0), np.random.default_rng(0)
    proposing = Proposer(model, Search(repetition_penalty=1.3))
    text = list(PROMPT)
    for accepted in (3, 0, 2, 1, 3, 3, 0, 0):
        tokens, choices = proposing.propose(text, 3, random)
        length = len(text) + 3
        assert tokens == reference.greedy(model.logits, text, length, repetition_penalty=1.3)
        assert [choice.tokens.tolist() for choice in choices] == [[token] for token in tokens]
        assert model.text == text + tokens[:-1]
        other = [(token + 1) % 6 for token in [*tokens, 0]]
        text += [*tokens[:accepted], other[accepted]]


SEARCHES = {
    "plain": {},
    "nucleus": {"top_p": 0.7},
    "both": {"top_k": 3, "top_p": 0.8, "temperature": 1.5},
    "penalty": {"repetition_penalty": 1.4, "temperature": 0.8},
}
_PLAIN = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def chi_square(counts, shares, total):
    """Pearson's statistic over its degrees of freedom's mean, in standard deviations.

    Texts that are expected fewer than five times are put together.
    """
    rare = [text for text, share in shares.items() if share * total < 5]
    groups = [[text] for text in shares if text not in rare] + ([rare] if rare else [])
    value = 0.0
    for group in groups:
        expected = total * sum(shares[text] for text in group)
        value += (sum(counts.get(text, 0) for text in group) - expected) ** 2 / expected
    freedom = len(groups) - 1
    return (value - freedom) / math.sqrt(2 * freedom)


def sampled(target, draft, most, search, runs, seed):
    """How often each text of four tokens came, and the whole tally."""
    counts = {}
    accepted = 0
    random = np.random.default_rng(seed)
    for _ in range(runs):
        target.text, proposing = [], Lookup()
        if draft is not None:
            draft.text, proposing = [], Proposer(draft, search)
        made = Speculation(target, proposing, search, most, random)
        text = tuple(made.tokens(ANY_MATCHES, len(ANY_MATCHES) + 4))
        counts[text] = counts.get(text, 0) + 1
        accepted += made.tally.accepted
    return counts, accepted


RUNS = 1500


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
@pytest.mark.parametrize("drafted", [True, False], ids=["draft", "lookup"])
def test_sampled_texts_have_the_models_own_distribution(options, drafted):
    target = Table(3, vocabulary=4)
    draft = Table(4, vocabulary=4, like=target, echo=0.5) if drafted else None
    search = Search(do_sample=True, **options)
    shares = reference.text_probabilities(target.logits, ANY_MATCHES, 4, **(_PLAIN | options))
    counts, accepted = sampled(target, draft, 2, search, RUNS, 0)
    assert accepted > RUNS / 50
    assert counts.keys() <= shares.keys()
    assert abs(chi_square(counts, shares, RUNS)) < 4


def test_the_drafts_own_distribution_would_be_told_apart():
    target = Table(3, vocabulary=4)
    draft = Table(4, vocabulary=4, like=target, echo=0.5)
    counts, _ = sampled(target, draft, 2, Search(do_sample=True), RUNS, 0)
    wrong = reference.text_probabilities(draft.logits, ANY_MATCHES, 4, **_PLAIN)
    assert chi_square(counts, wrong, RUNS) > 40


def test_a_seed_gives_the_same_text_again():
    search = Search(do_sample=True)
    texts = [
        list(speculation(Table(0), Table(1), 3, search, seed).tokens(PROMPT, 40))
        for seed in (5, 5, 6)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_what_is_rejected_is_made_up_for_by_hand():
    own = Choice(np.array([7, 8, 9]), np.array([0.5, 0.3, 0.2]))
    draft = Choice(np.array([9, 7, 6]), np.array([0.5, 0.2, 0.3]))
    rest = own.without(draft)  # 0.3 of 7, 0.3 of 8, nothing of 9
    assert rest.tokens.tolist() == [7, 8]
    assert rest.probabilities == pytest.approx([0.5, 0.5])
    assert own.without(own) is own
    assert [own.probability(token) for token in (8, 6)] == [0.3, 0.0]


class Dice:
    """Random numbers that are given."""

    def __init__(self, *numbers):
        self.numbers = list(numbers)

    def random(self):
        return self.numbers.pop(0)


def test_a_step_by_hand():
    half = Choice(np.array([0, 1]), np.array([0.5, 0.5]))
    most = Choice(np.array([0, 1]), np.array([0.9, 0.1]))
    # 0.5 / 0.9 of token 0 is kept. One number accepts it, another draws the token behind it.
    assert accept([0], [most], lambda _: half, Dice(0.55, 0.2)) == [0, 0]
    assert accept([0], [most], lambda _: half, Dice(0.56, 0.2)) == [1]  # 1 is all that is left
    # Of two the second is rejected, and what the model has behind it is not asked for.
    asked = []

    def choice(place):
        asked.append(place)
        return half if place == 0 else speculate.certainly(1)

    assert accept([1, 0], [half, half], choice, Dice(0.0, 0.0)) == [1, 1]
    assert asked == [0, 1]


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_a_choice_is_what_the_options_define(options):
    for seed in range(20):
        logits = Table(seed, vocabulary=9).logits([])
        text = [seed % 9, 2, 2]
        wanted = reference.distribution(logits, text, **(_PLAIN | options))
        found = Search(do_sample=True, **options)(logits, text)
        assert found.probabilities == pytest.approx(wanted[found.tokens], abs=1e-6)
        assert found.probabilities.sum() == pytest.approx(1)
        assert (wanted > 0).sum() == len(found.tokens)


def test_of_equal_logits_the_first_is_the_likeliest():
    logits = np.array([1, 3, 3, 0], np.float32)
    assert Search()(logits, []).tokens.tolist() == [1]
    assert Search(do_sample=True, top_k=1)(logits, []).tokens.tolist() == [1]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2, 3]),  # on, and round again
        ([1, 2, 3, 9, 1, 2, 4, 8, 1, 2], [4, 8, 1, 2, 4]),  # of equal ones the latest
        ([7, 1, 2, 3, 9, 1, 2, 4, 7, 1, 2], [3, 9, 1, 2, 4]),  # the longer one before it
        ([5, 5, 5], [5, 5, 5, 5, 5]),
        ([1, 2, 3, 2], []),  # a single token tells nothing
        ([1], []),
    ],
)
def test_a_lookup_by_hand(text, found):
    assert speculate.lookup(text, 5) == found


def test_a_lookup_is_the_plain_one():
    random = np.random.default_rng(0)
    for size in (2, 3, 8):
        for length in [*range(1, 40), 200]:
            text = random.integers(0, size, length).tolist()
            wanted = reference.lookup(text, 7, speculate.LONGEST_MATCH, speculate.LEAST_MATCH)
            assert speculate.lookup(text, 7) == wanted
    assert speculate.lookup([1, 1, 1], 0) == []


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("penalty", [1e-320, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("temperature", [1e-310, 1.0, 1e300])
def test_whatever_a_user_asks_for_there_is_a_token(penalty, temperature):
    search = Search(True, temperature, repetition_penalty=penalty)
    logits = np.array([-3, 0, 2, 5, 6], np.float32)
    choice = search(logits, [0, 1, 3])
    assert choice.probabilities.sum() == pytest.approx(1)
    assert (choice.probabilities >= 0).all()
    if temperature < 1:  # 3 was said before, and 4 was not
        assert choice.draw(np.random.default_rng(0)) == (3 if penalty < 1 else 4)
