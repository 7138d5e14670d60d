import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from owl_deploy.bench import BenchPlan, Result, entries, measure, read_result, run_bench, show
from owl_deploy.bench.journal import Journal
from owl_deploy.bench.measure import Opener
from owl_deploy.bench.run import bench, run_gate
from owl_deploy.bench.stats import process_median
from owl_deploy.cli import app
from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.inference import EngineProcess, environment
from owl_deploy.models.manifest import BlockShares
from owl_deploy.utils import lock as leases
from tests import tiny
from tests.unit.bench.made import result
from tests.unit.utils.test_lease import elsewhere


def fake(folder: Path, **behaviour: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "fake.json").write_text(json.dumps(behaviour))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    sparse = fake(tmp_path / "sparse", decode_ms=10, prefill_ms=50, noise=0.01)
    dense = fake(tmp_path / "dense", decode_ms=15, prefill_ms=50, noise=0.01)
    return sparse, dense


def recording(opened: list[str], limited: str = "") -> Opener:
    """Notes what is opened. With `limited` the plan's time limit is for that one alone, and once it
    is open: a busy machine takes longer to start an engine.
    """

    @contextmanager
    def open_and_note(engine: str, path: Path, **options: Any) -> Iterator[EngineProcess]:
        opened.append(path.name)
        patience = {"timeout_s": None} if limited else {}
        with EngineProcess(engine, path, **options | patience) as process:
            if path.name == limited:
                process.timeout_s = options["timeout_s"]
            yield process

    return open_and_note


def test_rounds_alternate_and_each_sample_is_a_fresh_process(pair: tuple[Path, Path]) -> None:
    opened: list[str] = []
    plan = BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=4)
    result = run_bench(plan, opener=recording(opened))
    assert opened == ["sparse", "dense", "dense", "sparse"] * 2
    sparse, dense = result.subjects
    assert [sample.round for sample in sparse.samples] == [0, 1, 2, 3]
    assert len(dense.samples[0].latencies_ms["decode@512"]) == 32
    assert len(dense.samples[0].latencies_ms["prefill@128"]) == 5


def test_speedups_name_their_baseline_and_are_not_claimed_in_vain(
    pair: tuple[Path, Path],
) -> None:
    result = run_bench(BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=6))
    decode, prefill = result.comparisons
    assert decode.verdict == "faster"
    assert decode.ratio == pytest.approx(1.5, rel=0.05)
    assert (decode.candidate, decode.baseline) == ("sparse", "dense")
    assert abs(prefill.ratio - 1) < 0.05
    assert result.statistics["decode@512"]["sparse"]["tokens_per_s"] == pytest.approx(100, rel=0.05)


@pytest.mark.usefixtures("in_process")
def test_equal_times_are_seldom_told_apart(tmp_path: Path) -> None:
    one, other = (fake(tmp_path / name, prefill_ms=50, noise=0.05) for name in ("one", "other"))
    plan = BenchPlan(candidates=(one,), baselines=(other,), scenarios=("prefill",), pairs=8)
    told = []
    for seed in range(20):
        random.seed(seed)  # the fake engine draws its noise from it
        told += [comparison.verdict for comparison in run_bench(plan).comparisons]
    assert len(told) == 20
    assert told.count("faster") + told.count("slower") <= 2  # of intervals of 90 %


