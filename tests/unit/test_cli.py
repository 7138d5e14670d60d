"""Where each option of a verb arrives: a name that settings do not know would be dropped unsaid."""

import inspect
from functools import reduce
from importlib import import_module
from itertools import dropwhile
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.main import get_command

from owl_deploy import api, cli
from owl_deploy.cli import app
from owl_deploy.serve.server import serve

# What stands in for the work, and notes its arguments by their names.
WORK = {
    "owl_deploy.api": ("prune", "evaluate", "finetune", "run_gate"),
    "owl_deploy.bench.decision": ("check_measured",),
    "owl_deploy.bench.measure": ("check_ahead",),
    "owl_deploy.bench.show": ("show_outcome",),
    "owl_deploy.cli": ("_dense", "_emit", "_on_cluster"),
    "owl_deploy.evaluate.show": ("show",),
    "owl_deploy.finetune.show": ("show",),
    "owl_deploy.distributed.pipeline": ("execute",),
    "owl_deploy.compression.show": ("show",),
    "owl_deploy.serve.server": ("serve",),
    "owl_deploy.distributed.sweep": ("tasks", "check_here", "run"),
}
# A verb's arguments and the options that it needs; then by option what is given (with the others
# that it belongs to), where it arrives, and as what.
TABLE = {
    "prune model -o out": [
        ("--output other", "output", Path("other")),
        ("--recipe owl-sparsegpt-50", "settings.method", "sparsegpt"),
        ("--recipe owl-sparsegpt-50", "origin.file", "owl-sparsegpt-50.yaml"),
        ("--method alps", "settings.method", "alps"),
        ("--allocation linear", "settings.allocation", "linear"),
        ("--sparsity 0.4", "settings.sparsity", 0.4),
        ("--structure 2:4", "settings.structure", "2:4"),
        ("--outlier-multiple 7 -a owl", "settings.outlier_multiple", 7.0),
        ("--spread 0.02 -a owl", "settings.spread", 0.02),
        ("--skip up_proj --skip lm_head", "settings.skip", ("up_proj", "lm_head")),
        ("--head-sparsity 0.3", "settings.head_sparsity", 0.3),
        ("--refit", "settings.refit", True),
        ("--reconstruct 3", "settings.reconstruct", 3),
        ("--asymmetric -m sparsegpt", "settings.asymmetric", True),
        ("--no-asymmetric --bits 4", "settings.asymmetric", False),
        ("--bits 4", "settings.bits", 4),
        ("--group 64 --bits 4", "settings.bits_group", 64),
        ("--head-bits 3 --bits 4", "settings.head_bits", 3),
        ("--budget 3.5", "settings.budget", "3.5"),
        ("--calibration text", "calibration.source", "text"),
        ("--samples 9 -c text", "calibration.samples", 9),
        ("--sequence-length 99 -c text", "calibration.sequence_length", 99),
        ("--seed 5 -c text", "calibration.seed", 5),
        ("--device cpu", "hardware.device", "cpu"),
        ("--dtype bfloat16", "hardware.dtype", "bfloat16"),
        ("--batch-size 3", "hardware.batch_size", 3),
        ("--resume", "resume", True),
        ("--force", "force", True),
        ("--json", "as_json", True),
        ("--block-size 64 -m sparsegpt", "settings.options.block_size", 64),
        ("--dampening 0.2 -m sparsegpt", "settings.options.dampening", 0.2),
        ("--dampening 0.2 -m alps", "settings.options.dampening", 0.2),
        ("--preserve-mask -m sparsegpt", "settings.options.preserve_mask", True),
        ("--iterations 9 -m alps", "settings.options.iterations", 9),
    ],
    "eval model": [
        ("--perplexity text", "asked.text", "text"),
        ("--tasks piqa,boolq --tasks rte", "asked.tasks", ("piqa", "boolq", "rte")),
        ("--tasks-path mine", "asked.tasks_path", Path("mine")),
        ("--allow-code", "asked.allow_code", True),
        ("--limit 9", "asked.limit", 9),
        ("--every 4", "asked.every", 4),
        ("--window 99", "asked.window", 99),
        ("--windows 7", "asked.windows", 7),
        ("--divergence", "asked.divergence", True),
        ("--device cpu", "asked.hardware.device", "cpu"),
        ("--dtype bfloat16", "asked.hardware.dtype", "bfloat16"),
        ("--batch-size 3", "asked.hardware.batch_size", 3),
        ("--blockwise", "asked.blockwise", True),
        ("--no-blockwise", "asked.blockwise", False),
        ("--engine owl", "asked.engine", "owl"),
        ("--threads 3", "asked.threads", 3),
        ("--trust-library", "asked.trust_library", True),
        ("--adapter mine", "asked.adapter", Path("mine")),
        ("--json", "as_json", True),
    ],
    "finetune model -o out --text one": [
        ("--output other", "output", Path("other")),
        ("--text two --text three", "text", ["one", "two", "three"]),
        ("--method masked", "settings.method", "masked"),
        ("--merge masked", "settings.merge", "masked"),
        ("--teacher dense", "teacher", "dense"),
        ("--temperature 2", "settings.temperature", 2.0),
        ("--teacher-weight 0.3", "settings.teacher_weight", 0.3),
        ("--feature-weight 0.4", "settings.feature_weight", 0.4),
        ("--teacher-top 7", "settings.teacher_top", 7),
        ("--max-steps 9", "settings.max_steps", 9),
        ("--max-minutes 1.5", "settings.max_minutes", 1.5),
        ("--learning-rate 0.01", "settings.learning_rate", 0.01),
        ("--batch-size 3", "settings.batch_size", 3),
        ("--sequence-length 99", "settings.sequence_length", 99),
        ("--gradient-accumulation 5", "settings.gradient_accumulation", 5),
        ("--warmup 0", "settings.warmup", 0.0),
        ("--seed 5", "settings.seed", 5),
        ("--block-group 2", "settings.block_group", 2),
        ("--shard", "settings.shard", True),
        ("--rank 4", "settings.rank", 4),
        ("--alpha 24", "settings.alpha", 24),
        ("--dropout 0", "settings.dropout", 0.0),
        ("--target-module up --target-module o", "settings.target_modules", ("up", "o")),
        ("--dtype bfloat16", "settings.dtype", "bfloat16"),
        ("--resume", "resume", True),
        ("--force", "force", True),
        ("--json", "as_json", True),
    ],
    "bench sparse": [
        ("--baseline one -b two", "plan.baselines", (Path("one"), Path("two"))),
        ("--dense model -b one", "plan.baselines", (Path("one"), Path("made"))),
        ("--dense model", "checkpoint", Path("model")),
        ("--engine owl --engine fake", "plan.engines", ("owl", "fake")),
        ("--scenario prefill --scenario decode@9", "plan.scenarios", ("prefill", "decode@9")),
        ("--context 99 --context 64", "plan.context", (99, 64)),
        ("--prompt 99 --prompt 64", "plan.prompt", (99, 64)),
        ("--batch 2 --batch 4", "plan.batch", (2, 4)),
        ("--streams 3 --streams 4", "plan.streams", (3, 4)),
        ("--clients 2 --clients 3", "plan.clients", (2, 3)),
        ("--new-tokens 9", "plan.new_tokens", 9),
        ("--draft lookup", "plan.draft", "lookup"),
        ("--draft lookup", "plan.scenarios", ("answers",)),
        ("--draft-tokens 5", "plan.draft_tokens", 5),
        ("--prompts file", "plan.prompts", Path("file")),
        ("--threads 3", "plan.threads", 3),
        ("--trust-library", "plan.trust_library", True),
        ("--trust-library --dense model", "trust_library", True),
        ("--pairs 9", "plan.pairs", 9),
        ("--looks 2", "plan.looks", 2),
        ("--time-limit 1.5", "plan.time_limit_s", 1.5),
        ("--save-baseline file", "save", Path("file")),
        ("--check file", "check", Path("file")),
        ("--margin 0.2", "margin", 0.2),
        ("--max-loss 2%", "max_loss", 0.02),
        ("--max-loss 2%", "in_json", (0.02, None)),
        ("--quality-metric boolq", "quality_metric", "boolq"),
        ("--quality-metric boolq", "in_json", (None, "boolq")),
        ("--quality-metric boolq", "key", "boolq"),  # checked before anything is timed
        ("--strict --check file", "strict", True),
        ("--summary file", "summary", Path("file")),
        ("--output out", "output", Path("out")),
        ("--force", "force", True),
        ("--json", "as_json", True),
    ],
    "serve deployment": [
        ("--host 0.0.0.0", "host", "0.0.0.0"),
        ("--port 99", "port", 99),
        ("--batch 3", "batch", 3),
        ("--waiting 5", "waiting", 5),
        ("--context 99", "context", 99),
        ("--name one --name two", "names", ["one", "two"]),
        ("--threads 3", "threads", 3),
        ("--trust-library", "trust_library", True),
        ("--draft lookup", "draft", "lookup"),
        ("--draft-tokens 5", "draft_tokens", 5),
        ("--log", "log", True),
    ],
    "sweep model -o out -c text -p text": [
        ("--output other", "output", Path("other")),
        ("--calibration other", "calibration", "other"),
        ("--perplexity other", "text", "other"),
        ("--plan plan.yaml", "plan.prompt", (99,)),
        ("--method alps --method wanda", "plan.methods", ("alps", "wanda")),
        ("--allocation linear --allocation owl", "plan.allocations", ("linear", "owl")),
        ("--sparsity 0.4 --sparsity 0.6", "plan.sparsities", (0.4, 0.6)),
        ("--target owl:int8 --target owl", "plan.targets", ("owl:int8", "owl")),
        ("--pairs 9", "plan.pairs", 9),
        ("--threads 3", "plan.threads", 3),
        ("--samples 9", "plan.samples", 9),
        ("--sequence-length 99", "plan.sequence_length", 99),
        ("--window 99", "plan.window", 99),
        ("--windows 7", "plan.windows", 7),
        ("--ray auto", "address", "auto"),
        ("--store s3://bucket --ray auto", "store", "s3://bucket"),
        ("--needs prune=1gpu --ray auto", "needs", ["prune=1gpu"]),
        ("--dry-run", "result.states", []),
        ("--json --dry-run", "as_json", True),
    ],
}
ROWS = [
    pytest.param(line, *row, id=f"{line.split()[0]} {row[0]}")
    for line, rows in TABLE.items()
    for row in rows
]


