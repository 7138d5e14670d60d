import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.evaluate import sandbox
from owl_deploy.evaluate.sandbox import Outcome, judge

TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(-3) == 9\n"
needs_bwrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="no Bubblewrap")
pytestmark = needs_bwrap


@pytest.fixture(autouse=True)
def nothing_left_behind(children):
    yield
    assert children() == []


@pytest.fixture
def awaited(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program's time begins when its sandbox is there: a busy machine may take all of it."""

    class Awaited(sandbox._Program):
        def __init__(self, seconds: float) -> None:
            super().__init__(60)
            self.seconds = seconds

        def await_sandbox(self) -> None:
            super().await_sandbox()
            self._ends = time.monotonic() + self.seconds

    monkeypatch.setattr(sandbox, "_Program", Awaited)


def test_a_right_program_passes() -> None:
    sandbox.require_sandbox()
    assert judge("def f(x):\n    return x * x", TESTS, "f") == Outcome(True)


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("def f(x):\n    return x", "a test failed"),
        ("def f(x):\n    return x +", "raised SyntaxError"),
        ("def f(x):\n    return x / 0", "raised ZeroDivisionError"),
        ("def f(x):\n    return object()", "raised TypeError"),
        ("def f(x):\n    return f(x)", "raised RecursionError"),
        ("class Odd(Exception): pass\ndef f(x):\n    raise Odd", "raised Odd"),
        ("def g(x):\n    return x * x", "defines no f"),
        ("f = 4", "defines no f"),
        ("def f(x):\n    raise SystemExit(0)", "raised SystemExit"),
        ("import os\ndef f(x):\n    os._exit(0)", "ended by itself"),
        ("import os\nos._exit(0)", "ended by itself"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "ended by itself"),
    ],
)
def test_a_wrong_program_fails(program: str, why: str) -> None:
    assert judge(program, TESTS, "f") == Outcome(False, why)


@pytest.mark.parametrize(
    "program",
    [
        # What it prints is not read; what it writes where answers go is an answer like any other.
        "print('passed')\ndef f(x):\n    print('passed')\n    return 'passed'",
        "import os\nfor i in range(3, 20):\n    try: os.write(i, b\"('value', True)\\n\" * 9)\n"
        "    except OSError: pass\ndef f(x): return True",
        # An answer equal to everything does not cross the pipe as such.
        "class Yes:\n    def __eq__(self, other): return True\ndef f(x): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\ndef f(x): return Yes(1)",
        "def check(candidate): pass\ndef f(x): return x",
        "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return x",
        "import os\nfor i in range(3, 20):\n    try: os.write(i, b'[' * 100000 + b'\\n')\n"
        "    except OSError: pass\ndef f(x): return x",
    ],
)
def test_passing_cannot_be_forged(program: str) -> None:
    assert not judge(program, TESTS, "f").passed


def test_a_fork_bomb_makes_no_process() -> None:
    bomb = "import os\ndef f(x):\n    while True: os.fork()"
    assert judge(bomb, TESTS, "f").why in ("raised BlockingIOError", "raised PermissionError")
    threads = "import threading\ndef f(x):\n    threading.Thread(target=print).start()"
    assert judge(threads, TESTS, "f").why == "raised RuntimeError"


@pytest.mark.usefixtures("awaited")
@pytest.mark.parametrize(
    ("loop", "seconds", "why"),
    [
        # Before the limit of its processor time, 10 s, ends the first, and the second itself.
        ("while True: pass", 2, "took too long"),
        ("import time; time.sleep(99)", 2, "took too long"),
        ("input()", 20, "raised EOFError"),
    ],
)
def test_what_takes_too_long_is_ended(loop: str, seconds: float, why: str) -> None:
    outcome = judge(f"def f(x):\n    {loop}", TESTS, "f", seconds)
    assert outcome == Outcome(False, why)


@pytest.mark.parametrize(
    ("value", "right", "why"),
    [
        ("frozenset({4})", "{4}", ""),
        ("Fraction(4)", "4", ""),
        ("Decimal(4)", "4", ""),
        ("-inf", "-1e999", ""),
        ("nan", "0", "gave no value that can be read"),
        ("10**5000", "10**5000", "raised ValueError"),  # the most digits that Python writes
    ],
)
def test_a_value_that_is_equal_is_right(value: str, right: str, why: str) -> None:
    program = (
        "from decimal import Decimal\nfrom fractions import Fraction\nfrom math import inf, nan\n"
        f"def f(x):\n    return {value}"
    )
    tests = f"def check(f):\n    assert f(2) == {right}"
    assert judge(program, tests, "f") == Outcome(not why, why)


