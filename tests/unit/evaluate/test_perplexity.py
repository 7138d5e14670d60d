import collections
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

from owl_deploy.data.text import load_tokenizer
from owl_deploy.errors import BadInput
from owl_deploy.evaluate.perplexity import fits, from_losses, perplexity, windows_of
from owl_deploy.evaluate.settings import EvaluationSettings
from owl_deploy.models.checkpoint import open_checkpoint
from owl_deploy.models.measurements import measurement
from owl_deploy.utils.artefact import write_json
from owl_deploy.utils.hardware import Hardware
from tests import alike, tiny


def test_equals_the_loss_of_transformers_window_by_window(llama, text_file):
    found = perplexity(llama, EvaluationSettings(str(text_file), window=300, windows=3))
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    ids = torch.tensor(load_tokenizer(llama)(tiny.text())["input_ids"][:900]).view(3, 300)
    with torch.no_grad():
        losses = [model(part.unsqueeze(0), labels=part.unsqueeze(0)).loss.item() for part in ids]
    assert found.value == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)
    assert (found.windows, found.window, found.tokens) == (3, 300, 897)
    assert found.losses == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_a_block_at_a_time_equals_the_whole_model(tmp_path, text_file, family):
    model = tiny.write_model(family, tmp_path / "model")
    options = {"window": 300, "windows": 3}
    whole = perplexity(model, EvaluationSettings(str(text_file), **options, blockwise=False))
    streamed = perplexity(model, EvaluationSettings(str(text_file), **options, blockwise=True))
    assert streamed.losses == pytest.approx(whole.losses, rel=1e-6)


def test_an_opt_whose_tokens_are_narrower_than_its_blocks(tmp_path, text_file):
    """OPT-350m: what is between them is in no block, and not in the table either."""
    model = tiny.write_model("opt", tmp_path / "model", word_embed_proj_dim=32)
    asked = EvaluationSettings(str(text_file), window=300, windows=2)
    whole = perplexity(model, replace(asked, blockwise=False))
    streamed = perplexity(model, replace(asked, blockwise=True))
    assert streamed.value == pytest.approx(whole.value, rel=1e-6)


@pytest.mark.parametrize("family", ["gemma3_text", "llama"])
def test_a_cap_on_logits_counts_where_the_model_reads_it(tmp_path, text_file, family):
    model = tiny.write_model(family, tmp_path / "model", final_logit_softcapping=0.5)
    found = perplexity(model, EvaluationSettings(str(text_file), window=300, windows=1))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([load_tokenizer(model)(tiny.text())["input_ids"][:300]])
    with torch.no_grad():
        assert found.value == pytest.approx(loaded(ids, labels=ids).loss.exp().item(), rel=1e-5)


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_added_up_in_float32(llama, text_file, dtype, blockwise):
    exact = perplexity(llama, EvaluationSettings(str(text_file), window=300, windows=3))
    found = perplexity(
        llama,
        EvaluationSettings(
            str(text_file),
            window=300,
            windows=3,
            hardware=Hardware("cpu", dtype),
            blockwise=blockwise,
        ),
    )
    assert found.value == pytest.approx(exact.value, rel=5e-3)
    assert found.value != exact.value


def test_blocks_stream_where_the_model_does_not_fit(llama, text_file, monkeypatch):
    checkpoint = open_checkpoint(llama)
    size = sum(checkpoint.read(name).numel() for name in checkpoint.files)
    assert checkpoint.weights() == size
    memory = collections.namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(4 * size))  # bytes
    cpu = torch.device("cpu")
    assert fits(checkpoint, torch.bfloat16, cpu)
    assert not fits(checkpoint, torch.float32, cpu)
    monkeypatch.setattr("owl_deploy.evaluate.perplexity.load_model", None)  # not to be called
    perplexity(llama, EvaluationSettings(str(text_file), window=300, windows=1))


