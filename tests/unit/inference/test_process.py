import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from owl_deploy.errors import BadInput, EngineFailed
from owl_deploy.inference import EngineProcess, process
from owl_deploy.inference.process import Child


def fake(folder: Path, **behaviour: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "fake.json").write_text(json.dumps(behaviour))
    return folder


# `children`: what a test has started and not ended.
Children = Callable[[], list[psutil.Process]]


def test_a_worker_answers_whatever_its_engine_prints(tmp_path: Path, children: Children) -> None:
    with EngineProcess("fake", fake(tmp_path, decode_ms=20, load_s=3), threads=2) as engine:
        assert engine.loaded["seconds"] == pytest.approx(3)
        assert engine.loaded["threads"] == 2
        answer = engine.request("decode", prompt=[1, 2], steps=4, warmup=3)
        assert answer["latencies_ms"] == pytest.approx([20] * 4)
        assert engine.request("prefill", prompt=[1], repeats=2, warmup=1)["latencies_ms"] == [0, 0]
        assert engine.request("memory")["peak_bytes"] > 1_000_000
    assert children() == []


def test_greedy_writes_the_logits_it_chose_by(tmp_path: Path) -> None:
    file, prompt_file = tmp_path / "logits.npy", tmp_path / "prompt.npy"
    with EngineProcess("fake", fake(tmp_path / "d", vocab=8)) as engine:
        answer = engine.request(
            "greedy",
            tokens=[1, 5],
            count=3,
            logits_file=str(file),
            prompt_logits_file=str(prompt_file),
        )
    assert answer["tokens"] == [6, 7, 0]
    assert np.load(file).argmax(axis=1).tolist() == [6, 7, 0]
    assert np.load(prompt_file).argmax(axis=1).tolist() == [2, 6]
    assert np.load(prompt_file).dtype == np.float32


def test_score_predicts_all_but_the_first_token_of_a_window(tmp_path: Path) -> None:
    with EngineProcess("fake", fake(tmp_path / "d", vocab=10)) as engine:
        losses = [engine.request("score", tokens=ids)["loss"] for ids in ([3, 4, 5], [0, 1, 9])]
    norm = np.log(np.e + 9)  # logits are 1 at the successor, else 0
    assert losses == pytest.approx([norm - 1, norm - 0.5])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("abort", r"was ended by SIGABRT in 'load'.*last words: .*assertion failed in load"),
        ("exit", r"ended with code 7 in 'load'"),
        ("raise", r"failed in 'load': the fake engine was told to fail"),
    ],
)
def test_a_failing_engine_is_an_error_with_its_last_words(
    tmp_path: Path, how: str, message: str, children: Children
) -> None:
    folder = fake(tmp_path, fail={"op": "load", "how": how})
    with pytest.raises(EngineFailed, match=message) as caught, EngineProcess("fake", folder):
        pass
    assert caught.value.exit_code == 4
    assert children() == []


def test_an_engine_that_hangs_is_ended_at_the_time_limit(
    tmp_path: Path, children: Children
) -> None:
    folder = fake(tmp_path, fail={"op": "prompt", "how": "hang"})
    started = time.monotonic()
    with EngineProcess("fake", folder, timeout_s=60.0) as engine:
        assert engine.timeout_s == 60
        engine.timeout_s = 1.0  # it has started, for which a busy machine takes longer
        with pytest.raises(EngineFailed, match="did not finish 'prefill' within 1 s"):
            engine.request("prefill", prompt=[1], repeats=1, warmup=0)
        assert children() == []
    assert time.monotonic() - started < 60  # and not the ten minutes that are usual


@pytest.mark.parametrize(
    "answer", ["garbage", "\\xff\\xfe", "[1]", "{}", '{"ok": false}', '{"ok": 1}', "[" * 100_000]
)
def test_an_answer_that_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, children: Children
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(f"input()\nimport os\nos.write(1, b'{answer}\\n')\ninput()\n")
    monkeypatch.setattr(process, "WORKER", worker)
    with pytest.raises(EngineFailed, match="gave no answer to 'load' that can be read"):
        EngineProcess("fake", fake(tmp_path / "d")).__enter__()
    assert children() == []


