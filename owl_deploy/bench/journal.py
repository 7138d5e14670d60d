"""Samples kept as they are taken, so that a benchmark that was interrupted goes on where it was."""

import contextlib
import json
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from owl_deploy.bench.result import Sample, Subject
from owl_deploy.errors import BadInput
from owl_deploy.models import digests
from owl_deploy.utils.artefact import end_line
from owl_deploy.utils.cache import cache_dir
from owl_deploy.utils.lock import Held, lease, outlast

# A pair is a comparison only if both were measured about the same time: a round that was
# interrupted is taken up within these seconds, and measured anew after them.
_FRESH_S = 600.0
_KEPT_S = 7 * 24 * 3600.0


class Journal:
    """A file of JSON lines, one a sample, for one plan on one machine; deleted when done."""

    def __init__(self, identity: Any) -> None:  # noqa: ANN401 - JSON
        folder = cache_dir("bench")
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{digests.of_json(identity)[:24]}.jsonl"

    @contextlib.contextmanager
    def alone(self, tell: Callable[[str], object]) -> Iterator[None]:
        """Keep others from the same plan until the block ends: their times would be of both.

        One on another machine, with which the cache is shared, may have died with that: it is
        waited for, which `tell` hears. Raises `BadInput` where the plan is being measured already.
        """
        lock = self.path.with_suffix(".lock")
        try:
            outlast(lock, lambda host: tell(f"Waiting for the same benchmark on {host}"))
            with lease(lock):
                yield
        except Held as error:
            raise BadInput(
                "This benchmark is running already.", "Wait until it is done, or end it."
            ) from error

    def add(self, name: str, about: dict[str, Any], sample: Sample, failed: dict[str, str]) -> None:
        """Keep a sample of the subject `name`, and what there will be no more of."""
        told = {"name": name, "about": about, "failed": failed}
        self._write({**told, "sample": sample.model_dump()})

    def give_up(self, name: str, failure: str) -> None:
        """Keep why there will be no more samples of the subject `name`."""
        self._write({"name": name, "failure": failure})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"at": time.time(), **line}) + "\n")

    def restore(self, subjects: Iterable[Subject]) -> dict[str, Subject]:
        """The subjects by name, with the samples that an interrupted run left, and what failed."""
        restored = {subject.name: subject for subject in subjects}
        rounds: dict[int, list[dict[str, Any]]] = {}
        failures: dict[str, str] = {}
        for line in self._lines():
            if "failure" in line:
                failures[line["name"]] = line["failure"]
            elif "discarded" in line:
                rounds.pop(line["discarded"], None)
            else:
                failures.pop(line["name"], None)  # it was repaired, and measured again
                rounds.setdefault(line["sample"]["round"], []).append(line)
        for name, failure in failures.items():
            restored[name] = restored[name].model_copy(update={"failure": failure})
        going = {name for name, subject in restored.items() if subject.failure is None}
        for index, lines in sorted(rounds.items()):
            whole = {line["name"] for line in lines} >= going
            if not whole and time.time() - min(line["at"] for line in lines) > _FRESH_S:
                self._write({"discarded": index})
                continue
            for line in lines:
                subject = restored[line["name"]]
                samples = (*subject.samples, Sample.model_validate(line["sample"]))
                told = {"about": line["about"], "failed": line.get("failed", {})}
                update = {**told, "samples": samples}
                restored[subject.name] = subject.model_copy(update=update)
        return restored

    def _lines(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        end_line(self.path)
        if time.time() - self.path.stat().st_mtime > _KEPT_S:
            self.path.unlink()
            return
        for line in self.path.read_bytes().splitlines():
            try:
                yield json.loads(line)
            except ValueError:  # the line that a kill cut short
                continue

    def delete(self) -> None:
        """Forget the samples: the result has them."""
        self.path.unlink(missing_ok=True)
