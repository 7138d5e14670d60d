"""How `owl` ends when nobody foresaw it, and when stdout takes nothing more."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from owl_deploy import cli
from owl_deploy.compression.recipe import shipped
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.ending import explained

SHIPPED = "owl_deploy.compression.recipe.shipped"
COMMAND = (sys.executable, "-m", "owl_deploy")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("recipes", "ls"), ("--help",), ("engines", "ls")])
def test_a_reader_that_has_gone_ends_it_without_a_word(arguments, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [*COMMAND, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("arguments", [("recipes", "ls"), ("--help",), ("engines", "ls")])
def test_a_full_stdout(arguments, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 4
    assert done.stderr.startswith("owl: stdout cannot be written (No space left on device).")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [("recipes", "ls"), ("recipes", "show", "nothing")])
def test_a_stderr_that_is_lost_costs_what_it_would_say(arguments):
    """As a terminal that was closed: not the result, and not the exit code."""
    asked = {"stdout": subprocess.PIPE, "text": True, "check": False}
    before = subprocess.run([*COMMAND, *arguments], stderr=subprocess.PIPE, **asked)
    assert bool(before.stderr) == (before.returncode != 0)
    reader, gone = os.pipe()
    os.close(reader)
    with Path("/dev/full").open("w") as full:
        for lost in (full, gone):
            done = subprocess.run([*COMMAND, *arguments], stderr=lost, **asked)
            assert (done.returncode, done.stdout) == (before.returncode, before.stdout)
    os.close(gone)


def test_a_closed_stdout():
    done = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *COMMAND, "recipes", "ls"],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr[:27]) == (4, "owl: stdout is closed. Send")


def broken(error):
    def list_recipes():
        raise error

    return list_recipes


def test_a_defect_is_one_line_and_no_failed_check(owl, monkeypatch):
    monkeypatch.setattr(SHIPPED, broken(ZeroDivisionError("by\nzero")))
    code, out, err = owl("recipes", "ls")
    assert (code, out) == (70, "")
    assert err == (
        "owl: ZeroDivisionError: by zero. This is a defect of owl: please report it, with what "
        "OWL_DEBUG=1 prints.\n"
    )


def test_its_traceback_is_there_when_asked_for(capsys, monkeypatch):
    monkeypatch.setattr(SHIPPED, broken(KeyError("name")))
    monkeypatch.setenv("OWL_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["owl", "recipes", "ls"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 70
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def swallowing(error):
    """What a library does that is being imported: it catches Ctrl-C, and is half made after."""

    def list_recipes():
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise error

    return list_recipes


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (RecursionError("depth"), 130, "interrupted; finished outputs are untouched."),
        (ModuleNotFoundError("torch", name="torch"), 130, "interrupted; finished outputs"),
        (BadInput("It is too long.", "Cut it."), 2, "It is too long. Cut it."),
    ],
)
def test_what_comes_of_a_ctrl_c_that_was_swallowed(owl, monkeypatch, error, code, words):
    with monkeypatch.context() as patched:
        patched.setattr(SHIPPED, swallowing(error))
        found, out, err = owl("recipes", "ls")
        assert (found, out, err.startswith(f"owl: {words}")) == (code, "", True), err
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        patched.setattr(SHIPPED, broken(RecursionError("depth")))
        assert owl("recipes", "ls")[0] == 70  # nobody remembers the one before


def test_it_ends_a_plan_too_and_is_no_failure_of_a_task(owl, monkeypatch):
    def list_recipes():
        try:
            swallowing(RecursionError("depth"))()
        except Exception as error:  # as `pipeline.attempt` does
            return {"kept": explained(error)}

    monkeypatch.setattr(SHIPPED, list_recipes)
    assert owl("recipes", "ls")[0] == 130


def test_a_ctrl_c_that_is_ignored_stays_so(owl, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as for a shell's background job
    try:
        monkeypatch.setattr(SHIPPED, swallowing(RecursionError("depth")))
        assert owl("recipes", "ls")[0] == 70
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("interrupts", [signal.default_int_handler, signal.SIG_IGN])
def test_sigterm_ends_it_as_ctrl_c_does(owl, monkeypatch, tmp_path, interrupts):
    def list_recipes():
        with tempfile.TemporaryDirectory(dir=tmp_path):
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGINT, interrupts)
    try:
        monkeypatch.setattr(SHIPPED, list_recipes)
        code, out, err = owl("recipes", "ls")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out) == (143, "")
    assert err == "owl: interrupted; finished outputs are untouched.\n"
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_sigterm_that_is_ignored_stays_so(owl, monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            SHIPPED,
            lambda: signal.raise_signal(signal.SIGTERM) or shipped(),
        )
        assert owl("recipes", "ls")[0] == 0
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(28, "No space left on device", "/tmp/weights"),
        PermissionError(13, "Permission denied", "/root/model/config.json"),
    ],
)
def test_what_the_system_refuses_is_no_defect(owl, monkeypatch, error):
    monkeypatch.setattr(SHIPPED, broken(error))
    code, _, err = owl("recipes", "ls")
    assert (code, err.count("\n"), "defect" in err) == (4, 1, False), err


def test_a_text_where_a_name_belongs(owl):
    code, _, err = owl("generate", "The river ran past the mill. " * 20, "deployment")
    assert (code, err.count("\n"), "too long for the name of a file" in err) == (2, 1, True), err


@pytest.mark.parametrize(
    "options",
    [
        ("--top-k", 2**31),
        ("--max-new-tokens", 2**31),
        ("--temperature", "inf"),
        ("--temperature", "nan"),
        ("--repetition-penalty", "inf"),
    ],
)
def test_numbers_that_the_engine_does_not_take(owl, tmp_path, options):
    code, _, err = owl("generate", tmp_path, "Hello", *options)
    assert (code, f"{options[0]} {options[1]} is impossible" in err) == (2, True), err


def test_a_home_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(EnvironmentFailed, match=r"cannot be written .*Set OWL_CACHE"):
        cache_dir("bench")
