"""The real SparseML 1.8 (transformers 4.40) and llm-compressor read what we write."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from owl_deploy.compression.run import Calibration, prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.data.text import calibration_windows, load_tokenizer, tokenize
from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input
from owl_deploy.models.checkpoint import WEIGHTS
from tests import tiny
from tests.slow.environments import environment, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PROMPT = "The capital of France is Paris, and the capital of Germany is"

LOAD = """
import json, sys
import numpy as np, torch
from sparseml.core.recipe import Recipe
from sparseml.transformers import SparseAutoModelForCausalLM, SparseAutoTokenizer
folder, prompt, out = sys.argv[1:]
model = SparseAutoModelForCausalLM.from_pretrained(folder).eval()
ids = SparseAutoTokenizer.from_pretrained(folder)(prompt, return_tensors="pt")["input_ids"]
with torch.no_grad():
    np.save(out, model(ids).logits[0].numpy())
modifier = Recipe.create_instance(folder + "/recipe.yaml").stages[0].modifiers[0]
print()
print(json.dumps({"ids": ids[0].tolist(), "type": modifier.type, "arguments": modifier.args}))
"""


COUNT = """
found = {}
for name, module in model.named_modules():
    if isinstance(module, torch.nn.Linear):
        block = ".".join(name.split(".")[:3])  # or the head
        zeros, total = found.get(block, (0, 0))
        found[block] = (zeros + int((module.weight == 0).sum()), total + module.weight.numel())
print()
print(json.dumps({block: zeros / total for block, (zeros, total) in found.items()}))
"""

ONE_SHOT = {
    "sparseml": """
import json, sys
import torch
import sparseml.core.session as session
from sparseml.core.framework import Framework
from sparseml.transformers import SparseAutoModelForCausalLM
dense, recipe, windows = sys.argv[1:]
model = SparseAutoModelForCausalLM.from_pretrained(dense).eval()
rows = torch.tensor(json.loads(windows)).unsqueeze(1)
data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
session.create_session()
session.apply(
    framework=Framework.pytorch, recipe=recipe, model=model, calib_data=data, start=-1,
    copy_data=False,
)
""",
    "llmcompressor": """
import json, sys
import torch
from datasets import Dataset
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM
dense, recipe, windows = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(dense)
rows = json.loads(windows)
data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
oneshot(
    model=model, dataset=data, recipe=recipe, max_seq_length=len(rows[0]),
    num_calibration_samples=len(rows), shuffle_calibration_samples=False,
)
""",
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    source = demo_input()
    text = Calibration(str(source / CALIBRATION), samples=2, sequence_length=512)
    prune(source / MODEL, folder, PruneSettings.checked(allocation="owl", sparsity=0.7), text)
    return folder


@pytest.mark.filterwarnings("default")
def test_the_pruned_demo_model_loads_and_gives_the_same_logits(pruned, tmp_path):
    out = run(environment("sparseml"), LOAD, pruned, PROMPT, tmp_path / "logits.npy")
    found = json.loads(out.splitlines()[-1])

    ids = load_tokenizer(pruned)(PROMPT)["input_ids"]
    assert found["ids"] == ids
    model = transformers.AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    assert np.abs(np.load(tmp_path / "logits.npy") - expected).max() < 1e-3

    manifest = json.loads((pruned / "owl.json").read_text())
    assert found["type"] == "WandaPruningModifier"
    assert found["arguments"]["sparsity"] == [block["sparsity"] for block in manifest["blocks"]]
    assert found["arguments"]["targets"] == [block["name"] for block in manifest["blocks"]]


def one_shot(library, model, resolved):
    """The share of zeros in each block and in the head after the library applied the recipe."""
    tokens = tokenize(load_tokenizer(model), tiny.text())
    windows = json.dumps(calibration_windows(tokens, 3, 64, 0).tolist())
    out = run(environment(library), ONE_SHOT[library] + COUNT, model, resolved, windows)
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("library", ONE_SHOT)
@pytest.mark.parametrize(
    ("method", "structure", "allocation"),
    [
        ("wanda", "unstructured", "owl"),
        ("sparsegpt", "unstructured", "owl"),
        ("wanda", "unstructured", "fisher"),
        ("wanda", "4:8", "owl"),
        ("sparsegpt", "4:8", "fisher"),
        ("sparsegpt", "2:4", "owl"),
    ],
)
def test_their_one_shot_applies_our_resolved_recipe(
    tmp_path, text_file, method, structure, allocation, library
):
    """Rows of a thousand weights and more: the libraries round each row's count down."""
    model = tiny.write_llama(
        tmp_path / "dense", hidden_size=1024, intermediate_size=2048, num_hidden_layers=3
    )
    settings = PruneSettings.checked(
        method=method, structure=structure, allocation=allocation, outlier_multiple=2
    )
    text = Calibration(str(text_file), samples=3, sequence_length=64)
    manifest = prune(model, tmp_path / "ours", settings, text).to_json()
    found = one_shot(library, model, tmp_path / "ours" / "recipe.yaml")
    for block in manifest["blocks"]:
        assert found[block["name"]] == pytest.approx(block["sparsity"], abs=1e-3)
    head = load_file(model / WEIGHTS)["model.embed_tokens.weight"]
    assert found["lm_head"] == float((head == 0).double().mean())  # as it was


