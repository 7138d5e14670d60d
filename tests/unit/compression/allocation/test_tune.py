import itertools
import json
import math
import random

import pytest
import torch
import transformers
from safetensors.torch import load_file

from owl_deploy.compression import plan as planning
from owl_deploy.compression import recipe
from owl_deploy.compression.allocation import tune
from owl_deploy.compression.allocation.sparsities import Shape
from owl_deploy.compression.request import check
from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput
from owl_deploy.models.blocks import Skeleton, window_loss
from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.utils.hardware import ANY_HARDWARE
from owl_deploy.utils.ranks import ALONE
from tests import tiny

NO_TIME = 1e-9  # minutes: the named allocations are tried, and no more
SHAPE = Shape([f"layers.{block}" for block in range(4)], [{"q": 64, "k": 16, "down": 256}] * 4)


def mean(division):
    sizes = [size for own in SHAPE.linears for size in own.values()]
    return sum(n * one for n, one in zip(sizes, division, strict=True)) / sum(sizes)


def test_a_search_begins_with_what_was_asked_and_others():
    found = dict(tune.named(PruneSettings.checked(allocation="dlp", spread=0.11)))
    assert next(iter(found)) == "dlp, spread 0.11"
    assert {one.allocation for one in found.values()} == {"dlp", "linear", "uniform"}
    assert len(found) == 1 + 3 + 3 + 1
    assert len({(one.allocation, one.spread) for one in found.values()}) == len(found)
    groups = [
        one for _, one in tune.named(PruneSettings.checked(allocation="owl", structure="4:8"))
    ]
    assert {one.spread for one in groups if one.allocation == "owl"} == {0.125, 0.1875}


@pytest.mark.parametrize(
    ("settings", "minutes", "said"),
    [
        ({"budget": "3.5"}, 5, "nothing to tune"),
        ({"allocation": "list", "layers": {"model.layers.0": 0.5}}, 5, "nothing to tune"),
        ({"sparsity": 0.0}, 5, "nothing to tune"),
        ({"method": "none", "bits": 4}, 5, "nothing to tune"),
        ({}, 0, "is no time"),
        ({}, 1e308, "is no time"),
        ({}, -1, "is no time"),
        ({}, math.nan, "is no time"),
        ({}, math.inf, "is no time"),
    ],
)
def test_nothing_to_tune_and_no_time(settings, minutes, said):
    with pytest.raises(BadInput, match=said):
        tune.check(PruneSettings.checked(**settings), minutes)


def test_what_a_search_finds_is_no_allocation_to_ask_for(llama, text_file, tmp_path):
    text = Calibration(str(text_file), samples=3, sequence_length=48)
    with pytest.raises(BadInput, match="is what --tune finds"):
        prune(llama, tmp_path / "out", PruneSettings.checked(allocation="searched"), text)


@pytest.mark.parametrize("structure", ["unstructured", "4:8", "2:4"])
@pytest.mark.parametrize("seed", range(5))
def test_offspring_keep_the_sparsity_and_empty_no_linear(structure, seed):
    settings = PruneSettings.checked(structure=structure, sparsity=0.5)
    mutation, draw = tune.Mutation(settings, SHAPE), random.Random(seed)
    division = mutation.feasible([0.5] * 12)
    assert division == (0.5,) * 12
    seen = {division}
    for _ in range(60):
        division = mutation.offspring(division, draw)
        seen.add(division)
        group = settings.group
        # In whole weights of a group the mean is held to half a step of the largest Linear.
        off = 1e-9 if group is None else 256 / group[1] / 2 / (4 * 336) + 1e-9
        assert mean(division) == pytest.approx(0.5, abs=off)
        assert min(division) >= 0
        assert max(division) <= (0.875 if group is None else 1 - 1 / group[1])
        if group is not None:
            assert all((one * group[1]).is_integer() for one in division)
    assert len(seen) > 20
    again = mutation.offspring((0.5,) * 12, random.Random("1 1"))
    assert again == mutation.offspring((0.5,) * 12, random.Random("1 1"))


