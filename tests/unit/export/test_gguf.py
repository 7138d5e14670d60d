import sys

import pytest

from owl_deploy.errors import BadInput, EngineFailed, EnvironmentFailed
from owl_deploy.export.gguf import _output


def say(words: str, code: int = 1) -> list[str]:
    return [sys.executable, "-c", f"print({words!r}); raise SystemExit({code})"]


def test_what_a_part_of_llama_cpp_says_is_kept() -> None:
    assert _output(say("done", 0)) == "done\n"


def test_an_unknown_family_is_bad_input() -> None:
    words = "ERROR:hf-to-gguf:Model OPTForCausalLM is not supported"
    with pytest.raises(BadInput, match="does not know 'OPTForCausalLM'") as caught:
        _output(say(words), "converter", "Take another target.")
    assert caught.value.hint == "Take another target."


def test_a_tokenizer_that_the_converter_misses_is_named() -> None:
    words = "  File a.py\nValueError: Error: Missing /a b/phi/tokenizer.model\nlast"
    with pytest.raises(BadInput, match=r"needs tokenizer\.model, which the checkpoint lacks"):
        _output(say(words), "converter")


def test_a_full_disk_is_the_environments() -> None:
    with pytest.raises(EnvironmentFailed, match="The disk is full"):
        _output(say("OSError: [Errno 28] No space left on device: 'x'"))


def test_a_part_that_was_killed_wanted_memory() -> None:
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(EnvironmentFailed, match=r"^llama\.cpp's quantizer was killed"):
        _output(command, "quantizer")


def test_any_other_failure_ends_with_its_last_line() -> None:
    with pytest.raises(EngineFailed, match="quantizer ended with code 3: the last"):
        _output(say("the first\nthe last\n\n", 3), "quantizer")
    with pytest.raises(EngineFailed, match="no output"):
        _output(say("", 3))
