"""What the commands leave in a user's home: nothing of the engines' own making."""

import os
import subprocess
import sys


def test_engines_report_to_nobody_and_leave_no_identifier(sparse, tmp_path):
    """ONNX Runtime's builds do both unless they are told not to, but not where they see a CI."""
    home, deployment = tmp_path / "home", tmp_path / "deployment"
    home.mkdir()
    kept = ("PATH", "LD_LIBRARY_PATH", "OWL_RUNTIME_LIBRARY")
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment |= {"HOME": str(home), "OWL_CACHE": str(tmp_path / "cache")}
    for arguments in (
        ["-m", "owl_deploy", "export", str(sparse), "-o", str(deployment), "--target", "owl"],
        ["examples/generate.py", str(deployment), "a b c"],
    ):
        subprocess.run([sys.executable, *arguments], env=environment, check=True)
    assert [path for path in home.rglob("*") if path.is_file()] == []
