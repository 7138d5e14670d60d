"""One pruning in several processes: the model of one, and no death costs what is finished."""

import functools
import json
import os
import random

import pytest

from owl_deploy.compression.allocation.rules import ALLOCATIONS
from owl_deploy.utils.resume import partial_folder
from tests import divided, fresh, tiny
from tests.divided import SAMPLES

QUICK = [
    ("llama", {"method": "wanda"}),
    ("llama", {"method": "sparsegpt", "allocation": "owl", "head_sparsity": 0.5}),
    ("llama", {"method": "sparsegpt", "bits": 4, "allocation": "owl", "asymmetric": False}),
    ("opt", {"method": "alps", "allocation": "uniform"}),
    ("llama", {"method": "sparsegpt", "asymmetric": True, "allocation": "uniform"}),
    ("opt", {"method": "wanda-variant", "allocation": "linear"}),
    ("opt", {"method": "sparsegpt", "allocation": "fisher"}),
]
EVERY = [
    (family, {"method": method, "allocation": allocation})
    for family in ("llama", "opt")
    for method in tiny.REMOVING
    for allocation, row in ALLOCATIONS.items()
    if row.divides
]
EVERY += [
    ("opt", {"method": "wanda", "refit": True}),
    ("opt", {"method": "none", "bits": 4, "asymmetric": False}),
    ("llama", {"method": "sparsegpt", "structure": "2:4", "sparsity": 0.5}),
]
CASES = {"quick": QUICK, "every": EVERY}
BATCHES = [1, 2, 3]  # of the five windows, which one process otherwise takes at once
# What several processes do to a model is what one does with another --batch-size: the same sums in
# another order. So they may be as far from one process as its own batch sizes are, times a factor:
# three draws of what rounding makes, for each method and model, do not tell the largest.
FACTOR = 2
# And by what three draws may miss. Rounding moves SparseGPT's weights by some 3e-6 of their size;
# of 100,000 scores less than one pair is as near as that, so that two are rare and three a fault.
# Each row that holds one may then be another altogether, of the models' 1,300 rows and more.
TIES, CLOSE = 4, 1e-4
FLOOR = divided.Apart(elsewhere=TIES, rows=TIES, off=CLOSE, moved=(TIES / 1300) ** 0.5)


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.write_model(family, folder / family) for family in ("llama", "opt")}


def prunings(models, text_file, folder, cases, **more):
    folder.mkdir(exist_ok=True)
    return [
        divided.asked(models[family], text_file, folder / str(index), **settings, **more)
        for index, (family, settings) in enumerate(cases)
    ]


@pytest.fixture(scope="module")
def alone(models, text_file, tmp_path_factory):
    """Give what one process makes of the cases of that name, and its spread: see `spread_of`."""

    @functools.cache
    def made(name):
        folder = tmp_path_factory.mktemp(name)
        for batch in (SAMPLES, *BATCHES):
            asked = prunings(models, text_file, folder / str(batch), CASES[name], batch=batch)
            for one in asked:
                divided.run(one)
        found = [differences(folder / str(SAMPLES), folder / str(batch)) for batch in BATCHES]
        return folder / str(SAMPLES), spread_of(CASES[name], found)

    return made


def differences(one, other):
    """How far the prunings of one folder are from those of the other, in order."""
    names = [str(index) for index in range(len(list(one.iterdir())))]
    return [divided.difference(one / name, other / name) for name in names]


def kind(case):
    """What the spread is told for: a method, and what is done besides, on a model."""
    family, settings = case
    return family, settings["method"], "refit" in settings, settings.get("asymmetric", False)


def spread_of(cases, of_batches):
    """For each kind of case the largest that any of them, in any of the batch sizes, is apart."""
    found = {}
    for differences in of_batches:
        for case, apart in zip(cases, differences, strict=True):
            so_far = found.get(kind(case), divided.SAME)
            found[kind(case)] = divided.Apart(*map(max, so_far, apart))
    return found


def too_far(case, apart, spread):
    """What of `apart` is more than the spread allows, in words; nothing where all is well.

    Without iterations no tie moves the rows that hold none.
    """
    _, method, refitted, asymmetric = kind(case)
    limits = {
        name: least + FACTOR * largest
        for name, least, largest in zip(FLOOR._fields, FLOOR, spread[kind(case)], strict=True)
    }
    if method != "alps" and not refitted:
        limits["off"] = CLOSE
    if asymmetric:  # a tie moves what all later Linears make up for, in every row
        limits = {"moved": limits["moved"]}
    return [
        f"{case}: {name} {value:.3g} > {limits[name]:.3g}"
        for name, value in apart._asdict().items()
        if name in limits and value > limits[name]
    ]


def all_too_far(cases, found, spread):
    pairs = zip(cases, found, strict=True)
    return [words for case, apart in pairs for words in too_far(case, apart, spread)]


def in_several(models, text_file, folder, cases, processes, **fault):
    """The folder of what several processes make of the cases; the second is made twice, alike."""
    made = folder / "several"
    asked = prunings(models, text_file, made, cases)
    asked[0] |= fault
    again = asked[1] | {"output": str(folder / "again")}
    perplexity = {"model": str(models["llama"]), "text": str(text_file), "window": 64}
    perplexity |= {"output": str(folder / "perplexity.json")}
    done = divided.in_processes(processes, folder, [*asked, perplexity, again])
    assert done.returncode == 0, done.stderr
    assert divided.difference(made / "1", folder / "again") == divided.SAME
    return made


