"""Ctrl-C on a terminal asks once; the signals are real."""

import io
import signal

import pytest
from rich.console import Console

from owl_deploy.distributed.cluster.interrupt import QUESTION, asking_once


def console(**how: bool) -> Console:
    return Console(file=io.StringIO(), width=80, **how)


def said(asked: Console) -> str:
    assert isinstance(asked.file, io.StringIO)
    return asked.file.getvalue()


def test_the_first_asks_and_the_second_is_as_always() -> None:
    usual = signal.getsignal(signal.SIGINT)
    asked = console(force_terminal=True)
    with asking_once(asked):
        signal.raise_signal(signal.SIGINT)
        assert said(asked).count(QUESTION) == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert said(asked).count(QUESTION) == 1
    assert signal.getsignal(signal.SIGINT) is usual


def test_without_a_terminal_nobody_is_asked() -> None:
    asked = console()
    with asking_once(asked), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert said(asked) == ""


def test_after_the_block_it_is_as_always() -> None:
    with asking_once(console(force_terminal=True)):
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
