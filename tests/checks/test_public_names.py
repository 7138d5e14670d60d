"""The public API: one list of names in three forms, light to import, and the same at any time."""

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from owl_deploy import api

VERBS = ("bench", "evaluate", "export", "finetune", "generate", "prune", "verify")


def for_type_checkers() -> dict[str, str]:
    """What the module's block under TYPE_CHECKING imports: name to "module:attribute"."""
    tree = ast.parse(Path("owl_deploy/api.py").read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def complaint(code: str) -> str:
    """What Python says of `code` in a process of its own; nothing if all is well."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True).stderr


def test_the_three_lists_agree():
    assert for_type_checkers() == api.WHERE
    assert sorted(api.__all__) == sorted(api.WHERE)
    assert set(api.__all__) <= set(dir(api))
    assert {*VERBS} <= set(api.__all__)


@pytest.mark.parametrize("name", api.__all__)
def test_every_name_is_there_and_says_what_it_is(name):
    module, attribute = api.WHERE[name].split(":")
    value = getattr(api, name)
    assert value is getattr(import_module(module), attribute)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__module__ == module  # where it is written, and not where it passes through
        assert inspect.getdoc(value)


@pytest.mark.parametrize("name", VERBS)
def test_every_parameter_of_a_verb_is_typed_and_spoken_of(name):
    verb = inspect.unwrap(getattr(api, name))
    about = inspect.getdoc(verb) or ""
    signature = inspect.signature(verb)
    assert signature.return_annotation is not inspect.Parameter.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty
        assert parameter.name in about, parameter.name


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(AttributeError, match="has no attribute 'prun'"):
        api.prun  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prun'"):
        exec("from owl_deploy.api import prun")


def test_importing_it_is_light():
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "datasets", "numpy", "pydantic"}
    code = (
        f"import sys, owl_deploy.api; found = {heavy} & set(sys.modules); assert not found, found"
    )
    assert complaint(code) == ""


def test_a_verb_is_a_function_whatever_was_imported_before():
    code = (
        "import owl_deploy.bench.run, owl_deploy.inference.generate, owl_deploy.inference.verify\n"
        "from owl_deploy.api import bench, generate, verify\n"
        "assert all(map(callable, (bench, generate, verify)))"
    )
    assert complaint(code) == ""
