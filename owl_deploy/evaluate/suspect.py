"""Runs inside the sandbox (see sandbox.py): defines what a program defines, and answers calls.

A script for a bare Python without this package. The first line of stdin is a literal of (program,
limits, user); each further one of (name, arguments). Each gets one line of answer, a literal of
("value", value), ("iterator", what it gives) or ("raised", name of the exception's type). Before
any of it a line says that the sandbox is there.
"""

import ast
import numbers
import os
import resource
from typing import Any

_PLAIN: tuple[Any, ...] = (bool, int, complex, str, bytes)


class _Float(float):
    """One whose literal an infinity has, too."""

    def __repr__(self) -> str:
        return super().__repr__().replace("inf", "1e999")


def plain(value: Any) -> Any:  # noqa: ANN401 - any value of a stranger's
    """`value` in built-in types that have a literal; raises `TypeError` where there is none."""
    if value is None:
        return None
    for kind in _PLAIN:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {plain(key): plain(one) for key, one in value.items()}
    for sequence in (list, tuple):
        if isinstance(value, sequence):
            return sequence(plain(one) for one in value)
    if isinstance(value, set | frozenset):  # equal, whichever it is
        return {plain(one) for one in value}
    if isinstance(value, numbers.Number):  # so are these to one of their value
        return _Float(value)  # type: ignore[arg-type]
    raise TypeError(f"a {type(value).__name__} has no literal")


def main() -> None:
    """Answer until stdin ends; what the program itself prints and reads comes to nothing."""
    calls, answers = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    print("ready", file=answers, flush=True)
    program, limits, user = ast.literal_eval(calls.readline())
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, name), (limit, limit))
    if user is not None:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    names: dict[str, Any] = {"__name__": "program"}

    called: str = ""
    arguments: tuple[Any, ...] = ()
    while True:
        try:
            if called:
                result = names[called](*arguments)
                kind = "iterator" if hasattr(result, "__next__") else "value"
                answer = (kind, plain(list(result) if kind == "iterator" else result))
            else:
                exec(program, names)
                answer = ("value", [name for name, one in names.items() if callable(one)])
            text = repr(answer)
        except BaseException as error:
            text = repr(("raised", type(error).__name__))
        print(text, file=answers, flush=True)
        line = calls.readline()
        if not line:
            return
        called, arguments = ast.literal_eval(line)


if __name__ == "__main__":
    main()
