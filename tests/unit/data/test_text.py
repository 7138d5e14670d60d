import json

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from owl_deploy.data import text
from owl_deploy.errors import BadInput
from owl_deploy.utils.artefact import write_json


def test_calibration_windows_do_not_overlap_and_follow_the_seed():
    tokens = torch.arange(105)
    found = text.calibration_windows(tokens, 6, 10, seed=3)
    assert found.shape == (6, 10)
    assert len(set(found.flatten().tolist())) == 60
    assert torch.equal(found, text.calibration_windows(tokens, 6, 10, seed=3))
    assert not torch.equal(found, text.calibration_windows(tokens, 6, 10, seed=4))


def test_a_text_too_short_for_the_samples():
    with pytest.raises(BadInput, match="10 windows of 10 tokens, not 11"):
        text.calibration_windows(torch.arange(105), 11, 10, seed=0)


def test_evaluation_windows_are_the_first_ones():
    tokens = torch.arange(105)
    assert text.evaluation_windows(tokens, 10, None).shape == (10, 10)
    assert text.evaluation_windows(tokens, 10, 2).flatten().tolist() == list(range(20))
    assert text.evaluation_windows(tokens, 10, 99).shape == (10, 10)
    with pytest.raises(BadInput, match="less than one window"):
        text.evaluation_windows(tokens, 106, None)


def load_text(source, tokenizer=None):
    """The text to prune on."""
    return "\n\n".join(
        text.read_document(one, tokenizer) for one in text.training_documents(source)
    )


@pytest.mark.parametrize("source", ["no-such-file.txt", "wikitex", "hf:a:b:c", "hf:a::c:d"])
def test_a_source_that_does_not_exist(source):
    with pytest.raises(BadInput):
        load_text(source)


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BadInput, match="not UTF-8"):
        load_text(str(tmp_path / "a.txt"))


class Rows(list):
    def take(self, count):
        return Rows(self[:count])


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds one data set for every name, and notes what was asked for."""
    asked = []

    def load_dataset(name, config, *, split, revision, streaming):
        asked.append((name, config, split, revision))
        column = {"allenai/c4": "text", "Salesforce/wikitext": "text"}.get(name, "sentence")
        return Rows({column: f"{split} {number}"} for number in range(3000))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("column", "says"), [(["a b", None, "c"], ""), (["a", 0], "holds no text, but int")]
)
def test_documents_that_are_not_there_or_no_text(monkeypatch, column, says):
    rows = Rows({"text": one} for one in column)
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: rows)
    if says:
        with pytest.raises(BadInput, match=says):
            load_text("hf:org/set:en:test:text")
    else:
        assert load_text("hf:org/set:en:test:text") == "a b\n\nc"


def test_a_data_set_is_joined_by_blank_lines(hub):
    found = load_text("hf:org/set:en:test:sentence")
    assert found.startswith("test 0\n\ntest 1\n\n")
    assert hub == [("org/set", "en", "test", None)]
    with pytest.raises(BadInput, match="test split of the data set org/set could not be read"):
        load_text("hf:org/set:en:test:title")


def test_what_is_not_read_of_a_data_set_is_said(hub, monkeypatch, capsys):
    monkeypatch.setattr(text, "_STREAMED_DOCUMENTS", 3000)
    load_text("hf:org/set:en:test:sentence")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(text, "_STREAMED_DOCUMENTS", 2)
    assert load_text("hf:org/set:en:test:sentence") == "test 0\n\ntest 1"
    assert "org/set: of its rows the first 2 are read" in " ".join(capsys.readouterr().err.split())


# The protocols as they stand in SparseGPT's datautils.py, which Wanda and OWL took over.
@pytest.mark.parametrize(
    ("source", "split", "separator", "documents", "windows"),
    [
        ("wikitext", "test", "\n\n", 3000, None),
        ("c4", "validation", " ", 1100, 256),
        ("ptb", "test", " ", 3000, None),
    ],
)
def test_evaluation_reads_what_the_papers_read(hub, source, split, separator, documents, windows):
    found, most = text.load_evaluation_text(source, None)
    assert found == separator.join(f"{split} {number}" for number in range(documents))
    assert most == windows
    assert hub[0][2] == split


@pytest.mark.parametrize("source", ["wikitext", "c4", "ptb"])
def test_a_model_is_never_pruned_on_the_text_that_evaluates_it(hub, source):
    assert load_text(source).startswith("train 0")


def test_a_file_called_like_a_data_set_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c4").write_text("mine")
    assert text.load_evaluation_text("c4", None) == ("mine", None)


def test_a_folder_called_like_a_data_set_is_read_too(tmp_path, monkeypatch):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "a.txt").write_text("of mine")
    monkeypatch.chdir(tmp_path)
    assert load_text("c4") == "of mine"
    assert text.load_evaluation_text("c4", None) == ("of mine", None)


def test_special_tokens_stand_once_around_the_text(llama):
    tokenizer = text.load_tokenizer(llama)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    plain = text.tokenize(tokenizer, "The river. The mill.")
    assert plain[0] != 0
    assert text.tokenize(tokenizer, "The river. The mill.", special=True).tolist() == [
        0,
        *plain.tolist(),
    ]


@pytest.mark.parametrize("wrong", ["many", [512]])
def test_a_tokenizer_whose_settings_are_wrong_is_refused(llama, tmp_path, wrong):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_text((llama / name).read_text())
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", settings | {"model_max_length": wrong})
    with pytest.raises(BadInput, match="holds no tokenizer that can be read"):
        text.load_tokenizer(tmp_path)
