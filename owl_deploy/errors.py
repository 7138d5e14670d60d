"""The errors a user can meet: each is one sentence, a way out, and an exit code."""

import difflib
from collections.abc import Iterable


class OwlError(Exception):
    """An error that the command line prints as one sentence and a hint, without a traceback.

    `message` says what is wrong, `hint` what to do about it.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}".strip()


class BadInput(OwlError):
    """What the user asked for cannot be done: exit code 2."""

    exit_code = 2


class Incomparable(OwlError):
    """Two results cannot be compared, or not decided between: exit code 3."""

    exit_code = 3


class EngineFailed(OwlError):
    """An inference engine aborted, hung, or refused the model: exit code 4."""

    exit_code = 4


class EnvironmentFailed(OwlError):
    """An environment or a library that an engine needs is missing or broken: exit code 4."""

    exit_code = 4


def unknown_name(what: str, name: str, known: Iterable[str]) -> BadInput:
    """The error for a `name` that is none of the `known` ones, with the nearest as a hint."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(choices)}."
    return BadInput(f"Unknown {what} {name!r}.", hint)
