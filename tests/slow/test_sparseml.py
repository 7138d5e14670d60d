"""The real SparseML 1.8 (transformers 4.40) reads what we write, and computes the same."""

import json

import numpy as np
import pytest
import torch
import transformers

from owl_deploy import recipe
from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input
from owl_deploy.prune.run import Calibration, prune
from owl_deploy.text import load_tokenizer
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


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pruned") / "checkpoint"
    source = demo_input()
    text = Calibration(str(source / CALIBRATION), samples=2, sequence_length=512)
    prune(source / MODEL, folder, recipe.settings(sparsity=0.7), text)
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