def test_linears_trade_alone_by_block_by_name_and_by_third():
    ways = tune.Mutation(PruneSettings.checked(), SHAPE).ways
    assert [len(sets) for sets in ways] == [12, 4, 3, 9]
    for sets in ways:
        assert sorted(itertools.chain(*sets)) == list(range(12))
    assert ways[1][1] == [3, 4, 5]
    assert ways[2][0] == [0, 3, 6, 9]
    assert ways[3][0] == [0, 3]


class Bowl:
    """Judges by the distance from a goal, which a search can reach; some text misleads a little."""

    windows = range(4)

    def __init__(self, goal):
        self.goal = goal

    def divergences(self, divisions, places):
        noise = 0.0 if len(places) == 4 else 0.001 * places[0]
        return [
            sum((a - b) ** 2 for a, b in zip(one, self.goal, strict=True)) * (1 + noise)
            for one in divisions
        ]


def searched(monkeypatch, generations, *, state=None, seed=0):
    """A search of so many generations, each of which takes a second, and what it kept of each."""
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    goal = tuple(0.5 + (0.2 if number % 3 == 2 else -0.2) for number in range(12))
    mutation = tune.Mutation(PruneSettings.checked(sparsity=0.5), SHAPE)
    state, kept = state or tune.Search(), []
    searcher = tune.Searcher(mutation, Bowl(goal), state, seed, ALONE, kept.append)
    searcher.run([("uniform", (0.5,) * 12), ("other", (0.4,) * 12)], generations / 60)
    return state, [json.loads(json.dumps(one)) for one in kept]


def test_a_search_gets_better_and_never_worse(monkeypatch):
    state, _ = searched(monkeypatch, 200)
    best = list(itertools.accumulate((one.divergence for one in state.trials), min))
    assert state.trials[0].name == "uniform"
    assert state.divergence == best[-1] < 0.35 * state.trials[0].divergence
    assert state.generation == 199  # the first second is that of the named ones
    assert mean(state.best) == pytest.approx(0.5)


def test_a_search_that_was_stopped_goes_on_to_the_same_end(monkeypatch):
    whole, kept = searched(monkeypatch, 30)
    begun = tune.Search.from_json(kept[11])
    assert begun.generation == 11
    resumed, rest = searched(monkeypatch, 30, state=begun)
    assert len(rest) == len(kept) - 12
    assert resumed.to_json() == whole.to_json()
    over, rest = searched(monkeypatch, 30, state=tune.Search.from_json(kept[-1]))
    assert not rest
    assert over.to_json() == whole.to_json()


