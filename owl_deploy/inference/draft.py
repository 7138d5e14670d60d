"""What may propose tokens to a deployment: a deployment with the same tokens, or the text itself.

How is in speculate.py; here is which, and what cannot be.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from owl_deploy.errors import BadInput
from owl_deploy.inference.deployment import Deployment, open_deployment
from owl_deploy.inference.drivers.onnxruntime import Rows, open_genai, pad_of, runs_whole
from owl_deploy.inference.registry import LOOKUP
from owl_deploy.inference.rows import Row
from owl_deploy.inference.speculate import (
    MOST_TOKENS,
    Lookup,
    Model,
    Proposer,
    Speculation,
    share_of,
)
from owl_deploy.models.tokenizer import TOKENIZER
from owl_deploy.utils.artefact import read_object


@dataclass(frozen=True)
class Draft:
    """`tokens` are proposed at a time, 0 for as many as pay (speculate.py), by `deployment`; None:
    by looking them up in the text.
    """

    tokens: int
    deployment: Deployment | None = None

    @property
    def name(self) -> str:
        """What it is called beside the deployment that it drafts for."""
        return LOOKUP if self.deployment is None else self.deployment.path.resolve().name

    @property
    def place(self) -> str:
        """What an engine's process is told of it: the folder, or "lookup"."""
        return LOOKUP if self.deployment is None else str(self.deployment.path)


class Drafter:
    """A draft that stays open, for the deployment in the folder `beside`."""

    def __init__(self, draft: Draft, beside: Path, threads: int) -> None:
        self._draft, self._beside = draft, beside
        if (opened := draft.deployment) is not None:
            library = str(opened.library or "")
            self._model = open_genai(str(opened.path), threads, library, takes_turns=True)
            self._pad, self._whole = pad_of(opened.path), runs_whole(opened.path)

    def speculation(self, model: Model, row: Row) -> Speculation:
        """What proposes to `model` as it writes `row`, and tells the row's speed of it."""
        random = np.random.default_rng(row.sampling.seed)
        proposing = self._proposing(row)
        found = Speculation(model, proposing, row.choose, self._draft.tokens, random)
        row.speed.draft = found.tally
        return found

    def _proposing(self, row: Row) -> Lookup | Proposer:
        if self._draft.deployment is None:
            return Lookup()
        share = share_of(self._draft.deployment.path, self._beside)
        rows = Rows(self._model, row.length, self._pad, whole=self._whole)
        return Proposer(rows, row.choose, share)


def open_draft(
    deployment: Deployment, draft: str | Path, tokens: int | None, *, trust_library: bool = False
) -> Draft:
    """The draft for `deployment` that a user asks for: a folder, or "lookup".

    `tokens`: None for as many as pay. Raises `BadInput` for a deployment that cannot have one,
    and for a draft that does not fit it.
    """
    if tokens is not None and not 1 <= tokens <= MOST_TOKENS:
        raise BadInput(f"--draft-tokens {tokens} is impossible.", f"Give 1 to {MOST_TOKENS}.")
    deployment.check_opens()
    if str(draft) == LOOKUP:
        return Draft(tokens or 0)
    path = Path(draft)
    if not path.exists():
        raise BadInput(
            f"The draft {path} does not exist.", f"Give a deployment's folder, or {LOOKUP}."
        )
    if path.resolve() == deployment.path.resolve():
        raise BadInput(
            f"{path} cannot draft for itself: it would take longer than alone.",
            f"Give a deployment of it with fewer bits or more zeros, or {LOOKUP}.",
        )
    opened = open_deployment(path, trust_library=trust_library)
    opened.check_opens()
    _check_fits(deployment, opened)
    return Draft(tokens or 0, opened)


def chosen_draft(
    opened: Deployment, draft: str | Path | None, tokens: int | None, trust_library: bool
) -> Draft | None:
    """The draft that a user asks for, if any; raises `BadInput` as `open_draft` does."""
    if draft is not None:
        return open_draft(opened, draft, tokens, trust_library=trust_library)
    if tokens is not None:
        raise BadInput("--draft-tokens is of a draft, and there is none.", "Give --draft too.")
    return None


def _check_fits(deployment: Deployment, draft: Deployment) -> None:
    if deployment.vocab != draft.vocab or not _is_same_tokenizer(deployment.path, draft.path):
        raise BadInput(
            f"The draft {draft.path} has other tokens than {deployment.path}.",
            "Give a deployment of the same model, with fewer bits or more zeros.",
        )
    takes = deployment.max_context or 0
    if (draft.max_context or takes) < takes:
        raise BadInput(
            f"The draft {draft.path} takes {draft.max_context} tokens, and {deployment.path} "
            f"takes {takes}.",
            "Give a deployment of the same model.",
        )


def _is_same_tokenizer(one: Path, other: Path) -> bool:
    """Whether two folders give the same numbers to the same tokens, if they say."""
    files = [folder / TOKENIZER for folder in (one, other)]
    if not all(file.is_file() for file in files):
        return True
    if files[0].read_bytes() == files[1].read_bytes():
        return True
    first, second = (read_object(file, "Export again.") for file in files)
    return all(first.get(part) == second.get(part) for part in ("model", "added_tokens"))
