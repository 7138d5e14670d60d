import json
import shutil

import numpy as np
import pytest
import torch

from owl_deploy.data import tokens
from owl_deploy.data.text import load_tokenizer, tokenize
from owl_deploy.data.tokens import load_tokens
from owl_deploy.errors import BadInput
from owl_deploy.utils.cache import cache_path
from tests import tiny


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache folder of its own, where every text counts as a long one."""
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "_LEAST_BYTES", 0)
    return tmp_path / "cache" / "tokens"


@pytest.fixture
def sources(tmp_path):
    """A folder of sources with a folder in it, a hidden one, and what is no text."""
    folder = tmp_path / "src"
    for name, content in (
        ("b.py", "The mill"),
        ("a.py", "The river"),
        ("deep/c.txt", "A small boat"),
        (".git/config", "hidden"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    (folder / "compiled.pyc").write_bytes(b"\xff\x00\xfe")
    return folder


@pytest.fixture
def words(llama):
    """The text of tokens."""
    return lambda ids: load_tokenizer(llama).decode(ids.tolist())


def nothing(*_, **__):
    raise AssertionError("the text was tokenized once more")


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["src"], ["The river", "The mill", "A small boat"]),
        (["src/*.py"], ["The river", "The mill"]),
        (["src/**/*.txt", "src/b.py"], ["A small boat", "The mill"]),
        (["src/b.py", "src/a.py"], ["The mill", "The river"]),
        (["src", "src/a.py"], ["The mill", "A small boat", "The river"]),
    ],
    ids=str,
)
def test_files_stand_as_they_are_named_and_each_once(
    cache, sources, llama, words, monkeypatch, named, expected
):
    monkeypatch.chdir(sources.parent)
    assert words(load_tokens(llama, named)) == "\n\n".join(expected)


def test_what_is_no_text_is_left_out_and_said(cache, sources, llama, capsys):
    load_tokens(llama, [str(sources)])
    assert "3 of 4 files are UTF-8 text" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(BadInput, match="not UTF-8"):
        load_tokens(llama, [str(sources / "compiled.pyc")])


def test_one_file_gives_the_tokens_of_its_text(cache, llama, text_file):
    expected = tokenize(load_tokenizer(llama), text_file.read_text())
    assert torch.equal(load_tokens(llama, [str(text_file)]).long(), expected)


def test_a_text_is_tokenized_once(cache, sources, llama, monkeypatch):
    first = load_tokens(llama, [str(sources)])
    (kept,) = cache.iterdir()
    monkeypatch.setattr(tokens, "_tokenized", nothing)
    assert torch.equal(load_tokens(llama, [str(sources)]), first)
    assert np.load(kept).tolist() == first.tolist()


def test_another_text_or_tokenizer_is_tokenized_anew(cache, sources, llama, tmp_path):
    load_tokens(llama, [str(sources)])
    (sources / "a.py").write_text("The clock")
    load_tokens(llama, [str(sources)])
    (sources / "new.py").write_text("The tide")
    load_tokens(llama, [str(sources)])
    other = tmp_path / "other"
    tiny.write_tokenizer(other, vocabulary=300)
    (other / "config.json").write_text((llama / "config.json").read_text())
    load_tokens(other, [str(sources)])
    assert len(list(cache.iterdir())) == 4


def test_how_special_tokens_are_read_is_part_of_the_tokenizer(cache, sources, llama, tmp_path):
    (sources / "a.py").write_text("The river</s>")
    plain = load_tokens(llama, [str(sources)])
    other = shutil.copytree(llama, tmp_path / "other")
    config = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(
        json.dumps(config | {"split_special_tokens": True})
    )
    assert len(load_tokens(other, [str(sources)])) > len(plain)


def test_the_special_tokens_that_a_template_writes_are_part_of_it(cache, llama, tmp_path):
    lines = tmp_path / "chats.jsonl"
    chat = [{"role": "user", "content": "The tide"}]
    lines.write_text("\n".join([json.dumps({"messages": chat})] * 200))
    ends = []
    for number, end in enumerate(("</s>", "<s>")):
        model = shutil.copytree(llama, tmp_path / str(number))
        config = json.loads((model / "tokenizer_config.json").read_text())
        template = "{{ messages[0]['content'] }}{{ eos_token }}"
        told = {"eos_token": end, "chat_template": template}
        (model / "tokenizer_config.json").write_text(json.dumps(config | told))
        ends.append(load_tokens(model, [str(lines)])[-1].item())
    assert ends[0] != ends[1]


def test_a_template_that_writes_the_time_is_asked_once(cache, llama, tmp_path):
    """So that a run that resumes the next day has the tokens that it began with."""
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": [{"role": "u", "content": "x"}]}))
    model = shutil.copytree(llama, tmp_path / "model")
    config = json.loads((model / "tokenizer_config.json").read_text())
    template = "{{ strftime_now('%H:%M:%S.%f') }}" * 4
    config |= {"chat_template": template}
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    first, second = (load_tokens(model, [str(tmp_path / "chats.jsonl")]) for _ in range(2))
    assert first.tolist() == second.tolist()


@pytest.mark.parametrize("left", [0, 20, 100])
def test_a_damaged_file_of_the_cache_is_made_again(cache, sources, llama, left):
    whole = load_tokens(llama, [str(sources)]).clone()
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:left])
    assert torch.equal(load_tokens(llama, [str(sources)]), whole)


def test_a_cache_that_cannot_be_written_costs_only_time(cache, sources, llama, monkeypatch):
    cache.parent.write_text("a file where the folder would be")
    assert len(load_tokens(llama, [str(sources)])) > 0


def test_a_short_text_leaves_nothing(llama, sources, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    load_tokens(llama, [str(sources)])
    assert not cache_path().exists()


@pytest.mark.parametrize("source", ["", "no/*.py", "empty"])
def test_where_no_text_is(llama, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no text file .* a folder or a pattern"):
        load_tokens(llama, [source])


def test_no_source_at_all(llama):
    with pytest.raises(BadInput, match="Nothing says on what text"):
        load_tokens(llama, [])
