"""Strings that end an answer, found while it comes."""

from collections.abc import Iterable, Iterator, Sequence


class Stops:
    """Hands on the text of an answer up to the first of `strings`.

    What may be the beginning of one is kept back until more text decides; `found`: one came.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = strings
        self._kept = ""
        self.found = False

    def feed(self, piece: str) -> str:
        """What can be said for sure, once `piece` has come."""
        text = self._kept + piece
        places = [place for one in self._strings if (place := text.find(one)) >= 0]
        self.found = bool(places)
        end = min(places) if places else len(text) - self._undecided(text)
        self._kept = "" if places else text[end:]
        return text[:end]

    def rest(self) -> str:
        """What was kept back, once no more text comes."""
        return self._kept

    def before(self, pieces: Iterable[str]) -> Iterator[str]:
        """What of `pieces` comes before the first of the strings; no more of them are asked for."""
        for piece in pieces:
            yield self.feed(piece)
            if self.found:
                return
        yield self.rest()

    def _undecided(self, text: str) -> int:
        """How many letters at the end of `text` are the beginning of a string."""
        longest = max((len(one) for one in self._strings), default=1) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(one.startswith(text[-size:]) for one in self._strings):
                return size
        return 0
