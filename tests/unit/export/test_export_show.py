from typing import Any

import pytest

from owl_deploy.export.show import advise, show
from owl_deploy.models.manifest import DeploymentManifest

OTHERS = "Note: on CPUs `--target owl --precision int4` is usually the one to deploy, or int8 where"
JUDGED, TOLD = "parity checked against PyTorch", "compared with PyTorch"


def manifest(
    steps: int = 7, equal: float = 9 / 32, tolerance: float | None = None, **others: Any
) -> DeploymentManifest:
    """One whose engine generated a token of its own after six, and three as PyTorch did later."""
    runs = {
        "onnxruntime cached": {"relative_difference": 0.33, "equal_greedy_tokens": 22 / 32},
        "owl generating": {
            "relative_difference": 0.2,
            "equal_generated_tokens": equal,
            "compared_steps": steps,
        },
    }
    parity = {"greedy_tokens": 32, "tolerance": tolerance, "runs": runs}
    known = {"target": "owl", "precision": "int4", "engine": "owl", "parity": parity}
    return DeploymentManifest.model_validate(known | others)


def shown(made: DeploymentManifest, capsys: pytest.CaptureFixture[str]) -> str:
    show(made, "out")
    text = capsys.readouterr().out
    assert all(len(line) <= 80 for line in text.splitlines() if line.startswith("parity"))
    return " ".join(text.split())


def test_generated_tokens_are_the_first_that_are_the_same(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = shown(manifest(), capsys)
    assert "cached 3.3e-01 of the largest logit, 22 of 32 tokens the same" in text
    assert "generating 2.0e-01 of the largest logit, the first 6 of 32 tokens the same" in text
    assert "the first 0 of 32 tokens" in shown(manifest(1, 0.0), capsys)
    assert "the first 32 of 32 tokens" in shown(manifest(32, 1.0), capsys)


def test_what_is_not_judged_is_said_to_be_told(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(manifest(), capsys)
    assert (
        "The differences are told and not judged: rounding changes logits, and `owl eval`" in text
    )
    assert (JUDGED in text, TOLD in text) == (False, True)
    text = shown(manifest(tolerance=0.05), capsys)
    assert (JUDGED in text, TOLD in text, "not judged" in text) == (True, False, False)


@pytest.mark.parametrize(
    ("engine", "precision", "says"),
    [
        ("onnxruntime", "fp32", True),
        ("owl", "bf16", True),
        ("owl", "int8", False),
        ("deepsparse", "fp32", False),
        (None, "fp32", False),  # of a family that the target owl does not know
    ],
)
def test_what_else_to_try_on_a_cpu(
    capsys: pytest.CaptureFixture[str], engine: str | None, precision: str, says: bool
) -> None:
    advise(manifest(engine=engine, precision=precision))
    out, err = capsys.readouterr()
    assert (out, OTHERS in err, err.count("\n")) == ("", says, int(says))


@pytest.mark.parametrize(("options", "says"), [((), True), (("--precision", "fp32"), False)])
def test_the_command_line_says_it_where_nobody_chose(
    owl: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], says: bool
) -> None:
    made = manifest(engine="onnxruntime", precision="fp32")
    monkeypatch.setattr("owl_deploy.api.export", lambda *_, **__: made)
    code, out, err = owl("export", "model", "-o", "out", "--json", *options)
    assert (code, OTHERS in err, OTHERS in out) == (0, says, False)
