"""Sweeps on real Ray clusters: a node and the driver are killed, and Ctrl-C is pressed."""

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from owl_deploy.utils.artefact import sha256
from tests import tiny

pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")

from ray.cluster_utils import Cluster

from owl_deploy.demo_input import CALIBRATION, MODEL, demo_input
from owl_deploy.distributed.cluster.interrupt import QUESTION
from owl_deploy.utils.record import Record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(5400),  # three sweeps, on a machine that may have other work
    pytest.mark.filterwarnings("ignore"),  # Ray's own warnings
]
PLAN = """
methods: [wanda, magnitude, sparsegpt]
allocations: [uniform]
sparsities: [0.5, 0.7]
targets: ["onnxruntime:fp32", "onnxruntime:int8"]
context: [64]
prompt: [32]
pairs: 1
samples: 4
sequence_length: 64
window: 64
windows: 1
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as many for the sweep without Ray
    head = {"num_cpus": 2, "memory": 2**32, "object_store_memory": 100 * 2**20}
    made = Cluster(initialize_head=True, head_node_args={**head, "include_dashboard": False})
    try:
        made.add_node(**head)
        yield made
    finally:
        made.shutdown()


def records(output: Path) -> list[Record]:
    files = (output / "logs").glob("*.json")
    return [Record.model_validate_json(file.read_text()) for file in files]


def wait_until(reached: Callable[[], bool], driver: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 1800
    while not reached():
        assert driver.poll() is None, "it ended before"
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_for(terminal: int, reached: Callable[[bytes], bool]) -> None:
    """Read what `terminal` shows until it is what was to be reached, or the end is."""
    shown, deadline = b"", time.monotonic() + 1800
    while not reached(shown):
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                shown += os.read(terminal, 65536)
            except OSError:  # Linux's word for the end of a terminal
                assert reached(shown), shown
                return


def sweep_of(name: str, folder: Path) -> list[str]:
    """The command line of the plan's sweep of a model, tiny or the demo's, less where it goes."""
    if name == "demo":
        model, text = demo_input() / MODEL, demo_input() / CALIBRATION
    else:
        model, text = (
            tiny.write_llama(folder / "MODEL", max_position_embeddings=2048),
            folder / "text",
        )
        text.write_text(tiny.text(20000))
    (folder / "plan.yaml").write_text(PLAN)
    sweep = f"sweep {model} --plan plan.yaml -c {text} -p {text}".split()
    return [sys.executable, "-m", "owl_deploy", *sweep]


def test_ctrl_c_on_a_terminal_asks_once_and_then_cancels_all(tmp_path: Path) -> None:
    command = [*sweep_of("tiny", tmp_path), "-o", "out", "--ray", "local"]
    child, terminal = pty.fork()
    if child == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.chdir(tmp_path)
        os.execv(sys.executable, command)

    def states() -> list[str]:
        return [record.state for record in records(tmp_path / "out")]

    wait_for(terminal, lambda _: "running" in states())
    os.write(terminal, b"\x03")
    wait_for(terminal, lambda shown: QUESTION.encode() in shown)
    wait_for(terminal, lambda _: states().count("done") >= 2)
    assert "failed" not in states()
    os.write(terminal, b"\x03")
    wait_for(terminal, lambda shown: b"interrupted; all tasks are cancelled" in shown)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    os.close(terminal)


@pytest.mark.parametrize("model", ["tiny", "demo"])
def test_a_sweep_outlives_a_node_and_its_driver(
    cluster: Cluster, tmp_path: Path, model: str
) -> None:
    sweep = sweep_of(model, tmp_path)
    command = [*sweep, "-o", "ray", "--ray", cluster.address]
    extra = cluster.add_node(num_cpus=2, memory=2**32, object_store_memory=100 * 2**20)
    output = tmp_path / "ray"

    with subprocess.Popen(command, cwd=tmp_path) as driver:
        wait_until(lambda: extra.node_id in {record.node for record in records(output)}, driver)
        cluster.remove_node(extra, allow_graceful=False)
        wait_until(lambda: len(list(output.glob("checkpoints/*/owl.json"))) >= 3, driver)
        driver.kill()
    whole = {path: path.stat().st_mtime_ns for path in output.glob("*/*/measured/task.json")}

    done = subprocess.run(command, cwd=tmp_path, check=False)
    assert done.returncode == 0
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    assert not [path for path in output.rglob(".*") if "owl" in path.name]
    (bench,) = (record for record in records(output) if record.title.startswith("Bench"))
    for other in records(output):
        if other != bench and other.node == bench.node:
            assert other.ended is not None
            assert bench.ended is not None
            assert other.ended <= bench.started or bench.ended <= other.started

    subprocess.run([*sweep, "-o", "here"], cwd=tmp_path, check=True)
    kinds = (
        "checkpoints/*/*.safetensors",
        "checkpoints/*/config.json",
        "checkpoints/*/recipe.yaml",
    )
    files = [file for kind in kinds for file in (tmp_path / "here").glob(kind)]
    assert len(files) >= 12
    for file in files:
        assert sha256(file) == sha256(output / file.relative_to(tmp_path / "here")), file
