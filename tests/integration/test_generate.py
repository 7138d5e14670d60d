"""`owl generate`: where a prompt comes from, how long an answer is, on how many threads."""

import io
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from owl_deploy import inference
from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput
from owl_deploy.export.parity import Session
from owl_deploy.export.targets import export
from owl_deploy.inference import open_deployment
from owl_deploy.inference.drivers import onnxruntime as driver
from owl_deploy.inference.generate import generate
from owl_deploy.inference.rows import PromptTooLong, Speed
from owl_deploy.inference.sampling import Sampling
from owl_deploy.inference.writer import open_writer
from owl_deploy.utils.artefact import MANIFEST, sha256, write_json
from tests import fresh, tiny

PROMPT = "The river ran"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    export(tiny.write_llama(folder / "model"), folder / "out", target="onnxruntime")
    config = folder / "out" / "genai_config.json"
    values = json.loads(config.read_text())
    values["model"] |= {"eos_token_id": [], "pad_token_id": 0}  # no early end
    config.write_text(json.dumps(values))
    manifest = json.loads((folder / "out" / MANIFEST).read_text())
    manifest["files"][config.name]["sha256"] = sha256(config)
    write_json(folder / "out" / MANIFEST, manifest)
    return folder / "out"


@pytest.fixture
def stdin(monkeypatch):
    def put(content):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))

    return put


def test_a_prompt_from_a_file_or_stdin_says_the_same(owl, deployment, tmp_path, stdin):
    file = tmp_path / "prompt.txt"
    given = owl("generate", deployment, PROMPT, "-n", 8)[1]
    assert given
    for content in (PROMPT, PROMPT + "\n", PROMPT + "\r\n", "\ufeff" + PROMPT):
        file.write_bytes(content.encode())
        assert owl("generate", deployment, "--prompt-file", file, "-n", 8)[:2] == (0, given)
        for asked in (("-",), ("--prompt-file", "-")):
            stdin(content.encode())
            assert owl("generate", deployment, *asked, "-n", 8)[:2] == (0, given)


def test_a_prompt_that_is_not_utf8_is_said_in_a_sentence(deployment):
    # As the command line brings it: bytes that are no text are surrogates in Python.
    command = [sys.executable, "-m", "owl_deploy", "generate", deployment, b"caf\xe9"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("owl: The prompt in the arguments is not UTF-8 text")
    assert done.stderr.count("\n") == 1


def test_a_closed_stdin_is_said_in_a_sentence(owl, deployment, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)  # as Python has it then
    code, _, err = owl("generate", deployment, "-")
    assert (code, "stdin is closed" in err) == (2, True), err


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "prompt.txt is empty"),
        (b"\n", "prompt.txt is empty"),
        (b"caf\xe9", "prompt.txt is not UTF-8 text"),
        ("The river".encode("utf-16-le"), "prompt.txt has a NUL character"),
    ],
)
def test_a_prompt_file_that_is_none_is_said_in_a_sentence(
    owl, deployment, tmp_path, content, complaint
):
    file = tmp_path / "prompt.txt"
    if content is not None:
        file.write_bytes(content)
    code, out, err = owl("generate", deployment, "--prompt-file", file)
    assert (code, out, complaint in err) == (2, "", True), err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "There is no prompt. Give it after the deployment"),
        (("x", "--prompt-file", "y"), "There are two prompts"),
        (("caf\udce9",), "is not UTF-8 text"),  # how Python hands on bytes that are none
        ((PROMPT, "-n", 0), "-n 0 is impossible"),
        ((PROMPT, "-n", 0), "Give 1 to 2147483647, or -1 to go on until the context is full"),
        ((PROMPT, "-n", -2), "-2 is impossible"),
        ((PROMPT, "-n", 510), "give --max-new-tokens (-n) 506 or less; -1 takes all"),
        ((PROMPT * 150,), "leave no room for a new one: there is room for 512 in all"),
        ((PROMPT, "--threads", 0), "--threads 0 is too small"),
        ((PROMPT, "--do-sample", "--top-p", 2), "--top-p 2.0 is impossible. Give 0 to 1."),
        ((PROMPT, "--system", "x"), "--system is for a chat. Give --chat as well"),
    ],
)
def test_what_cannot_be_generated_is_said_in_a_sentence(owl, deployment, options, complaint):
    code, out, err = owl("generate", deployment, *options)
    assert (code, out, complaint.replace("-n 0", "--max-new-tokens 0") in err) == (2, "", True), err