def test_memory_is_bounded() -> None:
    assert judge("def f(x):\n    return 'x' * 2**32", TESTS, "f").why == "raised MemoryError"


@pytest.mark.usefixtures("awaited")
def test_output_is_bounded() -> None:
    endless = "def f(x):\n    while True: print('x' * 10000)"
    assert judge(endless, TESTS, "f", seconds=2).why == "took too long"  # it goes nowhere
    long = "def f(x):\n    return 'x' * 10_000_000"
    assert judge(long, TESTS, "f").why == "answered too much"


def test_files_are_bounded_and_vanish(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    home = Path.home() / "owl-sandbox-test"
    for path in (mark, home, Path("/usr/owl-sandbox-test"), Path(sys.base_prefix) / "owl-test"):
        write = f"def f(x):\n    open({str(path)!r}, 'w').write('x')\n    return x * x"
        assert not judge(write, TESTS, "f").passed
        assert not path.exists()
    inside = "def f(x):\n    open('/tmp/mine', 'w').write('x')\n    return x * x"
    assert judge(inside, TESTS, "f").passed
    assert not Path("/tmp/mine").exists()
    mark.write_text("secret")
    read = f"def f(x):\n    return len(open({str(mark)!r}).read())"
    assert judge(read, TESTS, "f").why == "raised FileNotFoundError"
    big = "def f(x):\n    open('big', 'wb').write(bytes(2**25))\n    return x * x"
    assert judge(big, TESTS, "f").why in ("raised OSError", "ended by itself")


def as_ordinary_user(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command as nobody where the tests are root's."""
    user = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd="/", env={}, **user
    )


def test_an_ordinary_user_s_program_fills_no_memory_with_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """There the sandbox's root and /dev belong to the program; /tmp alone has a size."""
    monkeypatch.setattr(sandbox, "_is_root", lambda: False)
    monkeypatch.setattr(sys, "base_prefix", "/usr")  # the tests' own may be in root's home
    namespaces = as_ordinary_user("bwrap", "--unshare-user", "--ro-bind", "/", "/", "true")
    if namespaces.returncode:
        pytest.skip(f"no sandbox for an ordinary user: {namespaces.stderr}")
    places = ("/mine", "/usr/mine", "/home/mine", "/dev/mine", "/dev/shm/mine", "/tmp/mine")
    script = (
        f"for file in {' '.join(places)}; do echo x > $file && echo $file; done\n"
        "echo x > /dev/null && echo /dev/null\nmkdir /folder && echo /folder"
    )
    done = as_ordinary_user(*sandbox._bubblewrap(), "/bin/sh", "-c", script)
    assert done.stdout.split() == ["/tmp/mine", "/dev/null"], done.stderr
    assert not any(Path(place).exists() for place in places)


def test_there_is_no_network() -> None:
    program = (
        "import socket\ndef f(x):\n    own = socket.create_server(('127.0.0.1', 0))\n"
        "    socket.create_connection(('127.0.0.1', {}), 1)\n    return x * x"
    )
    # Sockets are there, and a network with nothing in it but the program's own.
    assert judge(program.format("own.getsockname()[1]"), TESTS, "f") == Outcome(True)
    with socket.create_server(("127.0.0.1", 0)) as server:
        outcome = judge(program.format(server.getsockname()[1]), TESTS, "f")
    assert outcome == Outcome(False, "raised ConnectionRefusedError")


def test_nobody_else_can_be_signalled() -> None:
    def kills(who: str | int, signal: str) -> Outcome:
        program = (
            f"import os\nfrom signal import SIGTERM\ndef f(x):\n    os.kill({who}, {signal})\n"
            "    return x * x"
        )
        return judge(program, TESTS, "f")

    assert kills("os.getpid()", "0") == Outcome(True)
    assert kills("os.getpid()", "SIGTERM") == Outcome(False, "ended by itself")
    assert kills(0, "SIGTERM") == Outcome(False, "ended by itself")  # the group of its own
    for who in (os.getpid(), -1):  # this process, and all that there are
        assert kills(who, "SIGTERM") == Outcome(False, "raised ProcessLookupError")


def test_the_environment_stays_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "42")
    program = "import os\ndef f(x):\n    return x * x if 'SECRET' not in os.environ else 0"
    assert judge(program, TESTS, "f").passed


