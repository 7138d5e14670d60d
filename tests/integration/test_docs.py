"""What README and docs say runs: each command on a tiny model, and what cannot run here is parsed.

A command that is in neither list below is run, in the order of its page, in a folder with the
README's model, texts and outputs.
"""

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import typer
import yaml
from typer.main import get_command
from typer.testing import CliRunner

from owl_deploy import api
from owl_deploy.bench import machine
from owl_deploy.cli import app
from owl_deploy.distributed.sweep import read_plan
from owl_deploy.runtime import library_path
from tests import tiny

ROOT = Path.cwd()
README = Path("README.md")
PAGES = [README, Path("CONTRIBUTING.md"), *sorted(Path("docs").rglob("*.md"))]
SHELL = {"bash", "console", "sh", "shell"}

# What is not run, why, and what is looked at instead.
HERE = "makes or changes the environment that the tests run in"
LONG = "takes minutes to hours"
HUB = "reads the Hugging Face Hub"
SEVERAL = "starts several processes: see tests/integration/test_torchrun.py"
COMPILED = "needs an engine that has to be compiled: see tests/integration/test_llama_cpp.py"
ELSEWHERE = "is run by tests/slow/test_plain.py"
NOT_RUN = {
    r"make ": LONG,
    r"pip (install|wheel) ": HERE,
    r"sudo apt install ": HERE,
    r"(python -m venv|\.) \.venv": HERE,
    r"python benchmarks/": LONG,
    r"owl engines install ": LONG,
    r"owl serve ": "goes on until it is ended: see tests/integration/test_requests.py",
    r"owl (export|bench) .*gguf": COMPILED,
    r"owl sweep ": LONG,
    r"torchrun ": SEVERAL,
    r"owl .* wikitext$": HUB,
    r"owl .* --tasks ": HUB,
    r"(site=|g\+\+ |ln -sf|LD_LIBRARY_PATH=)": ELSEWHERE,
    r"from transformers import .*GgufConfig": "needs a GGUF; the demo's is expanded so",
}
# Options that make a verb small, after those that the page gives: the last one counts.
SMALLER = {
    "prune": "--samples 4 --sequence-length 64",
    "quantize": "--samples 4 --sequence-length 64",
    "eval": "--window 64 --windows 1",
    "finetune": "--sequence-length 64 --max-steps 1",
    "generate": "-n 4",
}
BENCH = "--context 64 --prompt 32"  # these add to what a page gives
DRAFTED = "--context 512 --new-tokens 2"  # for prompts that are real


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of the languages."""
    found = re.findall(r"^( *)```(\w+)\n(.*?)^\1```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(body) for _, language, body in found if language in languages]


def commands(page: Path) -> list[str]:
    """The command lines of a page, comments and line ends within taken out."""
    text = "\n".join(blocks(page, *SHELL)).replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*$", "", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip()]


def reason_not_to_run(command: str) -> str | None:
    return next((why for start, why in NOT_RUN.items() if re.match(start, command)), None)


def parse(command: str) -> None:
    """Fail for a verb, an option, a make target, an extra or a benchmark that does not exist."""
    words = shlex.split(command.partition(" < ")[0])
    if words[0] == "torchrun":
        words = ["owl", *words[words.index("owl_deploy") + 1 :]]
    if words[0] == "owl":
        verb, rest = get_command(app), words[1:]
        while group := getattr(verb, "commands", None):
            verb, rest = group[rest[0]], rest[1:]
        verb.make_context("owl", rest)  # parses, and runs nothing
    elif words[0] == "make":
        targets = re.search(r"^\.PHONY: (.*)$", Path("Makefile").read_text(), re.MULTILINE)
        assert targets is not None
        assert set(words[1:]) <= set(targets[1].split())
    elif command.startswith("python benchmarks/"):
        parse_of_script(Path(words[1]), words[2:])
    elif words[0] == "pip":
        extras = tomllib.loads(Path("pyproject.toml").read_text())["project"]
        asked = re.findall(r"\[([\w,]+)\]", command)
        assert {e for one in asked for e in one.split(",")} <= set(extras["optional-dependencies"])


class Parsed(Exception):
    """A script has read its arguments."""


def parse_of_script(script: Path, arguments: list[str]) -> None:
    """Have a script's own parser read its arguments; nothing after that is run."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(*given: Any, **named: Any) -> None:
        parse_args(*given, **named)
        raise Parsed

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop),
        mock.patch.object(sys, "argv", [str(script), *arguments]),
        mock.patch.object(sys, "path", [str(script.parent), *sys.path]),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except Parsed:
            return
        except SystemExit as refused:
            raise AssertionError(f"{script} refuses {arguments}") from refused
    raise AssertionError(f"{script} reads no arguments")