@pytest.fixture
def arrived(owl, monkeypatch, tmp_path):
    """Run a command line; give what its work was called with, all arguments by their names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.yaml").write_text("prompt: [99]")
    found = {}

    def to_json(*how):
        found["in_json"] = how
        return {}

    def exit_code(strict):
        found["strict"] = strict
        return 0

    outcome = SimpleNamespace(to_json=to_json, exit_code=exit_code)
    made = SimpleNamespace(output=Path("made"), target="owl")
    results = {"_dense": (made,), "evaluate": [], "tasks": (), "run": (None, [])}

    def noting(name, function):
        def note(*arguments, **named):
            given = inspect.signature(function).bind(*arguments, **named).arguments
            found.update(given | found)  # what the first was given: later ones show it
            for then in given.keys() & {"prepare", "show"}:
                given[then]()
            return results.get(name, outcome)

        return note

    for path, names in WORK.items():
        module = import_module(path)
        for name in names:
            monkeypatch.setitem(vars(module), name, noting(name, getattr(module, name)))

    def run(*words):
        found.clear()
        code, _, err = owl(*words)
        assert code == 0, err
        return dict(found)

    return run


def at(found, where):
    """What lies at a dotted path of attributes and keys; None where it ends before."""

    def inner(value, name):
        return value.get(name) if isinstance(value, dict) else getattr(value, name, None)

    return reduce(inner, where.split("."), found)


def options(line):
    """All spellings of each option of a verb but the hidden ones, the long one first."""
    verb = get_command(app).commands[line.split()[0]]
    known = [one for one in verb.params if one.param_type_name == "option" and not one.hidden]
    spelled = [sorted(one.opts, key=len, reverse=True) for one in known]
    return spelled + [[name] for one in known for name in one.secondary_opts]


@pytest.mark.parametrize("line", TABLE)
def test_every_option_has_a_row(line):
    assert {option.split()[0] for option, *_ in TABLE[line]} == {one[0] for one in options(line)}


@pytest.mark.parametrize(("line", "option", "where", "expected"), ROWS)
def test_an_option_arrives(arrived, line, option, where, expected):
    long, *rest = option.split()
    beside = dropwhile(lambda word: not word.startswith("-"), rest)  # the options that it needs
    assert at(arrived(*line.split(), *beside), where) != expected
    for name in next(one for one in options(line) if one[0] == long):
        assert at(arrived(*line.split(), name, *rest), where) == expected


def defaults_of(settings):
    """By the names of a settings class's fields, or of a function's parameters."""
    if hasattr(settings, "model_fields"):
        return {name: field.default for name, field in settings.model_fields.items()}
    return {name: one.default for name, one in inspect.signature(settings).parameters.items()}


@pytest.mark.parametrize(
    ("verb", "settings"),
    [
        ("prune", api.Calibration),
        ("prune", api.Hardware),
        ("finetune", api.FinetuneSettings),
        ("evaluate", api.EvaluationSettings),
        ("bench", api.BenchPlan),
        ("serve", serve),
        ("generate", api.Sampling),
    ],
)
def test_the_settings_defaults_are_the_command_lines(verb, settings):
    """An option without a default of its own leaves the choice to the settings."""
    known, told = defaults_of(settings), 0
    for name, option in inspect.signature(getattr(cli, verb)).parameters.items():
        if name in known and option.default not in (None, inspect.Parameter.empty):
            assert option.default == known[name], name
            told += 1
    assert told