def test_the_prompt_leaves_room_so_that_the_last_token_sees_the_context(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []
    request = EngineProcess.request

    def note(self: EngineProcess, op: str, **arguments: Any) -> dict[str, Any]:
        asked.append((op, arguments))
        return request(self, op, **arguments)

    monkeypatch.setattr(EngineProcess, "request", note)
    run_bench(BenchPlan(candidates=pair[:1], pairs=1, context=100, prompt=40))
    decode = dict(asked)["decode"]
    assert len(decode["prompt"]) + decode["warmup"] + decode["steps"] == 100
    assert len(dict(asked)["prefill"]["prompt"]) == 40
    assert dict(asked)["load"]["context"] == 100


@pytest.mark.parametrize("how", ["abort", "hang", "raise", "exit"])
def test_an_engine_that_fails_keeps_the_others_results(tmp_path: Path, how: str) -> None:
    good = fake(tmp_path / "good", decode_ms=10, prefill_ms=50)
    bad = fake(tmp_path / "bad", decode_ms=10, prefill_ms=50, fail={"op": "prompt", "how": how})
    opened: list[str] = []
    plan = BenchPlan(candidates=(bad,), baselines=(good,), pairs=3, time_limit_s=2)
    result = run_bench(plan, opener=recording(opened, limited="bad"))
    assert opened.count("bad") == 1
    assert len(result.subjects[1].samples) == 3
    assert result.comparisons == ()
    assert "'fake'" in result.failures[0]
    shown(result)


def test_an_engine_that_fails_at_one_context_is_measured_at_the_others(tmp_path: Path) -> None:
    good = fake(tmp_path / "good", decode_ms=10, prefill_ms=50)
    fail = {"op": "load", "how": "abort", "beyond": 512}
    bad = fake(tmp_path / "bad", decode_ms=20, prefill_ms=50, fail=fail)
    opened: list[str] = []
    scenarios = ("decode@64", "decode@600", "prefill@32")
    plan = BenchPlan(candidates=(bad,), baselines=(good,), pairs=3, scenarios=scenarios)
    result = run_bench(plan, opener=recording(opened))
    assert opened.count("good") == 9
    assert opened.count("bad") == 3 + 1 + 3  # what failed is not tried again
    subject = result.subjects[0]
    assert subject.failure is None
    assert list(subject.failed) == ["decode@600"]
    (failure,) = result.failures
    assert failure.startswith("decode@600: ")
    assert "'load'" in failure
    assert set(result.statistics["decode@64"]) == {"bad", "good"}
    assert set(result.statistics["decode@600"]) == {"good"}
    assert {one.scenario for one in result.comparisons} == {"decode@64", "prefill@32"}
    assert {one.pairs for one in result.comparisons} == {3}
    shown(result)
    assert Result.model_validate_json(result.model_dump_json()) == result


def test_an_engine_that_is_not_installed_is_said_before_anything_is_timed(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "is_installed", lambda name: False)
    opened: list[str] = []
    with pytest.raises(EnvironmentFailed, match="'fake' is not installed") as caught:
        run_bench(BenchPlan(candidates=pair), opener=recording(opened))
    assert caught.value.exit_code == 4
    assert opened == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scenarios": ("decod",)}, "Did you mean 'decode'"),
        ({"engines": ("owll",)}, "Did you mean 'owl'"),
        ({"engines": ("onnxruntime",)}, "cannot open"),
        ({"context": 20}, "--context 20 is too small"),
        ({"pairs": 0}, "--pairs 0"),
        ({"threads": -1}, "--threads -1"),
        ({"context": (512, 0)}, "--context 0 is too small"),
        ({"new_tokens": 1}, "--new-tokens 1"),
        ({"scenarios": ("prefill@64x2",)}, "--scenario prefill@64x2 is none"),
        ({"scenarios": ("generate@64",)}, "--scenario generate@64 is none"),
        ({"scenarios": ("generate@128+1",)}, r"generate@128\+1 makes too few new tokens. Make 2"),
        ({"scenarios": ("requests@128+1",)}, r"requests@128\+1 makes too few new tokens"),
        ({"scenarios": ("answers@1",)}, "answers@1 makes too few new tokens"),
        ({"scenarios": ("decode@0",)}, "--context 0 is too small"),
        ({"clients": (8,)}, "--clients is for --scenario requests"),
        ({"streams": (4,)}, "--streams is for --scenario throughput"),
        ({"new_tokens": 9}, "--new-tokens is for --scenario answers or generate or requests"),
        ({"prompts": Path("p")}, "--prompts is for --scenario answers"),
        ({"time_limit_s": float("nan")}, "--time-limit nan is no time"),
        ({"time_limit_s": 0.0}, "--time-limit 0.0 is no time"),
        ({"scenarios": ("answers",), "context": (512, 1024)}, "answers has one room for all"),
        ({"scenarios": ("decode",), "prompt": 64}, "--prompt is for --scenario generate or"),
        ({"scenarios": ("decode@64x2",), "batch": (4,)}, "--batch is for --scenario decode"),
        ({"draft_tokens": 4}, "--draft-tokens is for a draft"),
    ],
)
def test_bad_plans_get_one_sentence(
    pair: tuple[Path, Path], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        run_bench(BenchPlan(candidates=pair, **settings))


def test_equal_names_are_told_apart(tmp_path: Path) -> None:
    one = fake(tmp_path / "a" / "model", decode_ms=1, prefill_ms=1)
    two = fake(tmp_path / "b" / "model", decode_ms=1, prefill_ms=1)
    result = run_bench(BenchPlan(candidates=(one,), baselines=(two, one), pairs=1))
    assert len({subject.name for subject in result.subjects}) == 3


def test_every_scenario_is_measured_in_the_process_that_suits_it(pair: tuple[Path, Path]) -> None:
    opened: list[str] = []
    plan = BenchPlan(
        candidates=pair[:1],
        baselines=pair[1:],
        scenarios=("decode", "prefill", "generate", "throughput"),
        context=(128, 256),
        prompt=(64, 200),
        batch=(1, 4),
        streams=(3,),
        new_tokens=32,
        pairs=1,
    )
    result = run_bench(plan, opener=recording(opened))
    keys = {scenario.key for scenario in result.scenarios}
    assert keys == {
        *("decode@128", "decode@256", "decode@128x4", "decode@256x4"),
        *("prefill@64", "prefill@200", "generate@64+32", "generate@200+32"),
        *("throughput@128x3", "throughput@256x3"),
    }
    assert opened == ["sparse"] * 6 + ["dense"] * 6  # context x batch, context x streams
    rows = {key: row["sparse"] for key, row in result.statistics.items()}
    assert rows["decode@128x4"]["tokens_per_s"] == pytest.approx(400, rel=0.1)
    assert rows["generate@64+32:first"]["median_ms"] == pytest.approx(50, rel=0.1)
    assert rows["generate@64+32:token"]["median_ms"] == pytest.approx(10, rel=0.1)
    assert rows["generate@64+32:total"]["median_ms"] == pytest.approx(50 + 31 * 10, rel=0.1)
    assert rows["throughput@128x3"]["median_ms"] == pytest.approx(10, rel=0.1)
    size_bytes = (pair[0] / "fake.json").stat().st_size
    assert rows["decode@128"]["roofline"] == pytest.approx(size_bytes / 10e-3 / 30e9, rel=0.1)
    shown(result)


@pytest.mark.parametrize("batch", [(1, 4), (4, 1)])
def test_the_peak_is_that_of_the_hungriest_process(
    pair: tuple[Path, Path], batch: tuple[int, ...]
) -> None:
    @contextmanager
    def hungry(engine: str, path: Path, **options: Any) -> Iterator[EngineProcess]:
        with EngineProcess(engine, path, **options) as process:
            ask = process.request

            def answer(op: str, **arguments: Any) -> dict[str, Any]:
                taken = {"peak_bytes": 10**9 * options["batch"]}
                return ask(op, **arguments) | (taken if op == "memory" else {})

            vars(process)["request"] = answer
            yield process

    plan = BenchPlan(candidates=pair[:1], scenarios=("decode",), batch=batch, pairs=1)
    assert run_bench(plan, opener=hungry).subjects[0].peak_bytes == 4 * 10**9


def test_a_scenario_is_given_by_its_key(pair: tuple[Path, Path]) -> None:
    keys = ("decode@128", "decode@64x4", "prefill@100", "generate@64+32", "throughput@128x3")
    plan = BenchPlan(candidates=pair, scenarios=(*keys, "decode"), context=(128,))
    found = plan.described()
    assert tuple(one.key for one in found) == keys  # "decode" is the first of them again
    assert [one.session for one in found] == [
        *((128, 1, 1), (64, 4, 1)),
        *((128, 1, 1), (128, 1, 1)),  # caches that are there hold the prompt
        (128, 1, 3),
    ]


def test_more_rounds_are_taken_while_it_is_inconclusive(pair: tuple[Path, Path]) -> None:
    opened: list[str] = []
    plan = BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=1, looks=3)
    result = run_bench(plan, opener=recording(opened))  # 3 pairs are too few for any verdict
    assert result.pairs == 3
    assert opened == ["sparse", "dense", "dense", "sparse", "sparse", "dense"]
    clear = plan.model_copy(update={"scenarios": ("decode",), "pairs": 6})
    assert run_bench(clear).pairs == 6


