import re

import pytest

from owl_deploy.utils import progress


def test_a_log_hears_of_a_long_step(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with progress.bar("Pruning", 3) as advance:
        for _ in range(3):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"[\d.]+ s", "T", line) for line in lines] == [
        "Pruning: 1 of 3, T, T left",
        "Pruning: 2 of 3, T, T left",
        "Pruning: done in T",
    ]


def test_a_log_says_nothing_of_what_has_not_begun(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    with progress.bar("Training", 3) as advance:
        advance(0)
    assert capsys.readouterr().err.startswith("Training: stopped after")


def test_a_log_hears_a_note_once_there_is_one(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_EVERY_S", 0.0)
    notes = iter(["", "90 tokens/s"])
    with progress.bar("Training", 3, lambda: next(notes)) as advance:
        for _ in range(3):
            advance(1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.endswith("left") for line in lines] == [True, False, False]
    assert lines[1].endswith(" left, 90 tokens/s")


@pytest.mark.parametrize("columns", ["", "0", "40"])
def test_a_terminal_of_no_width_hides_nothing(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    progress.result_console().print("Five words as a result.")
    assert capsys.readouterr().out == "Five words as a result.\n"


def test_a_short_step_is_one_line(capsys):
    with progress.bar("Reading", 2) as advance:
        advance(1)
        advance(1)
    assert re.fullmatch(r"Reading: done in [\d.]+ s\n", capsys.readouterr().err)


def test_what_stopped_is_not_called_done(capsys):
    with progress.bar("Reading", 2) as advance:
        advance(1)
    assert "stopped after" in capsys.readouterr().err


def test_shares_that_add_up_to_nearly_all_are_all(capsys):
    with progress.bar("Training", 100.0) as advance:
        for _ in range(10):
            advance(0.1 * 100 - 1e-12)
    assert "done in" in capsys.readouterr().err


def test_an_error_ends_a_bar_without_a_last_line(capsys):
    with pytest.raises(ValueError, match="x"), progress.bar("Reading", 2):
        raise ValueError("x")
    assert capsys.readouterr().err == ""


def test_a_path_in_brackets_is_printed_as_it_is(capsys):
    progress.error_console().print("texts/[/a] and [red]")
    assert capsys.readouterr().err == "texts/[/a] and [red]\n"
