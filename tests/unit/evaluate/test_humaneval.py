import shutil
from importlib import resources

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.sandbox import judge

pytest.importorskip("lm_eval.tasks", reason="pip install 'owl-deploy[eval]'")
from owl_deploy.evaluate import humaneval

PROBLEM = {
    "prompt": 'import math\n\n\ndef helper(x):\n    return x\n\n\ndef f(x):\n    """x^2."""\n',
    "entry_point": "f",
}
HEAD = "import math\n\n\ndef helper(x):\n    return x\n\n\n\n"


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("```python\ndef f(x):\n    return x\n```\nThis is it.", "def f(x):\n    return x\n"),
        ("It is:\n\n```\ndef f(x):\n    return x", "def f(x):\n    return x"),
        ("```py\nf(2)\n```\nof\n```py\ndef f(x): pass\n```\n", "def f(x): pass\n"),
        ("```python\ndef f(x): 1\n```\nor\n```python\ndef f(x): 2\n```", "def f(x): 1\n"),
        ("def f(x):\n    return x", "def f(x):\n    return x"),
        ("1. So:\n\n   ```py\n   def f (x):\n       pass\n   ```\n", "def f (x):\n    pass\n"),
        ("~~~\ndef f(x): pass\n~~~\n", "def f(x): pass\n"),
        ("I cannot.", "I cannot."),
    ],
)
def test_the_program_is_the_first_block_that_defines_it(answer: str, program: str) -> None:
    assert humaneval.program_of(PROBLEM, answer) == HEAD + program


def test_a_model_without_a_template_goes_on_from_the_prompt() -> None:
    answer = "    return x * x"
    assert humaneval.continued(PROBLEM, answer) == PROBLEM["prompt"] + answer


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")
@pytest.mark.parametrize(
    "numbers", [(0, 32, 38, 50), pytest.param(range(164), marks=pytest.mark.slow)]
)
def test_the_problems_own_solutions_pass_and_nothing_else_does(numbers: tuple[int, ...]) -> None:
    problems = humaneval.problems()
    assert len(problems) == 164
    for one in (problems[number] for number in numbers):
        right = one["prompt"] + one["canonical_solution"]
        assert judge(right, one["test"], one["entry_point"]).passed, one["task_id"]
        nothing = one["prompt"] + "    return None\n"
        assert not judge(nothing, one["test"], one["entry_point"]).passed, one["task_id"]


def test_programs_run_only_where_that_is_allowed() -> None:
    with pytest.raises(BadInput, match="programs that the model wrote") as refused:
        humaneval.humaneval(allow_code=False)
    assert "--allow-code" in str(refused.value)


def test_without_the_package_the_way_to_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "files", lambda name: __import__("no_such_package"))
    with pytest.raises(BadInput, match=r"pip install 'owl-deploy\[eval\]'"):
        humaneval.problems()


def test_other_problems_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "HumanEval.jsonl.gz").write_bytes(b"others")
    monkeypatch.setattr(resources, "files", lambda name: tmp_path)
    with pytest.raises(BadInput, match="does not hold the 164 problems"):
        humaneval.problems()