@pytest.mark.usefixtures("in_process")
def test_a_noisy_machine_is_said_to_be_one(tmp_path: Path) -> None:
    one = fake(tmp_path / "one", decode_ms=10, prefill_ms=10, noise=0.5)
    noisy = run_bench(BenchPlan(candidates=(one,), pairs=4))
    medians = [
        [process_median(process) for process in noisy.subjects[0].latencies(key)]
        for key in noisy.statistics
    ]
    apart = max(max(each) / min(each) - 1 for each in medians)
    said = f"Noisy machine: processes of one deployment differ by up to {apart:.0%}."
    assert any(said in note for note in noisy.notes)


def test_an_interrupted_benchmark_goes_on_where_it_was(
    pair: tuple[Path, Path], cache: Path
) -> None:
    opened: list[str] = []
    plan = BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=3)

    def interrupt(line: str) -> None:
        if line.startswith("Round 2") and line.endswith("sparse"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt, recording(opened))
    assert opened == ["sparse", "dense", "dense"]
    (journal,) = (cache / "bench").iterdir()
    cut = '{"at": 1, "na'  # as a kill in the middle of a line leaves it
    journal.write_text(journal.read_text() + cut)

    def interrupt_later(line: str) -> None:
        if line.startswith("Round 3") and line.endswith("dense"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt_later, recording(opened))
    journal.write_bytes(journal.read_bytes() + cut.encode() + b"\xff\n")
    result = run_bench(plan, opener=recording(opened))
    assert opened == ["sparse", "dense", "dense", "sparse", "sparse", "dense"]
    assert [sample.round for sample in result.subjects[0].samples] == [0, 1, 2]
    assert not journal.exists()


