"""`owl verify`: what opening a deployment would load, and whether that is what was exported."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from owl_deploy.errors import BadInput, EnvironmentFailed, printable
from owl_deploy.inference.loading import Folder, Row, digest, fingerprint
from owl_deploy.runtime import LIBRARY_NAMES, library_path
from owl_deploy.utils.artefact import MANIFEST
from owl_deploy.utils.progress import result_console

OURS, REPLACED = "this installation's", "another build of owl's"
FOREIGN, NONE_HERE = "not owl's", "owl's, and none is installed here"


@dataclass(frozen=True)
class Verified:
    """What was found in a folder; nothing of it was run.

    `operators`: whose library it names, None if it names none. `fingerprint`: one digest of all of
    its files, to compare with the one that its maker tells.
    """

    rows: list[Row]
    listed: bool
    operators: str | None
    fingerprint: str

    @property
    def whole(self) -> bool:
        """Whether all that would be loaded is what was exported, and the operators are owl's."""
        listed = self.listed and all(row.as_exported for row in self.rows)
        return listed and self.operators != FOREIGN

    def to_json(self) -> dict[str, Any]:
        """For machines."""
        return {"whole": self.whole, **asdict(self)}


def verify(folder: str | Path) -> Verified:
    """Compare a deployment with its manifest without running anything of it.

    Raises `BadInput` for a folder that is no deployment, and for settings or a graph that name
    something to load which is elsewhere, or which owl never writes.
    """
    folder, opened = Path(folder), Folder(Path(folder), thorough=True)
    if not opened.has_model:
        raise BadInput(f"{folder} is not a deployment.", "Give a folder that owl export wrote.")
    rows = opened.rows()
    library = next((folder / row.name for row in rows if row.part == "operators"), None)
    return Verified(rows, bool(opened.listed), _whose(library), fingerprint(rows))


def _whose(library: Path | None) -> str | None:
    if library is None:
        return None
    if library.name not in LIBRARY_NAMES:
        return FOREIGN
    try:
        same = library.is_file() and digest(library) == digest(library_path())
    except EnvironmentFailed:
        return NONE_HERE
    return OURS if same else REPLACED


def show(found: Verified, folder: str, console: Console | None = None) -> None:
    """Print the files and what follows from them."""
    table = Table(box=None, pad_edge=False)
    for column in ("file", "part", "sha256", "state"):
        table.add_column(column, overflow="fold")
    for row in found.rows:
        state = Text(row.state, style="" if row.as_exported else "red")
        table.add_row(printable(row.name), row.part, row.sha256[:16], state)
    console = console or result_console()
    console.print(table)
    for sentence in _sentences(found, folder):
        console.print(printable(sentence), soft_wrap=True)


def _sentences(found: Verified, folder: str) -> list[str]:
    said = {
        None: [],
        OURS: ["Its operators are this installation's."],
        REPLACED: ["Its operators are another build: this installation's are loaded instead."],
        NONE_HERE: ["It needs owl's operators, which are not installed here."],
        FOREIGN: ["Its operators are not owl's: owl runs them only with --trust-library."],
    }[found.operators]
    if not found.listed:
        said += [f"It has no {MANIFEST} that lists its files: nothing says what was exported."]
    elif found.whole:
        said += [f"{folder} would load what was exported."]
    elif found.operators == FOREIGN:
        said += [f"owl exports no such folder as {folder}."]
    elif any(row.refused for row in found.rows):
        said += [f"{folder} is not what was exported: no verb opens it."]
    else:
        said += [f"{folder} would open, and its tokenizer or config is not what was exported."]
    return [*said, f"Fingerprint, to compare with its maker's: {found.fingerprint}"]