def smaller(command: str) -> list[str]:
    """The words of an `owl` command that a tiny model has enough text and time for."""
    words = shlex.split(command)[1:]
    verb = words[0]
    if verb == "bench":
        words += [] if "--save-baseline" in words or "--check" in words else ["--pairs", "1"]
        size = DRAFTED if "--draft" in words else BENCH
        words += [] if "fake" in Path("deployment").resolve().name else size.split()
    return words + SMALLER.get(verb, "").split()


def run(command: str) -> None:
    """Run a command line where we are; what it writes may be there from an earlier page."""
    for output in re.findall(r"(?:-o|--output) (\S+)", command):
        if Path(output).is_dir():
            shutil.rmtree(output)
    if command.startswith("owl ") and not re.search(r"[<>|]", command):
        done = CliRunner().invoke(app, smaller(command))
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.exception!r}"
        return
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    shell = subprocess.run(
        ["bash", "-c", command], env={"PATH": path}, capture_output=True, text=True, check=False
    )
    assert shell.returncode == 0, f"{command}\n{shell.stderr}"


def run_all(page: Path, known: set[str]) -> set[str]:
    """Run a page's commands but the `known` ones; returns those that it ran."""
    ran = set()
    for command in commands(page):
        if command not in known and reason_not_to_run(command) is None:
            run(command)
            ran.add(command)
    return ran


Work = tuple[Path, set[str]]