def test_half_a_round_from_another_hour_is_measured_anew(
    pair: tuple[Path, Path], cache: Path
) -> None:
    plan = BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=1)

    def interrupt(line: str) -> None:
        if line.endswith("dense"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt)
    (journal,) = (cache / "bench").iterdir()
    line = json.loads(journal.read_text())
    journal.write_text(json.dumps(line | {"at": line["at"] - 3600}) + "\n")
    opened: list[str] = []
    run_bench(plan, opener=recording(opened))
    assert opened == ["sparse", "dense"]


def test_the_same_benchmark_is_not_run_twice_at_once(pair: tuple[Path, Path]) -> None:
    """The times of each would be of both, and the second would take the first's samples."""
    plan = BenchPlan(candidates=pair, scenarios=("decode",), pairs=1)

    def again(_: Result) -> None:
        with pytest.raises(BadInput, match="is running already"):
            run_bench(plan)

    run_bench(plan, keep=again)
    run_bench(plan)


def test_a_benchmark_that_died_with_its_machine_is_outlasted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT_S", 0.1)
    monkeypatch.setattr(leases, "STALE_S", 1.0)
    journal, told = Journal("a plan"), list[str]()
    elsewhere(journal.path.with_suffix(".lock"), 0)
    with journal.alone(told.append):
        assert told == ["Waiting for the same benchmark on node-7"]
    assert list((cache / "bench").iterdir()) == []


