"""Two processes of one run that are asked different things, played one after the other in this."""

from collections.abc import Callable

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.utils.ranks import Ranks


class _Told(Exception):
    """The first process has told what it has."""


def refused(
    monkeypatch: pytest.MonkeyPatch,
    first: Callable[[Ranks], object],
    second: Callable[[Ranks], object],
) -> str:
    """What is said to a process that does `second` where the other does `first`."""
    told: list[object] = []

    def gathered(_ranks: Ranks, value: object) -> list[object]:
        if value is None:  # they only wait for each other
            return [None, None]
        told.append(value)
        if len(told) == 1:
            raise _Told
        return [told[0], value]

    with monkeypatch.context() as patch:
        patch.setattr(Ranks, "gathered", gathered)
        with pytest.raises(_Told):
            first(Ranks(0, 2))
        with pytest.raises(BadInput) as found:
            second(Ranks(1, 2))
    return str(found.value)
