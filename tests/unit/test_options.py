from pathlib import Path
from typing import get_args

import pytest

from owl_deploy import options
from owl_deploy.export.targets import TARGETS


def is_path(annotation):
    return annotation is Path or any(map(is_path, get_args(annotation)))


def test_no_path_may_be_empty():
    annotated = {k: one for k, one in vars(options).items() if hasattr(one, "__metadata__")}
    found = {name: one for name, one in annotated.items() if is_path(one)}
    assert {"Output", "Models", "Dense", "Page"} <= set(found)
    for one in found.values():
        assert one.__metadata__[0].parser is options.path


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("prune", "", "-o", "out"), "model"),
        (("prune", "model", "-o", ""), "--output"),
        (("finetune", "model", "-o", "out", "--text", "text", "--teacher", ""), "--teacher"),
        (("sweep", "", "-o", "out", "-c", "text", "-p", "text"), "model"),
        (("sweep", "model", "-o", "out", "-c", "text", "-p", "text", "--ray", ""), "--ray"),
        (("sweep", "model", "-o", "out", "-c", "text", "-p", "text", "--store", ""), "--store"),
        (("prune", "model", "-o", "out", "-c", ""), "--calibration"),
        (("export", "model", "-o", "out", "-c", ""), "--calibration"),
        (("bench", "deployment", "--max-loss", ""), "--max-loss"),
        (("bench", "deployment", "-b", ""), "--baseline"),
        (("verify", ""), "deployment"),
        (("report", "result", "-o", ""), "--output"),
        (("recipes", "show", ""), "name"),
        (("recipes", "validate", ""), "name"),
    ],
)
def test_an_empty_one_is_named(owl, words, named):
    code, _, err = owl(*words)
    assert (code, "it is empty; perhaps a variable is not set." in err) == (2, True), err
    assert f"Invalid value for '{named}'" in err


@pytest.mark.parametrize(
    ("verb", "option", "default"),
    [
        ("prune", "--head-sparsity", "[none]"),
        ("prune", "--skip", "[none]"),
        ("finetune", "--max-minutes", "[no limit]"),
        ("eval", "--batch-size", "[windows by free memory, 1 request]"),
        ("generate", "--seed", "[another each time]"),
    ],
)
def test_the_help_says_what_is_done_without(owl, verb, option, default):
    code, out, _ = owl(verb, "--help")
    after = " ".join(out.split(f"  {option} ", 1)[1].split())
    assert (code, default in after[:300]) == (0, True), after[:300]


def test_the_help_names_what_the_tables_have():
    targets = options.Target.__metadata__[0].help
    precisions = options.Precision.__metadata__[0].help
    for name, target in TARGETS.items():
        assert name in targets
        assert name in precisions
        for precision in target.precisions:
            assert precision in precisions