def test_requests_after_a_death_are_errors_too(tmp_path: Path) -> None:
    with EngineProcess("fake", fake(tmp_path, fail={"op": "next", "how": "abort"})) as engine:
        for _ in range(2):
            with pytest.raises(EngineFailed):
                engine.request("decode", prompt=[1], steps=1, warmup=0)


def test_continuations_are_scored_token_by_token(tmp_path: Path) -> None:
    norm = np.log(np.e + 9)  # logits are 1 at the successor, else 0
    with EngineProcess("fake", fake(tmp_path, vocab=10)) as engine:
        answer = engine.request(
            "continuations", context=[3, 4], targets=[[5], [6], [5, 6, 7], [5, 6, 8], [1, 2]]
        )
    likely, other = 1 - norm, -norm
    wanted = [[likely], [other], [likely] * 3, [likely, likely, other], [other, likely]]
    for found, expected in zip(answer["logprobs"], wanted, strict=True):
        assert found == pytest.approx(expected)
    assert answer["greedy"] == [True, False, True, False, False]


def test_greedy_goes_on_from_its_cache(tmp_path: Path) -> None:
    with EngineProcess("fake", fake(tmp_path, vocab=8)) as engine:
        assert engine.request("greedy", tokens=[1, 2], count=2)["tokens"] == [3, 4]
        assert engine.request("greedy", tokens=[4], count=2, fresh=False)["tokens"] == [5, 6]


def test_an_unknown_operation_is_an_error(tmp_path: Path) -> None:
    with (
        EngineProcess("fake", fake(tmp_path)) as engine,
        pytest.raises(EngineFailed, match="unknown operation __init__"),
    ):
        engine.request("__init__")


def test_what_an_engine_started_ends_with_it_also_where_it_has_crashed(tmp_path: Path) -> None:
    child = Child("fake", tmp_path)
    child._spawn(["bash", "-c", "sleep 600 & echo $!; exit 3"], dict(os.environ), subprocess.PIPE)
    assert child._process is not None
    assert child._process.stdout is not None
    helper = psutil.Process(int(child._process.stdout.readline()))
    child._process.wait()
    child.close()
    helper.wait(timeout=60)
    child.close()  # once more, as in an `except` and then an `__exit__`


SCRIPT = """
import sys
from pathlib import Path
from owl_deploy.inference import EngineProcess, process
with EngineProcess("fake", Path(sys.argv[1])) as engine:
    print(engine._process.pid, flush=True)
    engine.request("prefill", prompt=[1], repeats=1, warmup=0)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_worker_does_not_outlive_its_parent(tmp_path: Path, how: signal.Signals) -> None:
    folder = fake(tmp_path, fail={"op": "prompt", "how": "hang"})
    parent = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    time.sleep(0.2)
    os.kill(parent.pid, how)
    parent.wait(timeout=60)
    parent.stdout.close()
    worker.wait(timeout=60)
    assert not worker.is_running()


@pytest.mark.parametrize("how", ["abort", "hang"])
def test_what_an_engine_left_in_its_temporary_folder_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    folder = fake(tmp_path / "d", leaves="half a model", fail={"op": "prompt", "how": how})
    with EngineProcess("fake", folder) as engine:
        engine.timeout_s = 1.0
        (own,) = scratch.iterdir()
        assert [path.read_text() for path in own.glob("*/left")] == ["half a model"]
        with pytest.raises(EngineFailed):
            engine.request("prefill", prompt=[1], repeats=1, warmup=0)
    assert list(scratch.iterdir()) == []


def test_threads_are_no_more_than_a_machine_bears(monkeypatch: pytest.MonkeyPatch) -> None:
    for processors, most in ((None, 64), (2, 64), (96, 384)):
        monkeypatch.setattr(os, "cpu_count", lambda processors=processors: processors)
        assert process.threads_for(most) == most
        with pytest.raises(BadInput, match=f"It must be {most} or less"):
            process.threads_for(most + 1)