@pytest.fixture(scope="module")
def readme(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Work]:
    """The folder in which the README's commands have run, and these."""
    try:
        library_path()
    except api.EnvironmentFailed as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("readme")
    tiny.write_llama(folder / "MODEL")
    (folder / "text.txt").write_text(tiny.text())
    (folder / "held-out.txt").write_text(tiny.text(2000))
    (folder / "answers.jsonl").write_text(json.dumps({"text": tiny.text(1000)}))
    for name in ("src/one.py", "notes/old/one.md"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(tiny.text(1000))
    (folder / "examples").symlink_to(ROOT / "examples")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OWL_CACHE", str(folder / "cache"))
        patch.setattr(machine, "busy_cores", lambda seconds: 0.0)
        patch.setattr(machine, "read_bandwidth", lambda threads: 30.0)
        page = README.absolute()
        patch.chdir(folder)
        ran = run_all(page, set())
        patch.chdir(ROOT)
        yield folder, ran


@pytest.fixture
def work(readme: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Runs a page's commands and Python in a copy of the README's folder."""

    def work_through(page: Path) -> None:
        page, folder = ROOT / page, tmp_path / "work"
        shutil.copytree(readme[0], folder, symlinks=True)
        monkeypatch.chdir(folder)
        if page.stem == "gate":  # which asks for many rounds: an engine whose time costs none
            for name in ("deployment", "dense"):
                shutil.rmtree(name)
                Path(f"fake-{name}").mkdir()
                Path(name).symlink_to(f"fake-{name}")
                # Noise, or what a bare process takes, is now and then beyond a gate's margins.
                text = '{"decode_ms": 10, "prefill_ms": 50, "peak_bytes": 100000000}'
                Path(name, "fake.json").write_text(text)
        run_all(page, readme[1])
        for block in blocks(page, "python"):
            if reason_not_to_run(block) is None:
                exec(compile(block, str(page), "exec"), {})

    return work_through


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_command_is_known(page: Path) -> None:
    for command in commands(page):
        parse(command)


# The API's example is run, smaller, by test_api.py.
RUNNING = [
    page
    for page in PAGES
    if page.name not in ("README.md", "api.md")
    and "benchmarks" not in (page.stem, page.parent.name)
    and (blocks(page, "python") or not all(map(reason_not_to_run, commands(page))))
]


@pytest.mark.parametrize("page", RUNNING, ids=str)
def test_every_command_runs(page: Path, work: Callable[[Path], None]) -> None:
    work(page)


def test_the_readme_leaves_what_it_says(readme: Work) -> None:
    folder, ran = readme
    assert {"prune", "eval", "finetune", "export", "bench", "generate"} <= {
        command.split()[1] for command in ran
    }
    for output in ("sparse", "tuned", "deployment", "dense"):
        assert (folder / output / "owl.json").is_file()


@pytest.mark.parametrize(
    "wrong",
    [
        "owl prune MODEL -o sparse --sparsty 0.5",
        "owl prunes MODEL",
        "owl bench a --pairs many",
        "owl engines destroy deepsparse",
        "make coffee",
        "pip install '.[everything]'",
        "python benchmarks/kernel_speed.py --fast",
        "python benchmarks/prune_quality.py MODEL c.txt e.txt -o q.json --method wander",
        "python benchmarks/prune_quality.py MODEL -o q.json",
    ],
)
def test_what_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises((typer.BadParameter.__base__, KeyError, AssertionError)):
        parse(wrong)


def test_every_exception_is_still_needed() -> None:
    every = [one for page in PAGES for one in (*commands(page), *blocks(page, "python"))]
    assert [start for start in NOT_RUN if not any(re.match(start, c) for c in every)] == []


def test_the_slurm_script_starts_what_there_is() -> None:
    script = Path("examples/cluster/torchrun.sbatch")
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = re.search(r"\btorchrun \\\n.*", script.read_text(), re.DOTALL)
    assert command is not None
    parse(command[0].replace("\\\n", " ").replace('"${resume[@]}"', "--resume"))


def test_a_yaml_is_what_it_is_said_to_be(tmp_path: Path) -> None:
    (workflow,) = blocks(Path("docs/how-to/gate.md"), "yaml")
    inputs = yaml.safe_load(Path("action.yml").read_text())["inputs"]
    (step,) = [s for s in yaml.safe_load(workflow)["jobs"]["owl"]["steps"] if "owl" in s["uses"]]
    required = {name for name, about in inputs.items() if about.get("required")}
    assert required <= set(step["with"]) <= set(inputs)
    (recipe,) = blocks(Path("docs/reference/formats.md"), "yaml")
    (tmp_path / "recipe.yaml").write_text(recipe)
    assert api.prune_settings(tmp_path / "recipe.yaml", {}).allocation == "owl"
    (plan,) = blocks(Path("docs/how-to/sweep.md"), "yaml")
    (tmp_path / "plan.yaml").write_text(plan)
    assert read_plan(tmp_path / "plan.yaml", {}).pairs == 4


@pytest.mark.parametrize("page", [README, *(Path(f"{n}.md") for n in ("CONTRIBUTING", "SECURITY"))])
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or Path(link).exists(), link


def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:
        assert not re.search(r'(src|@import|<link[^>]* href)="?https?://', page.read_text()), page
    assert "--outlier-multiple" in (tmp_path / "reference" / "cli.html").read_text()
    assert 'id="owl_deploy.api.prune"' in (tmp_path / "reference" / "api.html").read_text()
