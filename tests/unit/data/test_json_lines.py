import json

import pytest
import torch

from owl_deploy.data import text, tokens
from owl_deploy.data.tokens import load_tokens
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.perplexity import windows_of

TEMPLATE = (
    "{% for one in messages %}<{{ one['role'] }}>{{ one['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CHAT = [{"role": "user", "content": "The mill?"}, {"role": "assistant", "content": "The river."}]
IN_TEMPLATE = "<user>The mill?</s><assistant>The river.</s>"


@pytest.fixture
def tokenizer(llama):
    found = text.load_tokenizer(llama)
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def chat(llama, tokenizer, tmp_path):
    """A folder with a model that has a chat template."""
    for file in llama.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def written(folder, *lines, name="some.jsonl"):
    file = folder / name
    file.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines))
    return file


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{"messages": CHAT}, {"messages": CHAT}], 2 * IN_TEMPLATE),
        ([{"text": "The tide"}, "", {"text": "A boat", "id": 1}], "The tide\n\nA boat"),
        ([{"text": "The tide\u2028"}, {"messages": CHAT}], "The tide\u2028\n\n" + IN_TEMPLATE),
        # A table has all columns in each line, and nothing in some.
        (
            [{"text": "The tide", "messages": None}, {"text": None, "messages": CHAT}],
            "The tide\n\n" + IN_TEMPLATE,
        ),
        # Others are texts as they stand.
        (['{"prompt": "a"}', "b"], '{"prompt": "a"}\nb'),
        (["[1]"], "[1]"),
        (["[" * 100_000], "[" * 100_000),
        # A byte order mark and a blank line go before; halves of a letter are no letter.
        (['\ufeff{"text": "The tide"}'], "The tide"),
        (["", {"text": "The tide"}], "The tide"),
        ([{"text": "Once \ud83d upon \ud83d\ude00"}], "Once \ufffd upon \U0001f600"),
        (["\ufeffplain"], "plain"),
        (["plain"], "plain"),
    ],
)
def test_what_the_lines_say(tmp_path, tokenizer, lines, expected):
    assert text.read_document(written(tmp_path, *lines), tokenizer) == expected


def test_only_files_of_json_lines_have_records(tmp_path, tokenizer):
    file = written(tmp_path, {"text": "a"}, name="some.txt")
    assert text.read_document(file, tokenizer) == '{"text": "a"}'


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([{"text": "a"}, "{"], "Line 2 of .*some.jsonl is no record"),
        ([{"text": "a"}, "[" * 100_000], "Line 2 of .* is no record"),
        ([{"version": 1}, {"text": "a"}], "Line 1 of .* is no record"),
        ([{"text": "a"}, {"prompt": "a"}], "Line 2 of .* is no record"),
        ([{"text": ["a"]}], "Line 1 of .* is no record"),
        ([{"messages": "Hello"}], "Line 1 of .* is no record"),
        ([{"text": "a"}, {"messages": [{"content": "a"}, 3]}], "Line 2 .* does not take"),
    ],
)
def test_what_is_no_record_is_told_by_its_line(tmp_path, tokenizer, lines, says):
    tokenizer.chat_template = "{{ messages[0]['role'] + '' }}{{ messages[1].no.such }}"
    with pytest.raises(BadInput, match=says):
        text.read_document(written(tmp_path, *lines), tokenizer)


def test_messages_need_a_template(tmp_path, llama):
    with pytest.raises(BadInput, match="no chat template"):
        load_tokens(llama, [str(written(tmp_path, {"messages": CHAT}))])


def test_rows_of_messages_on_the_hub_are_conversations(monkeypatch, tokenizer):
    class Rows(list):
        take = list.__getitem__

    monkeypatch.setattr(Rows, "take", lambda self, count: self[:count])
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(2 * [{"messages": CHAT}]))
    (document,) = text.training_documents("hf:org/chat:default:train:messages")
    assert text.read_document(document, tokenizer) == 2 * IN_TEMPLATE


def test_another_template_is_another_text(chat, tmp_path, monkeypatch):
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tokens, "_LEAST_BYTES", 0)
    source = str(written(tmp_path, {"messages": CHAT}))
    first = load_tokens(chat, [source])
    assert torch.equal(load_tokens(chat, [source]), first)
    tokenizer = text.load_tokenizer(chat)
    tokenizer.chat_template = TEMPLATE.replace("</s>", "")
    tokenizer.save_pretrained(chat)
    assert len(load_tokens(chat, [source])) != len(first)
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 2


def test_an_evaluation_reads_the_same_with_one_bos(chat, tokenizer, tmp_path):
    begins = tokenizer.bos_token
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    tokenizer.save_pretrained(chat)
    source = str(written(tmp_path, *10 * [{"messages": CHAT}]))
    (first,) = windows_of(chat, source, 16, 1).tolist()
    assert first == load_tokens(chat, [source])[:16].tolist()
    assert first.count(tokenizer.convert_tokens_to_ids(begins)) == 1
