"""JSON lines, as trainers read them: in each line a `text`, or the `messages` of a conversation.

Messages become text by the model's own chat template, whole, as TRL's SFTTrainer makes it.
"""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

from owl_deploy.errors import BadInput, first_line

SUFFIX = ".jsonl"
_KEYS = ("messages", "text")
_LOOKED_AT = 8  # lines, for a record
_HALF = re.compile("[\ud800-\udfff]")


class JsonLines(str):
    """Records in JSON lines that lie in no file."""

    __slots__ = ()


def has_records(text: str) -> bool:
    """Whether one of its first lines, but for blank ones, is of a record; else it is plain text."""
    lines = (found[0] for found in re.finditer(r"[^\n]+", text) if found[0].strip())
    first = map(_parsed, itertools.islice(lines, _LOOKED_AT))
    return any(isinstance(one, dict) and any(key in one for key in _KEYS) for one in first)


def as_text(name: object, lines: str, tokenizer: Any, separator: str) -> str:  # noqa: ANN401
    """The text of the records in `lines`: conversations one after another, others apart.

    Raises `BadInput` for a line that is no record, and for messages that the chat template of
    `tokenizer` does not take, or where it has none; `name` says in what.
    """
    parts: list[str] = []
    for number, record in _records(name, lines):
        if isinstance(record.get("messages"), list):  # a table has nothing there where a text is
            parts.append(in_template(f"Line {number} of {name}", record["messages"], tokenizer))
        else:
            parts += [record["text"], separator]
    return _whole("".join(parts).removesuffix(separator))


def _parsed(line: str) -> Any:  # noqa: ANN401 - a JSON value
    """What a line holds; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # the second of one that is nested without end
        return None


def _whole(text: str) -> str:
    """The text with a mark for each half of a letter, which JSON can hold and no tokenizer takes.

    Two halves that belong together are their letter.
    """
    if not _HALF.search(text):
        return text  # and not two copies of it
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _records(name: object, lines: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines.split("\n"), 1):  # others than that stand within strings
        if not line.strip():
            continue
        record = _parsed(line)
        if not isinstance(record, dict) or not (
            isinstance(record.get("text"), str) or isinstance(record.get("messages"), list)
        ):
            raise BadInput(
                f"Line {number} of {name} is no record with a text or messages.",
                'Give lines such as {"text": "Once"} or '
                '{"messages": [{"role": "user", "content": "Hello"}, ...]}.',
            )
        yield number, record


def in_template(where: str, messages: list[Any], tokenizer: Any, **options: Any) -> str:  # noqa: ANN401
    """`messages` in the chat template of `tokenizer`; `options`: of Transformers' own call.

    Raises `BadInput`, with `where` they stand, for a tokenizer that has no template, and for
    messages that it does not take.
    """
    if not tokenizer.chat_template:
        raise BadInput(
            f"{where} has messages, and this model has no chat template for them.",
            'Take a chat model, or give lines such as {"text": "Once"}.',
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # whatever a template raises, which is a program
        raise BadInput(
            f"{where} has messages that the model's chat template does not take "
            f"({first_line(error)}).",
            'Each has a "role" and a "content"; many templates want user and assistant in turn.',
        ) from error