def test_another_seed_is_another_search(monkeypatch):
    assert searched(monkeypatch, 20)[0].best != searched(monkeypatch, 20, seed=1)[0].best


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_losses_of_the_dense_states_are_the_models_own(family, tmp_path):
    folder = tiny.write_model(family, tmp_path / "model")
    windows = torch.randint(2, 300, (3, 40), generator=torch.Generator().manual_seed(1))
    skeleton = Skeleton(open_checkpoint(folder), torch.float32, torch.device("cpu"))
    states = skeleton.embed(windows, 3, tmp_path)
    for index in range(2):
        with skeleton.loaded(skeleton.names[index]) as block:
            states.through(block, index, lambda _: None, keep=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        losses = [model(ids[None], labels=ids[None]).loss.item() for ids in windows]
    for _ in range(2):  # the weights that were loaded for it are gone again, and can come back
        assert skeleton.losses(windows, states, window_loss) == pytest.approx(losses, rel=1e-5)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


@pytest.mark.parametrize("allocation", ["owl", "dlp", "lsa", "linear", "uniform", "owl-per-linear"])
@pytest.mark.parametrize("structure", ["unstructured", "4:8"])
def test_a_search_never_ends_worse_than_what_was_asked(
    llama, text_file, tmp_path, allocation, structure
):
    settings = PruneSettings.checked(allocation=allocation, structure=structure)
    text = Calibration(str(text_file), samples=3, sequence_length=48)
    manifest = prune(llama, tmp_path / "out", settings, text, tune_minutes=NO_TIME).to_json()
    trials = manifest["tuning"]
    assert [trial["name"] for trial in trials] == [name for name, _ in tune.named(settings)]
    assert all(math.isfinite(trial["divergence"]) for trial in trials)
    assert manifest["settings"]["allocation"] == "searched"
    assert json.loads((tmp_path / "out" / "owl.json").read_text())["tuning"] == trials
    assert "began with" in (tmp_path / "out" / "tuning.svg").read_text()
    best = min(trials, key=lambda trial: trial["divergence"])
    (chosen,) = [one for name, one in tune.named(settings) if name == best["name"]]
    plain = prune(llama, tmp_path / "plain", chosen, text).to_json()
    assert [one["linears"] for one in plain["blocks"]] == [
        one["linears"] for one in manifest["blocks"]
    ]
    assert not (tmp_path / "plain" / "tuning.svg").exists()


def test_what_was_found_is_pruned_again_from_its_recipe(llama, text_file, tmp_path, monkeypatch):
    text = Calibration(str(text_file), samples=3, sequence_length=48)
    clock = itertools.count()
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    settings = PruneSettings.checked(sparsity=0.6)
    found = prune(llama, tmp_path / "found", settings, text, tune_minutes=20 / 60)
    assert len(found.tuning) == len(tune.named(settings)) + 19
    assert found.sparsity.asked == pytest.approx(0.6)
    assert len({one.sparsity for block in found.blocks for one in block.linears.values()}) > 2
    listed = recipe.merged(tmp_path / "found" / "recipe.yaml", {})
    again = prune(llama, tmp_path / "again", listed, text)
    assert [one.linears for one in again.blocks] == [one.linears for one in found.blocks]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("found", "again")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_of_the_offspring_the_best_on_little_text_is_judged_on_all(monkeypatch):
    asked = []

    class Noted(Bowl):
        def divergences(self, divisions, places):
            asked.append((list(divisions), list(places)))
            return super().divergences(divisions, places)

    goal = tuple(0.5 + (0.2 if number % 3 == 2 else -0.2) for number in range(12))
    state = tune.Search()
    state.judged("uniform", (0.5,) * 12, 1.5)
    mutation = tune.Mutation(PruneSettings.checked(sparsity=0.5), SHAPE)
    searcher = tune.Searcher(mutation, Noted(goal), state, 0, ALONE, print)
    searcher._generation()
    (young, few), (judged, every) = asked
    assert (len(young), len(few), every) == (tune.OFFSPRING, 1, [0, 1, 2, 3])
    errors = [sum((a - b) ** 2 for a, b in zip(one, goal, strict=True)) for one in young]
    assert judged == [young[errors.index(min(errors))]]


def test_a_search_judges_by_text_that_nothing_was_made_by(llama, text_file, tmp_path, monkeypatch):
    read = []

    class Noted(planning.Judge):
        def __init__(self, skeleton, shape, tried, made, windows, *rest):
            read.append(windows)
            super().__init__(skeleton, shape, tried, made, windows, *rest)

    monkeypatch.setattr(planning, "Judge", Noted)
    settings, text = PruneSettings.checked(sparsity=0.5), Calibration(str(text_file), 3, 48)
    prune(llama, tmp_path / "out", settings, text, tune_minutes=NO_TIME)
    request = check(llama, settings, text, ANY_HARDWARE, tune_minutes=1)
    (windows,) = read
    assert torch.equal(windows, request.held_out[:8, :256])
    assert not torch.equal(windows[: len(request.windows)], request.windows)


def test_a_damaged_search_is_no_search_to_go_on_with(llama, text_file, tmp_path, monkeypatch):
    settings, text = PruneSettings.checked(sparsity=0.5), Calibration(str(text_file), 3, 48)
    with monkeypatch.context() as patched:
        patched.setattr(planning.tune.Searcher, "run", lambda search, *_: search.save({}) or 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prune(llama, tmp_path / "out", settings, text, tune_minutes=1)
    with pytest.raises(BadInput, match=r"is damaged: .*search\.json"):
        prune(llama, tmp_path / "out", settings, text, tune_minutes=1, resume=True)
