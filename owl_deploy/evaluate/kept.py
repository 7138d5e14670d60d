"""Answers that are kept as they come, so that an evaluation that was ended goes on."""

import contextlib
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from owl_deploy.models import digests
from owl_deploy.utils.artefact import end_line
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.progress import bar


class KeptAnswers:
    """A model of the harness whose generated answers go into a file one by one.

    What the file has already is not generated again. `model` is the harness's, with `answers` as
    they come, `key` what they depend on; `forget` when they are in a result. Each of several
    processes, by its `rank`, writes a file of its own, and reads those of all.
    """

    def __init__(self, model: Any, key: object, rank: int = 0) -> None:  # noqa: ANN401 - no types
        self._model = model
        self._folder, self._name = cache_dir("eval", "answers"), digests.of_json(key)
        self._file = self._folder / f"{self._name}{f'-{rank}' if rank else ''}.jsonl"

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._model, name)

    def generate_until(self, requests: list[Any]) -> list[str]:
        """The answers, of the file or of the model."""
        # Samples of one question are several answers: each has its number.
        before: Counter[str] = Counter()
        keys = []
        for request in requests:
            asked = digests.of_json(request.args)
            keys.append(f"{asked}-{before[asked]}" if before[asked] else asked)
            before[asked] += 1
        answers = self._read()
        missing = [number for number, key in enumerate(keys) if key not in answers]
        end_line(self._file)
        with bar("Generating", len(requests)) as advance, self._file.open("ab") as file:
            advance(len(requests) - len(missing))
            for place, answer in self._model.answers([requests[n] for n in missing]):
                key = keys[missing[place]]
                answers[key] = answer
                file.write(json.dumps([key, answer]).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                advance(1)
        return [answers[key] for key in keys]

    def forget(self) -> None:
        """Remove the files, of all processes: the next evaluation begins anew."""
        for file in self._files():
            file.unlink(missing_ok=True)

    def _files(self) -> list[Path]:
        return sorted(self._folder.glob(f"{self._name}*.jsonl"))

    def _read(self) -> dict[str, str]:
        answers: dict[str, str] = {}
        for file in self._files():
            for line in file.read_bytes().splitlines():
                # Half a line is of a run that was killed, or of one that is at it now.
                with contextlib.suppress(ValueError, TypeError):
                    key, answer = json.loads(line)
                    answers[key] = answer
        return answers