def test_what_failed_of_one_that_goes_on_is_kept(cache: Path) -> None:
    subject = result().subjects[0].model_copy(update={"samples": ()})
    sample = result().subjects[0].samples[0]
    Journal("plan").add(subject.name, {}, sample, {"decode@512x4": "No memory."})
    (found,) = Journal("plan").restore([subject]).values()
    assert (found.samples, found.failed) == ((sample,), {"decode@512x4": "No memory."})


def test_a_sample_after_a_failure_says_that_it_was_repaired() -> None:
    subject = result().subjects[0].model_copy(update={"samples": ()})
    sample = result().subjects[0].samples[0]
    journal = Journal("plan")
    journal.give_up(subject.name, "No memory.")
    assert journal.restore([subject])[subject.name].failure == "No memory."
    journal.add(subject.name, {}, sample, {})
    assert journal.restore([subject])[subject.name].failure is None


def test_what_has_failed_holds_up_no_round_of_another_day(
    pair: tuple[Path, Path], cache: Path
) -> None:
    bad = fake(pair[0].parent / "bad", fail={"op": "load", "how": "raise"})
    plan = BenchPlan(candidates=(bad, pair[0]), baselines=pair[1:], pairs=2)

    def interrupt(line: str) -> None:
        if line.startswith("Round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt)
    (journal,) = (cache / "bench").iterdir()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    old = (json.dumps(line | {"at": line["at"] - 3600}) for line in lines)
    journal.write_text("\n".join(old) + "\n")
    opened: list[str] = []
    found = run_bench(plan, opener=recording(opened))
    assert opened == ["dense", "sparse", "bad"]  # the second round alone, and it is tried again
    assert [one.startswith("bad: ") or "fake" in one for one in found.failures] == [True]


def test_what_failed_and_was_repaired_is_timed_after_all(pair: tuple[Path, Path]) -> None:
    bad = fake(
        pair[0].parent / "bad", decode_ms=10, prefill_ms=50, fail={"op": "load", "how": "raise"}
    )
    settings = (bad / "fake.json").read_text()
    plan = BenchPlan(candidates=(bad,), baselines=pair[1:], pairs=3)

    def interrupt(line: str) -> None:
        if line.startswith("Round 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt)
    repaired = json.loads(settings)
    del repaired["fail"]
    times = (bad / "fake.json").stat()
    text = json.dumps(repaired)
    (bad / "fake.json").write_text(text + " " * (len(settings) - len(text)))
    os.utime(bad / "fake.json", ns=(times.st_atime_ns, times.st_mtime_ns))  # not the model's fault
    opened: list[str] = []
    found = run_bench(plan, opener=recording(opened))
    assert opened == ["dense", "bad", "bad", "dense"]  # no round that is over is taken again
    assert not found.failures
    assert [one.pairs for one in found.comparisons] == [2] * len(found.comparisons)


def test_what_failed_in_a_later_look_is_tried_again_too(pair: tuple[Path, Path]) -> None:
    bad = fake(pair[0].parent / "bad", decode_ms=10, prefill_ms=50, fail={})
    whole = (bad / "fake.json").read_text()
    times = (bad / "fake.json").stat()

    def write(**changes: object) -> None:
        """Change what the engine does and not what the model is: its size and its age."""
        text = json.dumps(json.loads(whole) | changes)
        (bad / "fake.json").write_text(text + " " * (1000 - len(text)))
        os.utime(bad / "fake.json", ns=(times.st_atime_ns, times.st_mtime_ns))

    def interrupt(line: str) -> None:
        if line.startswith("Round 3"):
            write(fail={"op": "load", "how": "raise"})
        if line.startswith("Round 4"):
            raise KeyboardInterrupt

    def decided(result: Result) -> bool:
        return bool(result.failures)

    write()
    plan = BenchPlan(candidates=(bad,), baselines=pair[1:], pairs=2, looks=2)
    with pytest.raises(KeyboardInterrupt):
        run_bench(plan, interrupt, decided=decided)
    write()
    found = run_bench(plan, decided=decided)
    assert not found.failures
    assert len(found.subjects[0].samples) == 3  # of four rounds all but the one that it failed in


def test_a_discarded_half_round_does_not_come_back(pair: tuple[Path, Path], cache: Path) -> None:
    plan = BenchPlan(candidates=pair, pairs=2, scenarios=("decode",))

    def interrupted_at(start: str) -> None:
        def interrupt(line: str) -> None:
            if line.startswith(start):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_bench(plan, interrupt)

    interrupted_at("Round 1 of 2: dense")
    (journal,) = (cache / "bench").iterdir()
    line = json.loads(journal.read_text())
    journal.write_text(json.dumps(line | {"at": line["at"] - 3600}) + "\n")
    interrupted_at("Round 2")
    found = run_bench(plan)
    assert [[one.round for one in subject.samples] for subject in found.subjects] == [[0, 1]] * 2


def test_ctrl_c_ends_at_once_and_leaves_no_process(tmp_path: Path) -> None:
    bad = fake(tmp_path / "bad", fail={"op": "prompt", "how": "hang"})
    owl = subprocess.Popen(
        [sys.executable, "-m", "owl_deploy", "bench", str(bad)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    parent = psutil.Process(owl.pid)
    deadline = time.monotonic() + 120
    while not parent.children() and time.monotonic() < deadline:
        time.sleep(0.05)
    (worker,) = parent.children()
    time.sleep(0.3)
    owl.send_signal(signal.SIGINT)
    _, said = owl.communicate(timeout=60)  # the engine would hang for ten minutes
    assert owl.returncode == 130
    assert "the same command goes on" in said
    worker.wait(timeout=60)  # of its own accord, where Ctrl-C came while it was being started


def shown(result: Result) -> str:
    console = Console(width=80, record=True, quiet=False, highlight=False)
    with console.capture() as capture:
        show.show(result, console)
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80
    return text


def test_the_table_fits_and_says_what_counts(pair: tuple[Path, Path]) -> None:
    (pair[1] / "owl.json").write_text('{"perplexity": {"value": 13.66, "text": "t"}}')
    result = run_bench(BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=4))
    text = " ".join(shown(result).split())
    assert "13.7" in text
    assert "dense (same engine, best dense)" in text
    assert "4 rounds in fresh processes" in text
    assert result.machine.cpu in text


def test_the_command_writes_a_result_that_reads_back(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ["bench", str(pair[0]), "-b", str(pair[1]), "--pairs", "2", "-o", str(output)]
    answer = CliRunner().invoke(app, [*arguments, "--json"])
    assert answer.exit_code == 0, answer.output
    result = read_result(output)
    told = json.loads(answer.stdout)
    decision = told.pop("decision")
    assert told == result.model_dump(mode="json")
    assert decision["deploy"] is None
    assert "no quality is known" in decision["why"]
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, BadInput)
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_the_command_exits_4_when_an_engine_failed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bad = fake(tmp_path / "bad", fail={"op": "load", "how": "abort"})
    answer = CliRunner().invoke(app, ["bench", str(bad), "-b", str(pair[1]), "--pairs", "1"])
    assert answer.exit_code == 4
    assert "SIGABRT" in answer.stdout


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": "1"}'])
def test_a_damaged_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BadInput, match=r"not a benchmark's result|not valid JSON|no.* JSON object"):
        read_result(tmp_path)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("scenarios",), []),
        (("subjects",), []),
        (("comparisons", 0, "baseline"), "nobody"),
        (("statistics", "decode@512", "dense-int8"), {}),
        (("statistics", "decode@512", "nobody"), {}),
        (("subjects", 0, "samples", 0, "load_s"), "Infinity"),
        (("subjects", 0, "samples", 0, "latencies_ms", "decode@512"), []),
        (("subjects", 0, "samples", 0, "latencies_ms", "decode@512"), [0.0]),
        (("statistics", "decode@512", "dense-int8", "tokens_per_s"), "Infinity"),
        (("comparisons", 0, "ratio"), "Infinity"),
        (("subjects", 0, "perplexity"), -1),
    ],
    ids=str,
)
def test_a_result_that_contradicts_itself_is_refused(
    tmp_path: Path, place: tuple[Any, ...], value: object
) -> None:
    content = result().model_dump(mode="json")
    file = tmp_path / "result.json"
    file.write_text(json.dumps(content))
    assert read_result(file).pairs == 8
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    file.write_text(json.dumps(content).replace('"Infinity"', "Infinity"))
    with pytest.raises(BadInput, match="a damaged one"):
        read_result(file)


