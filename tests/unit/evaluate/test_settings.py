from pathlib import Path

import pytest

from owl_deploy.errors import BadInput
from owl_deploy.evaluate.run import evaluate
from owl_deploy.evaluate.settings import EvaluationSettings


def test_one_name_is_not_taken_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert EvaluationSettings(tasks="humaneval").tasks == ("humaneval",)
    assert EvaluationSettings(tasks=["rte", "boolq"]).tasks == ("rte", "boolq")
    for one in ("MODEL", Path("MODEL")):
        with pytest.raises(BadInput, match="no model folder 'MODEL'"):
            evaluate(one, EvaluationSettings(text="text.txt"))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_or_a_text_is_a_str_or_a_path(
    llama: Path, text_file: Path, tmp_path: Path, kind: type
) -> None:
    asked = {"text": kind(text_file), "window": 64, "windows": 1}
    (found,) = evaluate(kind(llama), EvaluationSettings(**asked))
    assert found.perplexity is not None
    assert found.perplexity.text == str(text_file)
    adapter = kind(tmp_path / "adapter")
    with pytest.raises(BadInput, match="adapter"):
        evaluate(llama, EvaluationSettings(**asked, adapter=adapter))
    with pytest.raises(BadInput, match="no folder"):
        evaluate(llama, EvaluationSettings(tasks="rte", tasks_path=adapter))
