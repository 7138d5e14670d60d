"""An engine and an export target from outside: two rows and one file, walked through every verb."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from owl_deploy import inference
from owl_deploy.api import TARGETS
from owl_deploy.bench import report  # noqa: F401 - a row that comes after it counts, too
from owl_deploy.export.targets import Precision, Request, Target
from owl_deploy.inference import ENGINES, Engine, Ink
from tests import tiny

DRIVER = '''
import json
import os
import random

import numpy as np


class Driver:
    """Takes as long as the file says; each token is followed by the next."""

    def __init__(self):
        self.now = 0.0
        self.streams = [self]

    def clock(self):
        return self.now

    def prepare(self):
        pass

    def load(self, asked):
        with open(os.path.join(asked.folder, "newcomer.json"), encoding="utf-8") as file:
            self.says = json.load(file)
        self.streams = [self] * asked.streams
        # Beside so much, what a process takes more or less is within a gate's margin.
        self.taken = np.ones(100_000_000, np.uint8)
        return {"version": "7", "runtime": "newcomer 7", "isa": "", "through": "a file"}

    def reset(self):
        pass

    def next(self):
        return self.prompt([0])

    def prompt(self, tokens):
        self.now += self.says["ms"] / 1e3 * random.gauss(1, 0.01)
        return int(self.extend(tokens).argmax())

    def extend(self, tokens):
        return next(self.logits(tokens))[-1]

    def logits(self, tokens):
        width = self.says["width"]
        yield np.eye(width, dtype=np.float32)[(np.array(tokens) + 1) % width]
'''


def build(request: Request) -> dict[str, object]:
    config = request.source.config
    ms = 5 if request.precision == "quick" else 10
    says = {"ms": ms, "width": config["vocab_size"]}
    (request.folder / "newcomer.json").write_text(json.dumps(says))
    for path in request.source.folder.glob("[ct]o*.json"):  # config.json and the tokenizer
        shutil.copyfile(path, request.folder / path.name)
    return {"graph": "a file", "max_context": config["max_position_embeddings"]}


@pytest.fixture
def newcomer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    row = Engine(
        name="newcomer",
        driver=driver,
        package="numpy",
        targets=("for-newcomer",),
        licence="Any use.",
        ink=Ink("#123456", "#fedcba", "v"),
        model_file="newcomer.json",
        skips_zeros=True,
    )
    precisions = {"plain": Precision(4), "quick": Precision(2)}
    target = Target(build, precisions, engine="newcomer")
    monkeypatch.setitem(ENGINES, "newcomer", row)
    monkeypatch.setitem(TARGETS, "for-newcomer", target)


@pytest.mark.usefixtures("newcomer")
def test_an_engine_and_a_target_from_outside(owl, llama, text_file, tmp_path):
    code, out, _ = owl("engines", "ls")
    assert code == 0
    assert all(word in out for word in ("newcomer", "for-newcomer", "Any use."))

    quick, plain = tmp_path / "quick", tmp_path / "plain"
    for folder in (quick, plain):
        options = ("--target", "for-newcomer", "--precision", folder.name)
        code, out, err = owl("export", llama, "-o", folder, *options)
        assert (code, "parity, newcomer generating" in out) == (0, True), err
    assert owl("verify", quick)[0] == 0
    opened = inference.open_deployment(quick)
    assert (opened.target, opened.vocab, opened.precision) == ("for-newcomer", 320, "quick")
    assert opened.max_context == 512
    assert opened.size_bytes == (quick / "newcomer.json").stat().st_size

    for folder in (quick, plain):
        code, _, err = owl(
            "eval", folder, "--perplexity", text_file, "--windows", 1, "--window", 512
        )
        assert code == 0, err
    bench = ("bench", quick, "--baseline", plain, "--pairs", 8)
    code, out, err = owl(*bench, "-o", tmp_path / "result", "--save-baseline", tmp_path / "b.json")
    assert (code, "newcomer" in out) == (0, True), err
    code, out, err = owl(*bench, "--check", tmp_path / "b.json")
    assert code == 0, err
    (quick / "newcomer.json").write_text(json.dumps({"ms": 8, "width": 320}))
    assert owl(*bench, "--check", tmp_path / "b.json")[0] == 2  # it was changed
    assert owl("verify", quick)[0] == 1

    page = tmp_path / "report.html"
    code, _, err = owl("report", tmp_path / "result", "-o", page)
    assert code == 0, err
    text = page.read_text()
    assert "--newcomer: #123456;" in text
    assert "--newcomer: #fedcba;" in text
    assert "var(--newcomer)" in text  # in the pictures
    assert "Deploy" in text


@pytest.mark.usefixtures("newcomer")
def test_what_is_no_graph_needs_its_engine(owl, llama, tmp_path, monkeypatch):
    row = replace(ENGINES["newcomer"], package="no-such-package")
    monkeypatch.setitem(ENGINES, "newcomer", row)
    code, _, err = owl("export", llama, "-o", tmp_path / "out", "-t", "for-newcomer")
    assert (code, "The engine 'newcomer' is not installed." in err) == (4, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("newcomer")
def test_a_graph_for_an_engine_from_outside(owl, tmp_path, monkeypatch):
    """The other kind: an ONNX graph of ours, opened by a driver that is there already."""
    own = ENGINES["onnxruntime"]
    row = Engine("rival", own.driver, own.package, ("rival",), "Any use.", Ink("#1", "#2", "o"))
    monkeypatch.setitem(ENGINES, "rival", row)
    target = TARGETS["onnxruntime"]
    rival = Target(target.build, target.precisions, "rival", "the rival")
    monkeypatch.setitem(TARGETS, "rival", rival)
    model = tiny.write_llama(tmp_path / "model")
    code, out, err = owl("export", model, "-o", tmp_path / "out", "--target", "rival")
    assert (code, "parity, rival generating" in out) == (0, True), err
    assert inference.engine_for(inference.open_deployment(tmp_path / "out").target) == row