def test_two_processes_make_the_model_of_one(models, text_file, tmp_path, alone):
    reference, spread = alone("quick")
    made = in_several(models, text_file, tmp_path, QUICK, 2)
    assert all_too_far(QUICK, differences(reference, made), spread) == []
    several = tmp_path / "perplexity.json"
    one = tmp_path / "one.json"
    divided.run({"model": models["llama"], "text": str(text_file), "window": 64, "output": one})
    found, expected = (json.loads(path.read_text()) for path in (several, one))
    assert found.pop("value") == pytest.approx(expected.pop("value"), rel=1e-12)
    assert found == expected


def test_windows_that_count_twice_are_seen_with_every_method_that_reads(
    models, text_file, tmp_path, alone
):
    reference, spread = alone("quick")
    made = in_several(models, text_file, tmp_path, QUICK, 2, times=2)
    for case, apart in zip(QUICK, differences(reference, made), strict=True):
        assert too_far(case, apart, spread), (case, apart)


def check_tied(one, other):
    """The two are one model, but for weights that tie within rounding."""
    elsewhere, _, off, _ = divided.difference(one, other)
    assert elsewhere <= TIES
    assert off <= CLOSE


def test_of_three_one_is_killed_and_one_process_goes_on(models, text_file, tmp_path):
    settings = {"method": "sparsegpt", "allocation": "owl"}
    case = prunings(models, text_file, tmp_path, [("llama", settings)])[0]
    # As it gives its part of the second block, and all have told of theirs: the first is kept.
    done = divided.in_processes(3, tmp_path, [case | {"killed": [1, 37]}])
    assert done.returncode != 0
    said = done.stderr.count("owl: Another process of this run has ended")
    # Under load torchrun may end the others before they see it.
    assert said == 1 or (said == 0 and "torchrun ended this process" in done.stderr)
    assert any(partial_folder(tmp_path / "0").glob("*.block"))
    assert not (tmp_path / "0").exists()
    resumed = case["settings"] | {"resume": True}
    divided.run(case | {"settings": resumed})
    divided.run(case | {"output": str(tmp_path / "whole")})
    check_tied(tmp_path / "0", tmp_path / "whole")


def evaluate_own_text(model, folder):
    """As a node does that has a file of its own under the path that all are given."""
    fresh.owl("eval", model, "--perplexity", folder / os.environ["RANK"], "--window", 64)


def test_a_node_with_another_text_gives_no_figure(models, text_file, tmp_path):
    (tmp_path / "0").write_text(text_file.read_text())
    (tmp_path / "1").write_text(text_file.read_text()[1:])
    done = fresh.group(2, evaluate_own_text, models["llama"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("owl: ") == 1
    assert "Not all processes of this run have the same text." in done.stderr


def test_more_processes_than_windows_end_with_one_sentence(models, text_file, tmp_path):
    arguments = ["prune", models["llama"], "-c", text_file, "-o", tmp_path / "out"]
    arguments += ["--samples", 1, "--sequence-length", 32]
    done = fresh.group(2, fresh.owl, *arguments)
    assert done.returncode != 0
    assert done.stderr.count("owl: ") == 1
    assert "2 processes, and 1 windows" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_method_and_allocation(models, text_file, tmp_path, alone, processes):
    reference, spread = alone("every")
    found = differences(reference, in_several(models, text_file, tmp_path, EVERY, processes))
    if processes == 1:
        assert set(found) == {divided.SAME}
    assert all_too_far(EVERY, found, spread) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_nodes_of_two_processes_make_the_model_of_one(models, text_file, tmp_path):
    case = prunings(models, text_file, tmp_path, [("llama", {"method": "sparsegpt"})])[0]
    for done in divided.in_two_nodes(2, tmp_path, [case]):
        assert done.returncode == 0, done.stderr
    divided.run(case | {"output": str(tmp_path / "whole")})
    check_tied(tmp_path / "0", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_processes_with_other_packages_are_refused(models, text_file, tmp_path):
    case = prunings(models, text_file, tmp_path, [("llama", {"method": "wanda"})])[0]
    done = divided.in_processes(2, tmp_path, [case | {"unlike": "2.0.0"}])
    assert done.returncode != 0
    assert done.stderr.count("owl: ") == 1
    assert "rank 1 2.0.0" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_some_moment_and_resumed_by_another_number(models, text_file, tmp_path, seed):
    draw = random.Random(seed)
    first, then = draw.sample([2, 3, 4], 2)
    settings = {"method": draw.choice(["wanda", "sparsegpt"])}
    case = prunings(models, text_file, tmp_path, [("llama", settings)])[0]
    killed = [draw.randrange(first), draw.randrange(1, 150)]
    done = divided.in_processes(first, tmp_path, [case | {"killed": killed}])
    if done.returncode != 0:  # a later moment than the last
        assert done.stderr.count("owl: ") <= 1
        assert not (tmp_path / "0").exists()
        kept = partial_folder(tmp_path / "0").is_dir()
        resumed = case | {"settings": settings | {"resume": kept}}
        done = divided.in_processes(then, tmp_path, [resumed])
        assert done.returncode == 0, done.stderr
    divided.run(case | {"output": str(tmp_path / "whole")})
    check_tied(tmp_path / "0", tmp_path / "whole")
