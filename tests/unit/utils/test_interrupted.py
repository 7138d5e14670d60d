import subprocess
import sys

import pytest

from owl_deploy.utils import interrupted

# Ctrl-C comes when `owl` imports the module argv[1].
AT_AN_IMPORT = """
import os, signal, sys
from owl_deploy.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

wanted = sys.argv.pop()
sys.meta_path.insert(0, Finder())
main()
"""


def test_it_says_what_is_left():
    assert interrupted.sentence() == "interrupted; finished outputs are untouched."
    assert interrupted.sentence("all is kept") == "interrupted; all is kept."


@pytest.mark.parametrize("module", ["owl_deploy.cli", "typer", "pydantic"])
def test_ctrl_c_during_the_start_is_no_traceback(module):
    done = subprocess.run(
        [sys.executable, "-c", AT_AN_IMPORT, module], capture_output=True, text=True, check=False
    )
    assert done.stderr == f"owl: {interrupted.sentence()}\n"
    assert done.returncode == 130


def test_nothing_is_imported_before_it_can_be_said():
    code = (
        "import sys; before = set(sys.modules)\n"
        "import owl_deploy.__main__\n"
        "print(*sorted(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = done.stdout.split()
    ours = [name for name in found if name.startswith("owl_deploy")]
    assert ours == [
        "owl_deploy",
        "owl_deploy.__main__",
        "owl_deploy.utils",
        "owl_deploy.utils.interrupted",
    ]
    assert not {"typing", "importlib.metadata", "typer"} & set(found)
