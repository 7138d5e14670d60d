import collections
import math
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from rich.console import Console

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.divergence import Divergence, First, Watched, divergence
from owl_deploy.evaluate.perplexity import windows_of
from owl_deploy.evaluate.run import evaluate, to_json
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.evaluate.show import show
from owl_deploy.inference import EngineProcess
from owl_deploy.inference.worker import Predictions
from tests.reference import divergence as reference

_CHANGED = "model.layers.1.mlp.down_proj"


@pytest.fixture
def changed(llama, tmp_path):
    """The model with other weights in one Linear."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        model.get_submodule(_CHANGED).weight.mul_(0.5)
    folder = Path(shutil.copytree(llama, tmp_path / "changed"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def asked(text_file):
    return EvaluationSettings(str(text_file), window=300, windows=3, divergence=True)


@pytest.mark.parametrize("blockwise", [False, True])
def test_equals_a_naive_divergence(llama, changed, asked, blockwise):
    first, same, other = evaluate([llama, llama, changed], replace(asked, blockwise=blockwise))
    assert first.divergence is None
    assert same.divergence.value == pytest.approx(0, abs=1e-6)
    assert same.divergence.same_top == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    weights = {_CHANGED: 0.5 * model.get_submodule(_CHANGED).weight}
    windows = windows_of(llama, asked.text, 300, 3)[:, :-1]  # nothing comes after the last token
    assert other.divergence.value == pytest.approx(
        reference.divergence(model, weights, windows), rel=1e-3
    )
    each = [reference.divergence(model, weights, window[None]) for window in windows]
    assert other.divergence.stderr == pytest.approx(np.std(each, ddof=1) / 3**0.5, rel=1e-2)
    assert 0 < other.divergence.same_top < 1
    assert other.divergence.windows == 3


def compared(first: np.ndarray, other: np.ndarray, path: Path) -> dict[str, float]:
    """What is said of the logits [places + 1, vocab] of one model beside the first's."""
    for keep, logits in ((True, first), (False, other)):
        with Predictions(str(path), len(logits) - 1, keep) as seen:
            assert list(seen.each([logits])) == [logits]
    return seen.result()


def test_two_places_by_hand(tmp_path):
    """Of the first place halves and quarters change places; the last row predicts nothing."""
    first = np.log(np.array([[2, 1, 1], [1, 1, 6], [9, 1, 1]], np.float32))
    other = np.log(np.array([[1, 1, 2], [1, 1, 6], [1, 1, 9]], np.float32)) + 3
    assert compared(first, other, tmp_path / "file") == {
        "vocabulary": 3,
        "divergence": pytest.approx(math.log(2) / 4 / 2, rel=1e-3),
        "same_top": 0.5,
    }


def test_a_token_that_cannot_come_counts_nothing(tmp_path):
    logits = np.array([[0, -np.inf, 1], [0, 1, 1]], np.float32)
    assert compared(logits, logits, tmp_path / "file")["divergence"] == pytest.approx(0, abs=1e-6)


def test_places_in_several_parts(tmp_path):
    """More of them than are looked at at once, in parts that end anywhere."""
    first, other = np.random.default_rng(0).normal(size=(2, 301, 40)).astype(np.float32)
    whole = compared(first, other, tmp_path / "file")
    with Predictions(str(tmp_path / "file"), 300, keep=False) as seen:
        for part in np.split(other, [7, 150, 290]):
            seen.see(part)
    assert seen.result() == pytest.approx(whole)
    shares = np.exp(first) / np.exp(first).sum(axis=1, keepdims=True)
    others = np.exp(other) / np.exp(other).sum(axis=1, keepdims=True)
    wanted = (shares * np.log(shares / others)).sum(axis=1)[:300].mean()
    assert whole["divergence"] == pytest.approx(wanted, rel=1e-3)


def test_an_engine_tells_it(tmp_path):
    """Logits of one at a token's successor, else none; the other's say less of it."""
    files = {}
    for name, off in (("first", 0.0), ("same", 5.0)):
        files[name] = tmp_path / name
        files[name].mkdir()
        (files[name] / "fake.json").write_text(f'{{"vocab": 8, "logits_off": {off}}}')
    path = str(tmp_path / "kept")
    with EngineProcess("fake", files["first"]) as engine:
        plain = engine.request("score", tokens=[1, 2, 3])
        kept = engine.request("score", tokens=[1, 2, 3], predictions=path, keep=True)
    with EngineProcess("fake", files["same"]) as engine:
        found = engine.request("score", tokens=[1, 2, 3], predictions=path)
    assert kept["loss"] == plain["loss"]
    assert found["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["same_top"] == 1
    assert found["vocabulary"] == kept["vocabulary"] == 8


def test_models_of_other_tokens_are_refused(llama, asked, tmp_path, text_file):
    first = First(tmp_path)
    windows = windows_of(llama, str(text_file), 300, 3)
    Watched(first).reads(llama, windows, windows)
    with pytest.raises(BadInput, match="reads other tokens of the text than the first"):
        Watched(first).reads(llama, windows + 1, windows + 1)


def test_models_of_another_vocabulary_are_refused(llama, asked, tmp_path):
    wider = Path(shutil.copytree(llama, tmp_path / "wider"))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.save_pretrained(wider)
    with pytest.raises(BadInput, match=r"wider chooses from \d+ tokens, and the first model from"):
        evaluate([llama, wider], asked)


def test_a_disk_without_room_is_said_after_the_first_window(llama, changed, asked, monkeypatch):
    disk = collections.namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk)
    with pytest.raises(BadInput, match=r"first model predicts.*the disk has 1.0 kB left"):
        evaluate([llama, changed], asked)


def test_what_was_kept_goes(llama, changed, asked, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    evaluate([llama, changed], asked)
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize(
    ("count", "changes", "said"),
    [
        (1, {}, "--divergence is for several models"),
        (2, {"text": None, "windows": None, "tasks": "piqa"}, "--divergence is for --perplexity"),
    ],
)
def test_what_nothing_would_read(llama, asked, count, changes, said):
    with pytest.raises(BadInput, match=said):
        evaluate([llama] * count, replace(asked, **changes))


def test_it_is_told_beside_the_first(llama, changed, asked):
    found = evaluate([llama, changed], asked)
    console = Console(width=80)
    with console.capture() as told:
        show(found, console)
    apart = found[1].divergence
    assert (
        f"changed beside model: KL divergence {apart.value:.3g} ± {apart.stderr:.2g}, "
        f"{100 * apart.same_top:.1f} % of the likeliest tokens the same."
        in " ".join(told.get().split())
    )
    first, other = to_json(found)["models"]
    assert "divergence_from_first" not in first
    assert other["divergence_from_first"] == asdict(apart)


def test_one_window_has_no_error():
    assert divergence([(0.5, 1.0)]) == Divergence(1, 0.5, None, 1.0)
    assert divergence([]) is None
