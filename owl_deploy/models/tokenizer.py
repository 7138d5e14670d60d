"""A deployment's tokenizer and chat template, to Transformers' tokens but without Transformers.

onnxruntime-genai has both of its own, and they differ: its templates keep the line breaks behind
`{% %}` and find no text in another, and its tokenizer begins a word anew after each special token.
A model would be asked other than it was trained, pruned and evaluated.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import BadInput, first_line
from owl_deploy.utils.artefact import read_object

if TYPE_CHECKING:
    import jinja2

TOKENIZER = "tokenizer.json"
_EXPORT_AGAIN = "Export again."
_NAMED = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # tokens that a template knows


class Tokenizer:
    """The tokenizer of a deployment's folder, from its tokenizer.json.

    Raises `BadInput` where that is missing, or no tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        import tokenizers

        file = folder / TOKENIZER
        if not file.is_file():
            raise BadInput(f"{folder} has no {TOKENIZER} to read prompts with.", _EXPORT_AGAIN)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise BadInput(
                f"{file} is not a tokenizer ({first_line(error)}).", _EXPORT_AGAIN
            ) from error
        self._file = file
        self._tokenizer.no_truncation()  # which the file may ask for
        self._tokenizer.no_padding()

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of `text`; with the `special` ones that the model's own puts around a text.

        Raises `BadInput` where the file is no tokenizer after all.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic in Rust is no Exception
            raise BadInput(
                f"{self._file} fails on this text ({first_line(error)}).", _EXPORT_AGAIN
            ) from error


class ChatTemplate:
    """The chat template of a folder, and the special tokens that it may write.

    `source`: its Jinja program; None where the model was taught no form for messages.
    """

    def __init__(self, folder: Path) -> None:
        settings = _settings(folder)
        self._special_tokens = _special_tokens(settings)
        self.source = _source(folder, settings)

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages, each a `role` and its `content`, and the beginning of an answer.

        Raises `BadInput` for messages that the template does not take, or where there is none.
        """
        if self.source is None:
            raise BadInput("The model has no chat template.", "Give a text to go on from.")
        try:
            text: str = self._compiled.render(
                messages=[dict(one) for one in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._special_tokens,
            )
        except Exception as error:  # whatever a template raises, which is a program
            raise BadInput(
                f"The model's chat template does not take these messages ({first_line(error)})."
            ) from error
        return text

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        return _environment().from_string(self.source or "")


def _settings(folder: Path) -> dict[str, Any]:
    """What the tokenizer's settings say, with what older versions kept apart."""
    files = (folder / "special_tokens_map.json", folder / "tokenizer_config.json")
    apart, own = (read_object(one, _EXPORT_AGAIN) if one.is_file() else {} for one in files)
    return own if "added_tokens_decoder" in own else apart | own


def _special_tokens(settings: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name in (f"{one}_token" for one in _NAMED):
        token = settings.get(name)
        if isinstance(token, dict):  # as older versions of Transformers wrote them
            token = token.get("content")
        if isinstance(token, str):
            found[name] = token
    return found


def _source(folder: Path, settings: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise BadInput(f"{file} is not UTF-8 text.", _EXPORT_AGAIN) from error
    told = settings.get("chat_template")
    if isinstance(told, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in told if isinstance(one, dict)}
        told = named.get("default")
    return told if isinstance(told, str) and told else None


def _environment() -> "jinja2.Environment":
    """What Transformers runs templates in: a sandbox, with five names of its own."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    found = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _generation_tag()]
    )
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    found.globals |= {"dict": _Dict(), "namespace": _namespace()}
    return found


def _generation_tag() -> "type[jinja2.ext.Extension]":
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class Generation(Extension):
        """`{% generation %}` says what an assistant wrote, for training; here it is its content."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


def _namespace() -> "type[jinja2.utils.Namespace]":
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if str(name).startswith("_"):  # a way to what Python keeps of an object
            raise SecurityError(f"a template keeps nothing under the name {name!r}")

    class Checked(Namespace):
        def __init__(*arguments: Any, **named: Any) -> None:  # noqa: ANN401 - `self` is a name, too
            for name in dict(*arguments[1:], **named):
                check(name)
            Namespace.__init__(*arguments, **named)

        def __setitem__(self, name: str, value: Any) -> None:  # noqa: ANN401
            check(name)
            super().__setitem__(name, value)

    return Checked


class _Dict:
    """What a template may do with `dict`: not the class, which has more to reach."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:  # noqa: ANN401
        return dict(*arguments, **named)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:  # noqa: ANN401
        return dict.fromkeys(keys, value)


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _to_json(
    value: Any,  # noqa: ANN401 - a template's value
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without Jinja's own escapes for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