@pytest.mark.parametrize("library", ONE_SHOT)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_their_one_shot_prunes_the_head_where_our_recipe_does(tmp_path, text_file, method, library):
    model = tiny.write_llama(
        tmp_path / "dense", hidden_size=1024, intermediate_size=2048, tie_word_embeddings=False
    )
    settings = PruneSettings.checked(method=method, allocation="uniform", head_sparsity=0.3)
    text = Calibration(str(text_file), samples=3, sequence_length=64)
    prune(model, tmp_path / "ours", settings, text)
    found = one_shot(library, model, tmp_path / "ours" / "recipe.yaml")
    assert found["lm_head"] == pytest.approx(0.3, abs=1e-3)
    assert found["model.layers.1"] == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("library", ONE_SHOT)
def test_their_one_shot_leaves_dense_what_our_recipe_skips(tmp_path, text_file, library):
    model = tiny.write_llama(tmp_path / "dense", hidden_size=1024, intermediate_size=2048)
    settings = PruneSettings.checked(allocation="uniform", skip=("model.layers.0",))
    text = Calibration(str(text_file), samples=3, sequence_length=64)
    prune(model, tmp_path / "ours", settings, text)
    assert "ignore" in (tmp_path / "ours" / "recipe.yaml").read_text()
    found = one_shot(library, model, tmp_path / "ours" / "recipe.yaml")
    dense = load_file(model / WEIGHTS).items()
    block = [one.flatten() for name, one in dense if "layers.0." in name and one.ndim == 2]
    zeros = float((torch.cat(block) == 0).double().mean())  # of a tiny model some are
    assert zeros < 0.1
    assert found["model.layers.0"] == pytest.approx(zeros, abs=1e-6)
    assert found["model.layers.1"] == pytest.approx(0.7, abs=1e-3)


TRAIN = """
import json, sys
import torch
import sparseml.core.session as session
from sparseml.core.framework import Framework
from sparseml.core.session import callbacks
from sparseml.transformers import SparseAutoModelForCausalLM
dense, recipe = sys.argv[1:]
model = SparseAutoModelForCausalLM.from_pretrained(dense)
optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
session.create_session()
session.initialize(
    framework=Framework.pytorch, recipe=recipe, model=model, optimizer=optimizer, start=0.0,
    steps_per_epoch=10, copy_data=False,
)
ids = torch.tensor([[5, 6, 7]])
callbacks.batch_start(batch_data=ids)
loss = model(ids, labels=ids).loss
loss.backward()
callbacks.loss_calculated(loss=loss)
callbacks.optim_pre_step()
optimizer.step()
callbacks.optim_post_step()
callbacks.batch_end()
print()
print(json.dumps([n for n, p in model.named_parameters() if "norm" in n and (p == 0).any()]))
"""


def test_sparsemls_training_applies_our_magnitude_recipe(tmp_path):
    """Magnitude is for training there: the first step removes the weights, and no others."""
    model = tiny.write_llama(
        tmp_path / "dense", hidden_size=256, intermediate_size=512, tie_word_embeddings=False
    )
    tensors = load_file(model / WEIGHTS)
    apart = {name: value + 1e-3 * torch.randn(value.shape) for name, value in tensors.items()}
    save_file(apart, model / WEIGHTS, metadata={"format": "pt"})  # no ties, of which it removes all
    settings = PruneSettings.checked(
        method="magnitude", allocation="linear", head_sparsity=0.3, skip=("model.layers.1",)
    )
    manifest = prune(model, tmp_path / "ours", settings, None).to_json()
    out = run(environment("sparseml"), TRAIN + COUNT, model, tmp_path / "ours" / "recipe.yaml")
    norms, _, found = out.splitlines()[-3:]
    assert json.loads(norms) == []
    for block in [*manifest["blocks"], manifest["head"]]:
        assert json.loads(found)[block["name"]] == pytest.approx(block["sparsity"], abs=1e-3)