def test_the_wait_for_a_first_token_is_no_rate(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_bench(BenchPlan(candidates=pair[:1], scenarios=("generate@64+8",), pairs=1))
    row = {"tokens_per_s": 20.0}
    rates = {metric.answer: metric.rate(row) for metric in found.scenarios[0].metrics}
    assert rates == {"total_ms": 20.0, "first_ms": None, "token_ms": 20.0}
    show.show(found)
    lines = capsys.readouterr().out.splitlines()
    told = [line for line in lines if " unknown " in line]
    assert [len(line.split()) for line in told] == [7, 6, 7]


def test_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_result(tmp_path)


def limited(folder: Path, tokens: int) -> Path:
    """A fake deployment of a model that takes so many tokens."""
    fake(folder, decode_ms=10, prefill_ms=50)
    (folder / "owl.json").write_text(json.dumps({"target": "fake", "max_context": tokens}))
    return folder


@pytest.mark.parametrize(
    ("settings", "target", "message"),
    [
        ({}, "onnxruntime", r"made is made for the target 'onnxruntime', which fake cannot open"),
        ({"context": 257}, "fake", "--context 257 is more than the 256 tokens"),
        ({"scenarios": ("answers",), "context": 64}, "fake", "The longest prompt has"),
        ({}, "fake", None),
    ],
)
def test_a_plan_is_looked_at_before_its_baselines_are_made(
    pair: tuple[Path, Path],
    tmp_path: Path,
    settings: dict[str, Any],
    target: str,
    message: str | None,
) -> None:
    small, made = limited(tmp_path / "small", 256), tmp_path / "made"
    tiny.write_tokenizer(small)
    plan = BenchPlan(
        candidates=(small,), baselines=(pair[1], made), engines=("fake",), pairs=2, **settings
    )
    with pytest.raises(BadInput, match=message) if message else contextlib.nullcontext():
        measure.check_ahead(plan, {made: target})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": (128, 257)}, "--context 257 is more than the 256 tokens that .*small takes"),
        ({"context": 257, "scenarios": ("answers",)}, "--context 257 is more than the 256 tokens"),
        ({"scenarios": ("prefill@257",)}, "--scenario prefill@257 is more than the 256 tokens"),
        ({"context": 512, "scenarios": ("throughput",)}, "Give --context 256 or less"),
        ({"prompt": 300}, "--prompt 300 is more than the 256 tokens"),
        ({"prompt": 200, "new_tokens": 57, "scenarios": ("generate",)}, "--prompt 200 and 57 new"),
        ({"prompt": 300, "scenarios": ("generate",)}, "Give --prompt 254 or less"),
        ({"new_tokens": 256, "scenarios": ("generate",)}, "--new-tokens 256 leaves no room"),
    ],
)
def test_what_a_model_does_not_take_is_refused_before_an_engine_starts(
    pair: tuple[Path, Path], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    opened: list[str] = []
    small = limited(tmp_path / "small", 256)
    plan = BenchPlan(candidates=pair[:1], baselines=(small,), pairs=1, **settings)
    with pytest.raises(BadInput, match=message) as caught:
        run_bench(plan, opener=recording(opened))
    assert caught.value.exit_code == 2
    assert opened == []


@pytest.mark.parametrize(
    ("tokens", "settings", "keys", "notes"),
    [
        (512, {}, ["decode@512", "prefill@128"], []),
        (256, {}, ["decode@256", "prefill@128"], ["--context is 256 instead of 512"]),
        (256, {"prompt": 8}, ["decode@256", "prefill@8"], ["--context is 256 instead of 512"]),
        (256, {"context": 200}, ["decode@200", "prefill@128"], []),
        (256, {"scenarios": ("prefill",)}, ["prefill@128"], []),
        (256, {"scenarios": ("throughput",)}, ["throughput@256x2"], ["--context is 256"]),
        (256, {"scenarios": ("generate",)}, ["generate@128+64"], []),
        (256, {"scenarios": ("generate@128+64",)}, ["generate@128+64"], []),
        (100, {"scenarios": ("generate",)}, ["generate@50+50"], ["--prompt is 50 instead of 128"]),
        (
            256,
            {"scenarios": ("generate",), "prompt": 250},
            ["generate@250+6"],
            ["--new-tokens is 6 instead of 64"],
        ),
    ],
)
def test_what_nobody_asked_for_gives_way_to_the_model(
    tmp_path: Path, tokens: int, settings: dict[str, Any], keys: list[str], notes: list[str]
) -> None:
    small = limited(tmp_path / "small", tokens)
    result = run_bench(BenchPlan(candidates=(small,), pairs=1, **settings))
    assert [scenario.key for scenario in result.scenarios] == keys
    assert all(scenario.context <= tokens for scenario in result.scenarios)
    for note in notes:
        assert any(note in said and f"takes {tokens} tokens" in said for said in result.notes)
    assert bool(notes) == any("instead of" in said for said in result.notes)


def test_what_was_taken_is_kept_until_the_result_is_written(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("OWL_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    plan = BenchPlan(candidates=pair[:1], baselines=pair[1:], pairs=2)

    def full(_: Result) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="full"):
        run_bench(plan, keep=full)
    (tmp_path / "bench.log").write_text("what the shell writes beside it changes nothing")
    opened: list[str] = []
    assert run_bench(plan, opener=recording(opened)).pairs == 2
    assert opened == []
    assert list((cache / "bench").iterdir()) == []


def test_other_prompts_are_another_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    plan = BenchPlan(candidates=(tmp_path,), scenarios=("answers",), prompts=file)
    found = []
    for prompt in ("one", "two"):
        file.write_text(json.dumps({"prompt": prompt}))
        found.append(measure._identities(plan, []))
    assert found[0] != found[1]


@pytest.mark.parametrize("option", ["--strict", "--summary=s.md"])
def test_what_is_of_a_check_is_refused_without(pair: tuple[Path, Path], option: str) -> None:
    answer = CliRunner().invoke(app, ["bench", str(pair[0]), option])
    assert isinstance(answer.exception, BadInput)
    assert "for the verdicts of --check" in str(answer.exception)


def test_what_was_only_rounded_is_not_sparse() -> None:
    rounded = BlockShares(name="model.layers.0", achieved=0.13, sparsity=0.0)
    pruned = rounded.model_copy(update={"sparsity": 0.13})
    assert entries._pruned([rounded, rounded]) == ()
    assert entries._pruned([rounded.model_copy(update={"achieved": 0.36})]) == ()
    before = rounded.model_copy(update={"achieved": 0.5})  # it was pruned, and then rounded
    assert [one.sparsity for one in entries._pruned([before])] == [0.5]
    assert [one.sparsity for one in entries._pruned([rounded, pruned])] == [0.13, 0.13]


@pytest.mark.parametrize("verb", [bench, run_gate])
@pytest.mark.parametrize("place", ["candidates", "baselines", "draft"])
def test_a_result_does_not_replace_what_is_measured(
    pair: tuple[Path, Path], verb: Callable[..., object], place: str
) -> None:
    (pair[1] / "owl.json").write_text('{"kind": "deployment"}')
    measured = str(pair[1]) if place == "draft" else pair[1:]
    plan = BenchPlan.model_validate({"candidates": pair[:1], place: measured})
    if place == "draft":
        plan = plan.model_copy(update={"scenarios": ("answers",)})
    with pytest.raises(BadInput, match="an input itself"):
        verb(plan, output=pair[1], force=True)
    assert (pair[1] / "fake.json").is_file()
