"""`owl serve` as a process, asked by OpenAI's own client."""

import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import openai
import pytest

from owl_deploy.export.targets import export
from owl_deploy.inference.generate import generate
from owl_deploy.inference.sampling import Sampling
from tests import tiny

TEMPLATE = "{% for one in messages %}{{ one['content'] }}{% endfor %}"
KEY = "secret"


@pytest.fixture(scope="module")
def deployment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model = tiny.write_llama(folder / "model")
    config = model / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": TEMPLATE}))
    export(model, folder / "tiny", target="onnxruntime")
    return folder / "tiny"


@contextmanager
def serving(deployment, *options):
    """`owl serve` as a process, and a client of it."""
    command = [sys.executable, "-m", "owl_deploy", "serve", deployment, "--port", "0", "-t", "1"]
    env = os.environ | {"OWL_API_KEY": KEY}
    with subprocess.Popen(
        [*command, *options], stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        try:
            url = process.stderr.readline().split()[-1]
            assert url.startswith("http://127.0.0.1:"), process.stderr.read()
            with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=120) as client:
                yield process, client
        finally:
            process.kill()


@pytest.fixture
def served(deployment):
    with serving(deployment) as found:
        yield found


def test_a_server_that_has_just_said_where_it_is_ends_on_sigterm(served):
    process, _ = served
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0


def test_a_deployment_answers_as_owl_generate_does_and_ends_on_sigterm(deployment, served):
    process, client = served
    assert [model.id for model in client.models.list()] == ["tiny"]
    prompt, greedy = "The river ran", {"model": "tiny", "temperature": 0}
    text = "".join(generate(deployment, prompt, Sampling(max_new_tokens=12), threads=1))
    whole = client.completions.create(prompt=prompt, max_tokens=12, **greedy)
    assert whole.choices[0].text == text
    messages = [{"role": "user", "content": prompt}]
    chat = client.chat.completions.create(messages=messages, max_tokens=12, **greedy)
    assert chat.choices[0].message.content == text
    twice = [
        client.completions.create(model="tiny", prompt=prompt, max_tokens=12, seed=7)
        for _ in range(2)
    ]
    assert twice[0].choices == twice[1].choices
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(prompt=prompt * 400, **greedy)
    assert raised.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()

    parts = client.completions.create(prompt=prompt, max_tokens=12, stream=True, **greedy)
    first = next(parts).choices[0].text
    process.send_signal(signal.SIGTERM)
    assert first + "".join(part.choices[0].text for part in parts) == text
    client.close()
    assert process.wait(60) == 0
