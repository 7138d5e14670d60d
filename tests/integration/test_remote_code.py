"""A model's folder that brings Python code: it is not run, not even if somebody says yes."""

import json
import shutil

import pytest

VERBS = {
    "prune": ("prune", "{}", "-o", "out", "-c", "{text}", "--samples", 1, "--sequence-length", 32),
    "export": ("export", "{}", "-o", "out"),
    "eval": ("eval", "{}", "-p", "{text}", "--window", 32, "--windows", 1),
    "finetune": ("finetune", "{}", "-o", "out", "--text", "{text}", "--max-steps", 1),
}
NAMED = {
    "tokenizer_config.json": {
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_class": "Evil",
    },
    "config.json": {
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"},
        "model_type": "evil",
    },
}


@pytest.fixture
def asked(monkeypatch):
    """The questions that somebody was asked, and said yes to."""
    questions = []

    def answer(question=""):
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", answer)
    return questions


@pytest.fixture
def model(llama, tmp_path, monkeypatch):
    """Makes a copy of the tiny model, one of whose files names a class in its own evil.py."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.chdir(tmp_path)

    def make(file, **values):
        folder = shutil.copytree(llama, tmp_path / "model")
        ran = tmp_path / "ran"
        (folder / "evil.py").write_text(
            f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nclass Evil: pass\n"
        )
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | values))
        return folder, ran

    return make


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("file", NAMED)
def test_code_in_a_folder_is_neither_run_nor_asked_about(owl, model, asked, text_file, verb, file):
    folder, ran = model(file, **NAMED[file])
    words = [str(word).format(folder, text=text_file) for word in VERBS[verb]]
    code, _, said = owl(*words)
    assert not ran.exists()
    assert not asked
    assert code == 2, said


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        # Loads a model of the Hub that the adapter names, with its code.
        (
            {"peft_type": "SHADOW", "shadow_model": "evil/repo"},
            "of PEFT's type 'SHADOW'. Give a LoRA one",
        ),
        # Imports a module that the adapter names.
        (
            {"peft_type": "LORA", "megatron_config": {"a": 1}, "megatron_core": "evil"},
            "is for Megatron. Give one for Transformers",
        ),
    ],
)
def test_an_adapter_of_another_kind_is_not_opened(
    owl, llama, asked, text_file, tmp_path, config, complaint
):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").touch()
    code, _, said = owl("eval", llama, "--adapter", adapter, "-p", text_file, "--window", 32)
    assert (code, asked) == (2, [])
    assert complaint in " ".join(said.split())