@pytest.mark.parametrize(
    ("prompt", "options", "new_tokens", "full"),
    [
        (PROMPT, ("-n", 7), 7, False),
        (PROMPT, (), 128, False),
        (PROMPT, ("-n", -1), None, True),
        (PROMPT * 80, (), None, True),  # the default is no demand: it gives way to the context
    ],
)
def test_an_answer_ends_where_it_was_asked_to_or_with_the_context(
    owl, deployment, prompt, options, new_tokens, full
):
    code, out, _ = owl("generate", deployment, prompt, *options, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["context_full"] == full
    assert found["new_tokens"] == (new_tokens or 512 - found["prompt_tokens"])
    assert ("the context is full" in owl("generate", deployment, prompt, *options)[2]) == full


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def generating(deployment, count):
    """A generation that has begun, and what it has added to this process's threads."""
    before = threads()
    running = generate(deployment, PROMPT, Sampling(), Speed(), threads=count)
    next(running)
    return running, threads() - before


def tell_threads_of_generating(deployment):
    held = [generating(deployment, count) for count in (1, 1, 4)]
    inference.process.default_threads = lambda: 6
    held.append(generating(deployment, None))
    print(*(added for _, added in held))


def tell_threads_of_parity(deployment):
    held: list[Any] = []
    added = []
    for count in (1, 1, 4):
        inference.default_threads = lambda count=count: count
        before = threads()
        held.append(Session(deployment))
        added.append(threads() - before)
    print(*added)


def told_threads(work, deployment):
    """What each adds beyond one thread, but for the first, with what starts once a process.

    In a process of its own: here threads of earlier tests end whenever their garbage is collected.
    """
    done = fresh.ran(work, deployment)
    assert done.returncode == 0, done.stderr
    _, one, *more = map(int, done.stdout.split())
    return [added - one for added in more]


def test_generate_runs_on_the_threads_asked_for(deployment):
    assert told_threads(tell_threads_of_generating, deployment) == [3, 5]


def test_parity_is_checked_on_as_many_threads_as_a_benchmark_has(deployment):
    assert told_threads(tell_threads_of_parity, deployment) == [3]


def test_eval_runs_on_the_threads_asked_for(owl, deployment, text_file, loads):
    asked = ("eval", deployment, "--perplexity", text_file, "--window", 64, "--windows", 1)
    assert owl(*asked, "--threads", 3)[0] == 0
    assert owl(*asked)[0] == 0
    assert [load["threads"] for load in loads] == [3, inference.default_threads()]
    assert owl(*asked, "--threads", 0)[0] == 2


def test_a_model_without_a_chat_template_is_not_asked_in_one(owl, deployment):
    code, _, err = owl("generate", deployment, PROMPT, "--chat")
    assert (code, "has no chat template. Leave out --chat." in err) == (2, True)


@pytest.mark.parametrize("option", ["--temperature=0.5", "--top-k=5", "--top-p=0.5", "--seed=1"])
def test_what_is_of_sampling_is_refused_without(owl, deployment, option):
    code, _, err = owl("generate", deployment, PROMPT, option)
    assert (code, "Give --do-sample as well" in err) == (2, True)


def test_what_is_left_out_of_a_sampling_is_the_models(owl, deployment, tmp_path):
    """Whose top_k of 1 is the likeliest token's text, as is a temperature of 0."""
    folder = shutil.copytree(deployment, tmp_path / "sampled")
    (folder / MANIFEST).unlink()
    config = folder / "genai_config.json"
    values = json.loads(config.read_text())
    values["search"] |= {"do_sample": True, "top_k": 1}
    config.write_text(json.dumps(values))
    greedy = owl("generate", deployment, PROMPT, "-n", 24)[1]
    for where, options in (
        (folder, ()),
        (deployment, ("--top-k", 1)),
        (deployment, ("--temperature", 0)),
    ):
        asked = ("generate", where, PROMPT, "-n", 24, "--do-sample", *options)
        assert owl(*asked)[:2] == (0, greedy)
    for where, options in ((deployment, ()), (folder, ("--top-k", 0, "--temperature", 2))):
        asked = ("generate", where, PROMPT, "-n", 24, "--do-sample", "--seed", 1, *options)
        code, drawn, _ = owl(*asked)
        assert (code, drawn != greedy) == (0, True)


def test_one_token_is_told_without_a_speed(owl, deployment):
    code, _, err = owl("generate", deployment, PROMPT, "-n", 1)
    assert (code, "tokens/s" in err) == (0, False)
    found = json.loads(owl("generate", deployment, PROMPT, "-n", 1, "--json")[1])
    assert (found["new_tokens"], found["tokens_per_s"]) == (1, None)


def test_a_text_ends_before_a_string(owl, deployment):
    text = owl("generate", deployment, PROMPT, "-n", 24)[1]
    stop = text[8:11]
    asked = ("generate", deployment, PROMPT, "-n", 24, "--stop", "never said", "--stop", stop)
    assert owl(*asked)[:2] == (0, text[: text.index(stop)])


def test_a_chat_may_begin_with_the_systems_message(owl, deployment, tmp_path):
    folder = shutil.copytree(deployment, tmp_path / "chat")
    template = "{% for one in messages %}{{ one['role'] }}: {{ one['content'] }}; {% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    chat = ("generate", folder, "Hi", "-n", 8, "--chat")
    plain = ("generate", folder, "-n", 8)
    for options, said in (((), ""), (("--system", "Be brief."), "system: Be brief.; ")):
        assert owl(*chat, *options)[:2] == owl(*plain, f"{said}user: Hi; ")[:2]
    assert "The text of --system is empty" in owl(*chat, "--system", "")[2]


def test_ctrl_c_says_nothing_of_outputs_that_there_are_not(owl, deployment, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("owl_deploy.inference.generate.open_deployment", interrupted)
    code, _, err = owl("generate", deployment, PROMPT)
    assert (code, err) == (130, "owl: interrupted; the text ends here.\n")
    monkeypatch.setattr("owl_deploy.serve.server.open_deployment", interrupted)
    code, _, err = owl("serve", deployment, "--port", 0)
    assert (code, err) == (130, "owl: interrupted; nothing is served any more.\n")


def test_the_example_says_how_it_is_called():
    command = [sys.executable, "examples/generate.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "usage: generate.py" in done.stderr) == (2, True)
    assert "Traceback" not in done.stderr


def test_a_long_prompt_is_run_in_parts_to_the_same_end(deployment, monkeypatch):
    """Between them other threads run: a server answers for its health."""
    prompt, said = PROMPT * 30, []
    for part in (1000, 50, 7):
        monkeypatch.setattr(driver, "PROMPT_PART", part)
        speed = Speed()
        said.append(list(generate(deployment, prompt, Sampling(8), speed, threads=1)))
        assert speed.prompt_tokens > 64
    assert said[0] == said[1] == said[2]


def test_a_long_prompt_beside_a_draft_is_run_in_parts_too(deployment, monkeypatch):
    parts, append = [], driver.append
    monkeypatch.setattr(driver, "PROMPT_PART", 50)
    monkeypatch.setattr(
        driver, "append", lambda *asked: (parts.append(asked[1].shape[1]), append(*asked))
    )
    alone = list(generate(deployment, PROMPT * 30, Sampling(8), threads=1))
    assert max(parts) == 50
    parts.clear()
    drafted = list(generate(deployment, PROMPT * 30, Sampling(8), threads=1, draft="lookup"))
    assert max(parts) == 50
    assert drafted == alone


@pytest.fixture(scope="module")
def beginning(tmp_path_factory):
    """A deployment whose tokenizer puts a BOS before a text, as Llama's does."""
    folder = tmp_path_factory.mktemp("beginning")
    file = tiny.write_llama(folder / "model") / "tokenizer.json"
    values = json.loads(file.read_text())
    begun = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": begun,
        "pair": [*begun, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    file.write_text(json.dumps(values))
    export(folder / "model", folder / "out", target="onnxruntime")
    return folder


def test_a_text_is_begun_as_the_models_tokenizer_begins_it(beginning):
    """What is served is then what was evaluated; a chat template has its own beginning."""
    writer = open_writer(open_deployment(beginning / "out"), 1)
    tokens = load_tokenizer(beginning / "model").encode(PROMPT)
    assert tokens[0] == 0
    assert writer.row(PROMPT, Sampling(), Speed()).tokens == tokens
    assert writer.row(PROMPT, Sampling(), Speed(), templated=True).tokens == tokens[1:]


def test_a_prompt_without_tokens_is_refused(deployment):
    writer = open_writer(open_deployment(deployment), 1)
    with pytest.raises(BadInput, match="no tokens"):
        writer.row("", Sampling(), Speed(), templated=True)


def test_a_long_word_takes_no_longer_than_a_long_text(deployment):
    """onnxruntime-genai's own tokenizer would take minutes."""
    started = time.process_time()  # others take none of it
    with pytest.raises(PromptTooLong, match="tokens"):
        next(generate(deployment, PROMPT + 300_000 * "x"))
    assert time.process_time() - started < 30


def test_messages_are_the_tokens_that_they_were_trained_as(deployment, tmp_path):
    """onnxruntime-genai's own template engine finds no text in another, and keeps line breaks."""
    folder = shutil.copytree(deployment, tmp_path / "chat")
    template = """{% for one in messages %}
{% if 'river' in one.content %}{{ bos_token }}{{ one.content }}
{% endif %}{% endfor %}"""
    (folder / "chat_template.jinja").write_text(template)
    said = [{"role": "user", "content": PROMPT}]
    theirs = load_tokenizer(folder)
    tokens = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    writer = open_writer(open_deployment(folder), 1)
    row = writer.row(writer.chat_template.render(said), Sampling(2), Speed(), templated=True)
    assert row.tokens == tokens == theirs.encode(f"<s>{PROMPT}\n", add_special_tokens=False)


def test_more_rows_than_the_library_takes(deployment):
    with pytest.raises(BadInput, match="--batch 33 is not between 1 and 32"):
        open_writer(open_deployment(deployment), 1, batch=33)


def test_more_of_the_likeliest_than_there_are_tokens(deployment):
    sampling = Sampling(4, do_sample=True, top_k=10**6, seed=0)
    assert len(list(generate(deployment, PROMPT, sampling, threads=1))) == 4
