import dataclasses
import inspect
import pkgutil

import pytest
from pydantic import Field

from owl_deploy import cli
from owl_deploy.compression.methods import METHODS, Options, unknown_method
from owl_deploy.models.manifest import CheckpointManifest, read_manifest


@pytest.mark.parametrize("name", METHODS)
def test_a_row_names_a_function_and_says_what_each_option_is(name):
    row = METHODS[name]
    arguments = ["weight", "inputs", "sparsity", "group", "options"]
    assert list(inspect.signature(pkgutil.resolve_name(row.prune)).parameters) == arguments
    row.options()  # every option has a default
    assert all(field.description for field in row.options.model_fields.values())


def test_the_command_line_has_the_options_of_every_method(monkeypatch):
    class Own(Options):
        dampening: float = Field(default=0.5, description="of a spring")
        steps: int = Field(default=30, description="at most")

    row = dataclasses.replace(METHODS["wanda"], options=Own)
    monkeypatch.setitem(METHODS, "own", row)

    @cli._with_method_options
    def command(model: str, **options):
        pass

    found = inspect.signature(command).parameters
    own = ["block_size", "dampening", "preserve_mask", "iterations", "steps"]
    assert list(found) == ["model", *own]
    helps = {name: found[name].default.help for name in list(found)[1:]}
    assert helps == {
        "block_size": "Of sparsegpt: columns whose updates are applied together. [128]",
        "dampening": "Of sparsegpt: added to the Hessian's diagonal, as a share of its mean. "
        "[0.01] Of alps: added to the diagonal, as a share of it. [0.05] "
        "Of own: of a spring. [0.5]",
        "preserve_mask": "Of sparsegpt: weights that are zero already stay zero.",
        "iterations": "Of alps: iterations of the choice of weights. [20]",
        "steps": "Of own: at most. [30]",
    }
    assert found["steps"].annotation is int


def test_options_reach_their_method_and_no_other(owl, llama, text_file, tmp_path):
    command = ["prune", llama, "-o", tmp_path / "out", "-c", text_file, "--samples", 2]
    command += ["--sequence-length", 32, "--block-size", 32, "--preserve-mask"]
    code, _, err = owl(*command)
    assert (code, "The method wanda has no option 'block_size'. It has: none." in err) == (2, True)
    assert not (tmp_path / "out").exists()
    assert owl(*command, "--recipe", "owl-sparsegpt-60")[0] == 0
    manifest = read_manifest(tmp_path / "out", CheckpointManifest)
    expected = {"block_size": 32, "dampening": 0.01, "preserve_mask": True}
    assert manifest.settings.options == expected
    assert manifest.recipe["overrides"] == {"options": {"block_size": 32, "preserve_mask": True}}


@pytest.mark.parametrize("name", ["gptq", "AWQ", "rtn"])
def test_what_rounds_has_another_way(owl, name):
    code, _, err = owl("prune", "model", "-o", "out", "--method", name)
    said = f"'{name}' is no way to prune. To round as GPTQ does: owl quantize --bits 4."
    assert (code, said in " ".join(err.split())) == (2, True), err
    assert "Did you mean 'wanda'?" in str(unknown_method("wandb"))