def test_a_result_is_kept_where_owl_wrote_the_folder(llama, text_file, tmp_path, monkeypatch):
    ours = Path(shutil.copytree(llama, tmp_path / "model"))
    write_json(ours / "owl.json", {"kind": "checkpoint"})
    before = (ours / "owl.json").read_bytes()
    found = perplexity(ours, EvaluationSettings(str(text_file), window=300, windows=1))
    recorded = measurement(ours, "perplexity")
    assert (recorded["value"], recorded["dtype"]) == (found.value, "float32")
    perplexity(llama, EvaluationSettings(str(text_file), window=300, windows=1))
    assert measurement(llama, "perplexity") is None
    assert (ours / "owl.json").read_bytes() == before  # a finished manifest stays as it is

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("owl_deploy.evaluate.subject.keep_measurement", refuse)
    assert perplexity(ours, EvaluationSettings(str(text_file), window=300, windows=1)) == found


def test_a_tokenizer_that_begins_a_text_does_so_once(llama, text_file, tmp_path):
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    tokenizer = load_tokenizer(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save_pretrained(folder)
    windows = windows_of(folder, str(text_file), 64, None)
    assert windows[0, 0] == 0
    assert (windows[1:] != 0).all()


@pytest.mark.parametrize("nll", [1e6, math.inf, math.nan])
def test_a_loss_that_is_no_number_is_an_error(nll):
    with pytest.raises(BadInput, match="nats a token"):
        from_losses("text", [nll], torch.zeros(1, 10))


@pytest.mark.parametrize(
    ("window", "limit", "complaint"),
    [
        (100_000, None, "takes 512 tokens, not 100000"),
        (1, None, "too small"),
        (64, 0, "at least 1"),
    ],
)
def test_windows_that_cannot_be(llama, text_file, window, limit, complaint):
    with pytest.raises(BadInput, match=complaint):
        perplexity(llama, EvaluationSettings(str(text_file), window=window, windows=limit))


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_window_that_the_model_does_not_take(tmp_path, text_file, family):
    model = tiny.write_model(family, tmp_path / "model", max_position_embeddings=128)
    with pytest.raises(BadInput, match=r"takes 128 tokens, not 129.*smaller --window"):
        perplexity(model, EvaluationSettings(str(text_file), window=129))


def test_the_tokens_that_were_read_are_told_from_others(llama, text_file):
    first, same, other = (
        perplexity(llama, EvaluationSettings(str(text_file), window=window, windows=2))
        for window in (40, 40, 41)
    )
    assert first == same
    assert first.token_ids_sha256 != other.token_ids_sha256


def other_text(folder: Path) -> dict[str, object]:
    (folder / "other.txt").write_text(tiny.text()[1:])
    return {"text": str(folder / "other.txt")}


def adapter(folder: Path) -> dict[str, object]:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text("{}")
    return {"adapter": folder}


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("text", other_text),
        ("text", lambda _: {"windows": 3}),
        ("--window", lambda _: {"window": 65}),
        ("dtype", lambda _: {"hardware": Hardware(dtype="bfloat16")}),
        ("adapter", adapter),
    ],
)
def test_processes_that_would_read_different_things_are_refused(
    llama, text_file, tmp_path, monkeypatch, what, other
):
    asked = EvaluationSettings(str(text_file), window=64, windows=4)
    others = replace(asked, **other(tmp_path))
    said = alike.refused(
        monkeypatch,
        lambda ranks: perplexity(llama, asked, ranks),
        lambda ranks: perplexity(llama, others, ranks),
    )
    assert said.startswith(f"Not all processes of this run have the same {what}. Give every node")


def test_processes_with_different_models_are_refused(llama, text_file, tmp_path, monkeypatch):
    asked = EvaluationSettings(str(text_file), window=64, windows=4)
    other = shutil.copytree(llama, tmp_path / "other")
    said = alike.refused(
        monkeypatch,
        lambda ranks: perplexity(llama, asked, ranks),
        lambda ranks: perplexity(other, asked, ranks),
    )
    assert "the same model." in said
