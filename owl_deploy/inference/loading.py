"""What opening a deployment would load: its graph, its weights, a library of operators.

A folder can name any file, a library runs as whoever opens it, and a digest beside it proves only
that nothing broke on the way. So, before a runtime sees the folder, each name is checked, and the
operators that run are this installation's, unless the user trusts the folder's own.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.inference.drivers.onnxruntime import LAST_LOGITS
from owl_deploy.inference.registry import MODEL, engine_of_file
from owl_deploy.models import digests
from owl_deploy.models.checkpoint import CHAT_TEMPLATES, TOKENIZER_FILES, file_names
from owl_deploy.models.manifest import DeploymentManifest, read_manifest
from owl_deploy.runtime import LIBRARY_NAMES, library_path
from owl_deploy.utils.artefact import MANIFEST
from owl_deploy.utils.progress import error_console

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message

GENAI_CONFIG = "genai_config.json"
_LIBRARIES = (".so", ".dylib", ".dll")
_LOADED = (".onnx", ".data", ".gguf", *_LIBRARIES)  # not a tokenizer, which people do adapt
# Session options that choose how the graph runs, and never a file to read or to write.
_HARMLESS = {
    *("log_id", "log_severity_level", "log_verbosity_level", "graph_optimization_level"),
    *("intra_op_num_threads", "inter_op_num_threads", "enable_cpu_mem_arena", "enable_mem_pattern"),
    *("session.intra_op.allow_spinning", "session.inter_op.allow_spinning", LAST_LOGITS),
}
# What else a decoder's settings hold beside numbers; of `model` it is "type".
_NAMES = {"filename", "session_options", "inputs", "outputs", "sliding_window"}
_EXPORT_AGAIN = "Export again."
AS_EXPORTED, CHANGED, MISSING = "as exported", "changed", "missing"
UNLISTED, EDITED, ADDED, UNUSED = "not listed", "edited", "added", "not loaded"
_COMPLAINTS = {
    MISSING: "is missing",
    CHANGED: "is damaged, or was changed since the export: its digest is another",
    UNLISTED: f"would be loaded, and {MANIFEST} does not list it",
}


@dataclass(frozen=True)
class Row:
    """One file of a deployment: what it is, its digest, and what is said of it.

    `part`: graph, weights, settings, operators, or other; `state`: one of the words
    above, of which "edited" is a change to what is neither code nor weights (a tokenizer, say), and
    "added" a file of a tokenizer that the export did not write.
    """

    name: str
    part: str
    sha256: str
    state: str

    @property
    def refused(self) -> bool:
        """Whether a deployment with such a row is not opened."""
        return self.state in (MISSING, CHANGED, UNLISTED)

    @property
    def as_exported(self) -> bool:
        """Whether it takes nothing from, and adds nothing to, what the export wrote."""
        return self.state in (AS_EXPORTED, UNUSED)


class Folder:
    """A deployment's folder as a runtime would load it; each file of it is read once.

    Unless `thorough`, large files that are as they were when last read are not read at all
    (digests.py). What reads it raises `BadInput` for a damaged file, and for a graph or settings
    that name something to load which is elsewhere, or which owl never writes.
    """

    def __init__(self, path: Path, *, thorough: bool = False) -> None:
        self.path = path
        self.thorough = thorough
        self.engine = engine_of_file(path)  # None: any that opens ONNX graphs
        self.model_file = self.engine.model_file if self.engine else MODEL

    @property
    def has_model(self) -> bool:
        """Whether there is something to open."""
        return (self.path / self.model_file).is_file()

    @property
    def graph(self) -> "onnx.GraphProto":
        """The graph without its external weights."""
        return self.model.graph

    @cached_property
    def model(self) -> "onnx.ModelProto":
        """All of the ONNX file, without its external weights."""
        import onnx
        from google.protobuf.message import DecodeError

        path = self.path / MODEL
        try:
            return onnx.load(str(path), load_external_data=False)
        except DecodeError as error:
            raise BadInput(
                f"{path} is not an ONNX file, or a damaged one.", _EXPORT_AGAIN
            ) from error

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The folder's genai_config.json; empty where it has none."""
        path = self.path / GENAI_CONFIG
        if not path.is_file():
            return {}
        try:
            text = path.read_text(encoding="utf-8")
            config = json.loads(text, object_pairs_hook=_without_doubles)
            if not isinstance(config, dict):
                raise ValueError("it holds no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(f"{path} cannot be read ({error}).", _EXPORT_AGAIN) from error
        return config

    def number(self, name: str, part: str | None = None) -> int:
        """A number, 1 or more, that the settings give about the model, or a `part` of it."""
        try:
            model = self.settings["model"]
            found = int((model[part] if part else model)[name])
            if found < 1:
                raise ValueError(f"{found} of anything")
        except (ValueError, OverflowError, KeyError, TypeError) as error:
            raise BadInput(
                f"{self.path / GENAI_CONFIG} does not say the model's {name}.", _EXPORT_AGAIN
            ) from error
        return found

    @cached_property
    def library(self) -> str | None:
        """The library that the settings name, after all else that they may load is refused."""
        try:
            model = self.settings.get("model", {})
            decoder = model.get("decoder", {})
            options = dict(decoder.get("session_options", {}))
            library, graph = options.pop("custom_ops_library", None), decoder.get("filename", MODEL)
            strange = _strange(self.settings, options)
        except (AttributeError, TypeError, ValueError, RecursionError) as error:
            place = self.path / GENAI_CONFIG
            raise BadInput(f"{place} is not a decoder's.", _EXPORT_AGAIN) from error
        complaint = ""
        if strange:
            complaint = f"sets {', '.join(sorted(strange))}, which owl never writes"
        elif graph != MODEL:
            complaint = f"names {graph!r} as the graph, which must be {MODEL}"
        elif library and not (isinstance(library, str) and is_bare(library)):
            complaint = f"names the library {library!r}, which is not a file of the folder"
        if complaint:
            raise BadInput(f"{self.path / GENAI_CONFIG} {complaint}.", _EXPORT_AGAIN)
        return library or None

    def operators(self, *, trust: bool = False) -> Path | None:
        """The library of operators to open the folder with: None where it names none.

        That is the installed one, for a folder that names ours; the folder's own only if `trust`.
        Raises `BadInput` for another's library.
        """
        if self.library is None:
            return None
        own = self.path / self.library
        if trust:
            if not own.is_file():
                raise BadInput(f"{own} is missing.", _EXPORT_AGAIN)
            return own
        if self.library not in LIBRARY_NAMES:
            raise BadInput(
                f"{self.path} would run {self.library}, a library that is not owl's.",
                "If you trust whoever made it, give --trust-library.",
            )
        try:
            return library_path()
        except EnvironmentFailed as error:
            raise EnvironmentFailed(
                f"{self.path} needs the operators of owl, which are not installed here.",
                "To run its own, if you trust whoever made it: --trust-library. "
                f"Else: {error.hint}",
            ) from error

    @cached_property
    def weights(self) -> set[str]:
        """The names of the files in which the graph's weights lie."""
        found = set()
        is_graph = (self.path / MODEL).is_file()
        for tensor in _tensors(self.model) if is_graph else ():
            place = {entry.key: entry.value for entry in tensor.external_data}.get("location")
            if place is None:
                continue
            if not is_bare(place):
                raise BadInput(
                    f"{self.path / MODEL} names weights in {place!r}, elsewhere.", _EXPORT_AGAIN
                )
            if not (self.path / place).resolve().is_file():
                raise BadInput(f"{self.path / place} is missing.", _EXPORT_AGAIN)
            found.add(place)
        _refuse_scattered_links(self.path / MODEL, found)
        return found

    def rows(self) -> list[Row]:
        """Every file with its state, by the manifest; runs nothing of it."""
        loaded = {self.model_file, *self.weights, *([self.library] if self.library else [])}
        loaded |= {GENAI_CONFIG} if self.settings else set()
        names = sorted({*contents(self.path), *self.listed, *loaded})
        return [self._row(name, loaded) for name in names]

    def _row(self, name: str, loaded: set[str]) -> Row:
        path = self.path / name
        found = digest(path, thorough=self.thorough) if path.is_file() else ""
        if not found:
            state = MISSING
        elif name not in self.listed:
            read = ADDED if name in TOKENIZER_FILES or _is_template(name) else UNUSED
            state = UNLISTED if name in loaded else read
        elif found == self.listed[name]:
            state = AS_EXPORTED
        else:
            state = CHANGED if name in loaded or path.suffix in _LOADED else EDITED
        parts = {self.model_file: "graph", GENAI_CONFIG: "settings", self.library: "operators"}
        return Row(name, parts.get(name, "weights" if name in loaded else "other"), found, state)

    @cached_property
    def manifest(self) -> DeploymentManifest | None:
        """The owl.json; None where there is none of a deployment."""
        return read_manifest(self.path, DeploymentManifest)

    @cached_property
    def listed(self) -> dict[str, str]:
        """The digests of the manifest, by name."""
        files = self.manifest.files if self.manifest else {}
        for name in files:
            if not (is_bare(name) or _is_template(name)):
                raise BadInput(
                    f"{self.path / MANIFEST} names {name!r}, a file elsewhere.", _EXPORT_AGAIN
                )
        return {name: row.sha256 for name, row in files.items()}

    def check(self, *, trust: bool = False) -> Path | None:
        """Refuse a folder whose loaded files are not those of its manifest; its `operators`.

        A folder without a manifest has nothing to compare with.
        """
        library = self.operators(trust=trust)
        if self.listed:
            for row in filter(lambda row: row.refused, self.rows()):
                raise BadInput(
                    f"{self.path / row.name} {_COMPLAINTS[row.state]}.",
                    f"{_EXPORT_AGAIN} `owl verify {self.path}` says what else is not as it was.",
                )
        else:
            _ = self.weights  # refuses places elsewhere; digests would tell nothing
            if self.library in LIBRARY_NAMES:
                _say_once(
                    f"{self.path} has no {MANIFEST}, which owl writes: nothing tells whether its "
                    "files are as they were exported."
                )
        return library


@cache
def _say_once(text: str) -> None:
    error_console().print(text, highlight=False, soft_wrap=True)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys Python keeps the last, and another reader may act on the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def is_bare(name: str) -> bool:
    """Whether `name` is that of a file within a folder, and leads nowhere else."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:  # half a character
        return False
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", ":", "\0"}


def _is_template(name: str) -> bool:
    """Whether `name` is that of a file in the one folder within a deployment: chat templates."""
    folder, _, file = name.partition("/")
    return folder == CHAT_TEMPLATES and is_bare(file)


def contents(folder: Path) -> list[str]:
    """The files of a deployment that digests are kept of: all but the manifest with these."""
    return [name for name in file_names(folder) if name != MANIFEST]


def _refuse_scattered_links(path: Path, names: set[str]) -> None:
    """ONNX Runtime follows links as long as graph and weights end in one folder (a Hub cache's)."""
    home = path.resolve().parent
    for name in sorted(names):
        target = (path.parent / name).resolve()
        if target.parent not in (home, path.parent.resolve()):
            raise BadInput(
                f"{path.parent / name} is a link to {target}, and ONNX Runtime reads weights only "
                "from the graph's own folder.",
                f"Copy the deployment with its files: cp -rL {path.parent} COPY.",
            )


def _strange(settings: dict[str, Any], options: dict[str, Any]) -> set[str]:
    """The settings that may name something to read or to write: all but what owl writes."""
    model, search = settings.get("model", {}), settings.get("search", {})
    decoder = model.get("decoder", {})
    if not isinstance(search, dict):
        raise TypeError
    strange = {key for key in settings.keys() - {"model", "search"} if settings[key]}
    strange |= {key for key in model.keys() - {"type", "decoder"} if not _is_number(model[key])}
    strange |= {key for key in decoder.keys() - _NAMES if not _is_number(decoder[key])}
    strange |= {key for key in search if not _is_number(search[key])}
    strange |= options.keys() - _HARMLESS
    return strange - ({"provider_options"} if options.get("provider_options") == [] else set())


def _is_number(value: Any) -> bool:  # noqa: ANN401 - a JSON value
    """Whether it is a number, several, or nothing."""
    if isinstance(value, list):
        return all(map(_is_number, value))
    return value is None or isinstance(value, int | float)


def _tensors(message: "Message") -> Iterator["onnx.TensorProto"]:
    """The tensors in an ONNX message, wherever the format has room for one: functions, too."""
    import onnx
    from google.protobuf.message import Message

    if isinstance(message, onnx.TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in (value,) if isinstance(value, Message) else value:
                yield from _tensors(part)


def digest(file: Path, *, thorough: bool = False) -> str:
    """SHA-256 of a file, read once as long as it stays as it is; if `thorough`, in this process."""
    status = file.stat()
    state = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return _digest(file, state, thorough)


@cache
def _digest(file: Path, _state: tuple[int, ...], thorough: bool) -> str:
    return digests.digest(file, again=thorough)


def fingerprint(rows: list[Row]) -> str:
    """One digest over the names and digests of all files, whatever the folder is called."""
    return digests.of_files((row.name, row.sha256) for row in rows)
