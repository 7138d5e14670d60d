"""Prompts are the tokens that Transformers makes of them: it is the oracle."""

import base64
import json
import struct

import pytest
import transformers
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from owl_deploy.errors import BadInput
from owl_deploy.models.tokenizer import ChatTemplate, Tokenizer
from tests import tiny

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'A <river> & a "bridge"\n'},
    {"role": "assistant", "content": "<think>So.</think>Both."},
    {"role": "user", "content": "Größe?"},
]
TEMPLATES = {
    "line breaks": """{% for message in messages %}
  {% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% else %}
{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "a text in another": """{% for message in messages %}
{%- if '</think>' in message.content %}{{ message.content.split('</think>')[-1].lstrip('\n') }}
{%- else %}{{ bos_token }}{{ message.content | trim }}{% endif %}{% endfor %}""",
    "state and a loop's end": """{% set ns = namespace(found=false, seen={}) %}
{% for message in messages[::-1] %}
{% if message.role == 'assistant' %}{% set ns.found = true %}{% break %}{% endif %}
{{ loop.index0 }} {{ message.role.upper() }} {% endfor %}{{ ns.found }}
{% set all = dict(a=1, b=none) %}{{ all.items() | list }} {{ tools is none }}{{ documents }}""",
    "JSON": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}{{ messages[0].items() }}",
    "what is trained on": """{% for message in messages %}{{ message.role }}:
{% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}
{% endfor %}""",
    "a scope of its own": """{% set x = 'a' %}
{% generation %}{% set x = 'b' %}{% endgeneration %}{{ x }}
{{ dict.fromkeys(['a']) }}{% set ns = namespace(self=1) %}{% set ns.a = 2 %}{{ ns.self + ns.a }}""",
    "no such token": "{{ cls_token }}|{{ unk_token is defined }}|{{ pad_token }}",
}


@pytest.fixture
def folder(tmp_path):
    tiny.write_tokenizer(tmp_path)
    return tmp_path


def add_template(folder, template):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_messages_are_rendered_as_transformers_does(folder, template):
    theirs = add_template(folder, template)
    text = theirs.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True)
    assert ChatTemplate(folder).render(TURNS) == text
    ours = Tokenizer(folder)
    assert ours.encode(text, special=False) == theirs.encode(text, add_special_tokens=False)


def test_a_template_in_an_older_place(folder):
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False},
                "chat_template": [
                    {"name": "tool_use", "template": "tools"},
                    {"name": "default", "template": "{{ bos_token }}{{ messages[0].content }}"},
                ],
            }
        )
    )
    assert ChatTemplate(folder).render(TURNS) == "<s>Be brief."
    (folder / "chat_template.jinja").write_text("newer")
    assert ChatTemplate(folder).render(TURNS) == "newer"


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected"),
        ("{{ messages[0].content.nothing.more }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ dict.mro() }}", "mro"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__call__=1) %}", "keeps nothing"),
        ("{% set ns = namespace(self=1) %}{% set ns._x = 1 %}", "keeps nothing"),
        ("{{ range(10 ** 9) | list }}", "too big|range"),
    ],
)
def test_what_a_template_does_not_take(folder, template, complaint):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput, match=f"does not take these messages .*{complaint}"):
        ChatTemplate(folder).render(TURNS)


def test_no_template(folder):
    template = ChatTemplate(folder)
    assert template.source is None
    with pytest.raises(BadInput, match="has no chat template"):
        template.render(TURNS)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
@pytest.mark.parametrize(
    "text", ["one", " one", "[X]one two[X] three", "a\n\n b", "", "<s>", "日本", "x" * 3000]
)
def test_words_of_sentencepiece_begin_as_transformers_has_it(tmp_path, scheme, text):
    letters = {letter: n for n, letter in enumerate(["<unk>", *"▁abcehilnortuvwx\n"])}
    found = Library(models.BPE(letters, [], unk_token="<unk>"))
    found.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    found.decoder = decoders.Metaspace(prepend_scheme=scheme)
    found.add_special_tokens(["<s>", "</s>", "[X]"])
    found.enable_truncation(4)
    found.enable_padding(length=50)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=found, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    for special in (True, False):
        assert ours.encode(text, special=special) == theirs.encode(text, add_special_tokens=special)


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("eos", [None, True, False])
def test_the_settings_put_nothing_around_a_text(folder, bos, eos):
    """What tokenizer.json says goes before."""
    file = folder / "tokenizer_config.json"
    told = {"add_bos_token": bos, "add_eos_token": eos}
    settings = json.loads(file.read_text()) | {k: v for k, v in told.items() if v is not None}
    file.write_text(json.dumps(settings))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert Tokenizer(folder).encode("a river") == theirs.encode("a river")


def test_tokens_that_older_versions_kept_apart(folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    apart = {"bos_token": {"content": "<s>"}, "eos_token": "another"}
    (folder / "special_tokens_map.json").write_text(json.dumps(apart))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ eos_token }}")
    assert ChatTemplate(folder).render(TURNS) == "<s></s>"


@pytest.mark.parametrize(("content", "complaint"), [(None, "has no tokenizer"), ("{", "is not a")])
def test_a_folder_without_a_tokenizer(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BadInput, match=complaint):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_panics_is_told_in_one_sentence(tmp_path):
    """Rust's panics are no `Exception` in Python."""
    tiny.write_tokenizer(tmp_path)
    file = tmp_path / "tokenizer.json"
    charsmap = base64.b64encode(struct.pack("<II", 4, 0) + b"a\0").decode()
    normalizer = {"type": "Precompiled", "precompiled_charsmap": charsmap}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": normalizer}))
    with pytest.raises(BadInput, match=r"tokenizer\.json fails on this text"):
        Tokenizer(tmp_path).encode("The river")
