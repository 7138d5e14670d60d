"""What deployments are asked where it matters what they answer: a draft's luck depends on it."""

import bisect
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

from owl_deploy.errors import BadInput
from owl_deploy.models.tokenizer import Tokenizer

_FUNCTION = '''def summarize(rows):
    """Return the count, the sum and the largest of the amounts in rows."""
    amounts = [row["amount"] for row in rows if row["amount"] is not None]
    if not amounts:
        return {"count": 0, "sum": 0, "largest": None}
    return {"count": len(amounts), "sum": sum(amounts), "largest": max(amounts)}
'''
_SHIPPED = (
    'def is_leap_year(year: int) -> bool:\n    """Return whether a year has 366 days."""\n',
    "import csv\n\n\ndef read_columns(path, names):\n"
    '    """Read the named columns of a CSV file as lists of floats, by name."""\n',
    f"# summary.py, before:\n{_FUNCTION}\n\n# summary.py, with `sum` renamed to `total`:\n",
    "The lighthouse keeper wrote down the weather every evening, and beside it the names of the "
    "ships that he had seen. One autumn a ship came that carried no name, and",
    "Question: Why does bread rise when it is baked with yeast?\nAnswer:",
    "To set up a new laptop for the team, follow these steps:\n1.",
)
WORDS = sorted(set(re.findall("[A-Za-z]{3,}", " ".join(_SHIPPED))))


def read_prompts(file: Path | None) -> tuple[str, ...]:
    """The prompts in a file of JSON lines, each with a `prompt`; without one, those shipped.

    Raises `BadInput` for a file that has none.
    """
    if file is None:
        return _SHIPPED
    way_out = 'Give lines such as {"prompt": "Once"}, as HumanEval has them.'
    try:
        lines = file.read_text(encoding="utf-8").split("\n")  # others stand within strings
        found = tuple(json.loads(line)["prompt"] for line in lines if line.strip())
        "".join(map(str, found)).encode()  # an escape may be half a letter
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"The prompts in {file} cannot be read ({error!r}).", way_out) from error
    if not found or not all(isinstance(prompt, str) and prompt for prompt in found):
        raise BadInput(f"{file} has no prompts.", way_out)
    return found


def tokens_of(prompts: tuple[str, ...], model: Path, room: int) -> list[list[int]]:
    """The prompts in the tokens of the folder `model`; raises `BadInput` for more than `room`."""
    tokenizer = Tokenizer(model)
    found = [tokenizer.encode(prompt) for prompt in prompts]
    longest = max(map(len, found))
    if longest > room:
        raise BadInput(
            f"The longest prompt has {longest} tokens, and {max(room, 0)} leave room for an answer "
            "in the context.",
            "Give a larger --context, or fewer --new-tokens.",
        )
    return found


def other_words(model: Path, tokens: int, seed: int) -> Iterator[str]:
    """Endless prompts, each of as many words as `tokens` tokens hold, drawn anew for each.

    So no cache of what prompts begin with helps. The same for all that have one tokenizer. Raises
    `BadInput` where `tokens` hold none, and as `tokens_of` does.
    """
    tokenizer, generator = Tokenizer(model), random.Random(seed)

    def count(words: int) -> int:
        return len(tokenizer.encode(" ".join(drawn[:words])))

    while True:
        drawn = generator.choices(WORDS, k=tokens)
        words = bisect.bisect_right(range(tokens + 1), tokens, key=count) - 1
        if words < 1:
            raise BadInput(f"--prompt {tokens} is too small for a word.", "Take 16 or more.")
        yield " ".join(drawn[:words])