def test_helpers_of_the_program_are_there_for_the_tests() -> None:
    tests = (
        "def check(candidate):\n    assert candidate(helper(3)) == (9, {1: [2.5, None, True]})\n"
    )
    program = "def helper(x): return -x\ndef f(x): return x * x, {1: [2.5, None, True]}"
    assert judge(program, tests, "f").passed


def test_killed_from_outside_it_leaves_no_process() -> None:
    code = (
        "from owl_deploy.evaluate.sandbox import judge\nprint('go', flush=True)\n"
        "judge('import time\\ntime.sleep(600)', 'def check(f): f(1)', 'f', 600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        run.stdout.readline()
        ends = time.monotonic() + 60
        while not psutil.Process(run.pid).children():
            assert time.monotonic() < ends
            time.sleep(0.05)
        time.sleep(1)
        below = psutil.Process(run.pid).children(recursive=True)
        assert below
        run.kill()
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive


def test_without_bubblewrap_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(EnvironmentFailed, match="bwrap"):
        sandbox.require_sandbox()


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (
            "echo a line >&2; echo bwrap: Unknown option --disable-userns >&2; exit 1",
            r"\(bwrap: Unknown option --disable-userns\)\. It must be version 0\.8 or newer",
        ),
        ("echo bwrap: setting up uid map: Permission denied >&2; exit 1", r"uid map: .*sysctl"),
        ("exit 1", r"no sandbox here \(ended by itself\)"),
    ],
)
def test_why_bubblewrap_makes_no_sandbox_is_said_in_its_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, says: str
) -> None:
    own = tmp_path / "bwrap"
    own.write_text(f"#!/bin/sh\n{script}\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailed, match=says):
        sandbox.require_sandbox()


@pytest.mark.usefixtures("awaited")
def test_a_program_that_reads_nothing_cannot_hold_its_judge() -> None:
    """It falls asleep when it has answered, and is asked for more than a pipe holds."""
    program = """
import signal, time
def f(x):
    signal.signal(signal.SIGALRM, lambda *_: time.sleep(99))
    signal.setitimer(signal.ITIMER_REAL, 0.1)
"""
    tests = "import time\ndef check(f):\n    f(1)\n    time.sleep(1)\n    f('a' * 900_000)"
    began = time.monotonic()
    assert judge(program, tests, "f", seconds=2) == Outcome(False, "took too long")
    assert time.monotonic() - began < 30


def test_the_tests_have_python_s_own_functions() -> None:
    program = "def abs(x):\n    return 0\n\n\ndef f(x):\n    return 99"
    tests = "def check(f):\n    assert abs(f(1) - 5) < 1e-6"
    assert judge(program, tests, "f") == Outcome(False, "a test failed")


def test_a_sandbox_that_cannot_be_made_any_more_is_no_wrong_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sandbox.require_sandbox()
    own = tmp_path / "bwrap"
    own.write_text("#!/bin/sh\necho bwrap: Creating new namespace failed >&2; exit 1\n")
    own.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EnvironmentFailed, match=r"no sandbox here .*namespace failed"):
        judge("def f(x):\n    return x * x", TESTS, "f")


@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def f(x):\n    return (n for n in range(x))", True),
        ("def f(x):\n    return map(abs, range(x))", True),
        ("def f(x):\n    return iter([1, 0])", False),
        ("def f(x):\n    while True: yield x", False),
    ],
)
def test_what_a_test_makes_a_tuple_of_may_be_an_iterator(program: str, passed: bool) -> None:
    tests = "def check(candidate):\n    assert tuple(candidate(2)) == (0, 1)\n"
    assert judge(program, tests, "f").passed is passed
    alike = "def check(candidate):\n    assert candidate(2) == [0, 1]\n"
    assert not judge(program, alike, "f").passed
