import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from owl_deploy.bench import BenchPlan, Result, read_result, run_bench, table
from owl_deploy.bench.measure import Opener
from owl_deploy.cli import app
from owl_deploy.engines import EngineProcess, environment
from owl_deploy.errors import BadInput, EnvironmentFailed


def fake(folder: Path, **behaviour: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "fake.json").write_text(json.dumps(behaviour))
    return folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    sparse = fake(tmp_path / "sparse", decode_ms=10, prefill_ms=50, noise=0.01)
    dense = fake(tmp_path / "dense", decode_ms=15, prefill_ms=50, noise=0.01)
    return sparse, dense


def recording(opened: list[str]) -> Opener:
    @contextmanager
    def open_and_note(engine: str, path: Path, **options: Any) -> Iterator[EngineProcess]:
        opened.append(path.name)
        with EngineProcess(engine, path, **options) as process:
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
    assert decode.low < 1.5 < decode.high or decode.ratio == pytest.approx(1.5, rel=0.05)
    assert (decode.candidate, decode.baseline) == ("sparse", "dense")
    assert prefill.verdict in ("no speed-up", "inconclusive", "faster", "slower")
    assert abs(prefill.ratio - 1) < 0.05
    assert result.statistics["decode@512"]["sparse"]["tokens_per_s"] == pytest.approx(100, rel=0.05)


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
    result = run_bench(plan, opener=recording(opened))
    assert opened.count("bad") == 1
    assert len(result.subjects[1].samples) == 3
    assert result.comparisons == ()
    assert "'fake'" in result.failures[0]
    shown(result)


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
        ({"engines": ("fakee",)}, "Did you mean 'fake'"),
        ({"engines": ("onnxruntime",)}, "cannot open"),
        ({"context": 20}, "--context 20 is too small"),
        ({"pairs": 0}, "--pairs 0"),
        ({"threads": -1}, "--threads -1"),
        ({"prompt": 600}, "does not fit a context of 512"),
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


def shown(result: Result) -> str:
    console = Console(width=80, record=True, quiet=False, highlight=False)
    with console.capture() as capture:
        table.show(result, console)
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
    assert json.loads(answer.stdout) == result.model_dump(mode="json")
    refused = CliRunner().invoke(app, arguments)
    assert isinstance(refused.exception, BadInput)
    assert CliRunner().invoke(app, [*arguments, "--force"]).exit_code == 0


def test_the_command_exits_4_when_an_engine_failed(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    bad = fake(tmp_path / "bad", fail={"op": "load", "how": "abort"})
    answer = CliRunner().invoke(app, ["bench", str(bad), "-b", str(pair[1]), "--pairs", "1"])
    assert answer.exit_code == 4
    assert "SIGABRT" in answer.stdout


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema_version": 99}'])
def test_a_damaged_result_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(BadInput, match="not a benchmark's result"):
        read_result(tmp_path)


def test_no_result_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read"):
        read_result(tmp_path)
