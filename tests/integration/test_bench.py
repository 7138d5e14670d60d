"""The real engines on a tiny model: what they compute, and that benching them changes nothing."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from typer.testing import CliRunner

from owl_deploy import inference
from owl_deploy.bench import BenchPlan, baseline, gate, read_result, run_bench
from owl_deploy.cli import app
from owl_deploy.errors import BadInput
from owl_deploy.export.targets import export
from owl_deploy.inference import EngineProcess
from owl_deploy.utils.artefact import MANIFEST, sha256
from owl_deploy.utils.record import Unfinished

TOKENS = np.random.default_rng(0).integers(0, 320, 150).tolist()
ENGINES = [("onnxruntime", "onnxruntime"), ("onnxruntime", "deepsparse"), ("deepsparse",) * 2]


@pytest.fixture(scope="session")
def deployments(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deployments")
    for target in ("onnxruntime", "deepsparse"):
        export(llama, folder / target, target=target)
    return {target: folder / target for target in ("onnxruntime", "deepsparse")}


@pytest.fixture(scope="session")
def logits(llama: Path) -> np.ndarray:
    """PyTorch's logits of TOKENS [150, 320]."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].numpy()


def need(engine: str) -> None:
    if not inference.is_installed(engine):
        pytest.skip(f"needs: owl engines install {engine}")


@pytest.mark.parametrize(("engine", "target"), ENGINES)
def test_an_engine_computes_what_pytorch_does(
    deployments: dict[str, Path],
    logits: np.ndarray,
    tmp_path: Path,
    engine: str,
    target: str,
) -> None:
    need(engine)
    # 150 tokens: two chunks of DeepSparse's prompt engine and 22 single tokens.
    with EngineProcess(engine, deployments[target], context=200, all_logits=True) as process:
        asked = {"prompt_logits_file": str(tmp_path / "p.npy")}
        greedy = process.request("greedy", tokens=TOKENS, count=8, **asked)
        scored = [
            process.request("score", tokens=part)["loss"] for part in (TOKENS[:75], TOKENS[75:])
        ]
    assert np.abs(np.load(tmp_path / "p.npy") - logits).max() < 1e-4 * np.abs(logits).max()
    assert greedy["tokens"][0] == logits[-1].argmax()
    first = torch.log_softmax(torch.tensor(logits[:74], dtype=torch.float64), dim=1)
    wanted = -first[range(74), TOKENS[1:75]].mean().item()
    assert scored[0] == pytest.approx(wanted, rel=1e-5)
    assert math.isfinite(scored[1])


@pytest.mark.parametrize(("engine", "target"), ENGINES)
def test_generating_goes_the_same_way_with_and_without_all_logits(
    deployments: dict[str, Path], tmp_path: Path, engine: str, target: str
) -> None:
    need(engine)
    said = []
    for all_logits in (False, True):
        file = tmp_path / f"{all_logits}.npy"
        with EngineProcess(
            engine, deployments[target], context=200, all_logits=all_logits
        ) as process:
            answer = process.request("greedy", tokens=TOKENS, count=12, logits_file=str(file))
            said.append((answer["tokens"], np.load(file)))
    assert said[0][0] == said[1][0]
    assert np.abs(said[0][1] - said[1][1]).max() < 1e-3


def test_bench_in_both_real_engines(deployments: dict[str, Path], tmp_path: Path) -> None:
    need("deepsparse")
    before = {path: sha256(path) for path in deployments["deepsparse"].iterdir()}
    answer = CliRunner().invoke(
        app,
        [
            *("bench", str(deployments["deepsparse"])),
            *("--baseline", str(deployments["onnxruntime"])),
            *("--engine", "deepsparse", "--engine", "onnxruntime"),
            *("--context", "160", "--prompt", "128", "--pairs", "2", "-o", str(tmp_path / "r")),
        ],
    )
    assert answer.exit_code == 0, answer.output
    assert "never production" in " ".join(answer.stdout.split())
    result = read_result(tmp_path / "r")
    assert [(s.engine, s.role, len(s.samples)) for s in result.subjects] == [
        ("deepsparse", "candidate", 2),
        ("onnxruntime", "candidate", 2),
        ("onnxruntime", "baseline", 2),
    ]
    assert {path: sha256(path) for path in deployments["deepsparse"].iterdir()} == before
    for rows in result.statistics.values():
        assert len(rows) == 3
        assert all(0 < row["median_ms"] < 10_000 for row in rows.values())
    assert all(subject.peak_bytes > 10e6 for subject in result.subjects)
    assert all(subject.load_s > 0 for subject in result.subjects)


@pytest.mark.parametrize("target", ["onnxruntime", "deepsparse"])
def test_every_scenario_runs_in_a_real_engine(deployments: dict[str, Path], target: str) -> None:
    need(target)
    plan = BenchPlan(
        candidates=(deployments[target],),
        scenarios=("decode", "generate", "throughput"),
        context=128,
        prompt=64,
        batch=(1, 2),
        streams=2,
        new_tokens=16,
        pairs=1,
    )
    result = run_bench(plan)
    # One run in some six: its own assertion, at any context and prompt, where streams are several.
    aborts = [why for why in result.failures if "kv_cache.hpp:100" in why and "throughput" in why]
    if target == "deepsparse" and aborts and aborts == result.failures:
        pytest.xfail("DeepSparse's KV cache aborted under two streams")
    assert result.failures == []
    assert set(result.statistics) == {
        *("decode@128", "decode@128x2", "throughput@128x2"),
        *("generate@64+16:total", "generate@64+16:first", "generate@64+16:token"),
    }


def test_a_gate_sees_filled_zeros_and_other_logits(
    deployments: dict[str, Path], tmp_path: Path
) -> None:
    plan = BenchPlan(
        candidates=(deployments["deepsparse"],),
        baselines=(deployments["onnxruntime"],),
        engines=("onnxruntime",),
    )
    before = baseline.still_side(plan)
    assert before.counters["nodes"]["MatMul"] > 10
    changed = shutil.copytree(deployments["deepsparse"], tmp_path / "changed")
    (changed / MANIFEST).unlink()  # it would tell of the change
    model = onnx.load(changed / "model.onnx")
    weight = next(t for t in model.graph.initializer if list(t.dims) == [64, 112])
    values = numpy_helper.to_array(weight).copy()
    zeros = int((values == 0).sum())
    values[values == 0] = 0.05
    assert zeros > 100
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, changed / "model.onnx")
    after = baseline.still_side(plan.model_copy(update={"candidates": (changed,)}), before)
    margins = gate.Margins()
    # Without a manifest nothing says how the weights are held.
    assert [one.metric for one in gate.check_setting(before, after)] == ["precision"]
    (logits,) = gate.check_probe(before, after, margins)
    assert logits.word == "REGRESSED"
    found = {v.metric: v.word for v in gate.check_counters(before, after, margins)}
    assert found[f"nonzeros: {weight.name}"] == "REGRESSED"
    assert gate.check_probe(before, baseline.still_side(plan, before), margins)[0].word == "OK"


def test_a_graph_that_an_engine_refuses_is_its_failure_alone(
    deployments: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in deployments["onnxruntime"].iterdir():
        if not path.name.endswith(".data") and path.name != MANIFEST:
            (broken / path.name).symlink_to(path)
    (broken / "model.onnx.data").touch()  # its weights are cut off
    plan = BenchPlan(
        candidates=(broken,),
        baselines=(deployments["onnxruntime"],),
        context=64,
        prompt=16,
        pairs=1,
    )
    result = run_bench(plan)
    assert "failed in 'load'" in result.failures[0]
    assert len(result.subjects[1].samples) == 1


def test_a_sweep_of_a_real_model_is_whole_and_never_repeats(
    llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWL_CACHE", str(tmp_path / "cache"))
    output = tmp_path / "sweep"
    plan = tmp_path / "sweep.yaml"
    plan.write_text("scenarios: [decode]\ncontext: [64]\npairs: 1\nmethods: [wanda, magnitude]\n")
    line = [
        *("sweep", str(llama), "-o", str(output), "--plan", str(plan), "--json"),
        *("-c", str(text_file), "-p", str(text_file), "-s", "0.5", "-t", "onnxruntime"),
        *("--samples", "2", "--sequence-length", "64", "--window", "64", "--windows", "1"),
    ]
    planned = json.loads(CliRunner().invoke(app, [*line, "--dry-run"]).stdout)
    assert set(planned["states"]) == {"to do"}
    wrong = CliRunner().invoke(app, [*line, "--ray", "local", "--needs", "prune", "--dry-run"])
    assert isinstance(wrong.exception, BadInput), wrong.output
    assert not output.exists()
    first = CliRunner().invoke(app, line)
    assert first.exit_code == 0, first.output
    said = [one["title"] for one in planned["tasks"]]
    assert [text for text in first.stderr.splitlines() if text in said] == said
    rows = json.loads(first.stdout)["trade_off"]
    assert {row["deployment"] for row in rows} == {
        *("wanda-fisher-50-onnxruntime-fp32", "magnitude-fisher-50-onnxruntime-fp32"),
        *("dense-onnxruntime-fp32", "dense-onnxruntime-int8", "dense-onnxruntime-int4"),
    }
    assert any(row["pareto"] for row in rows)
    before = {path: path.stat().st_mtime_ns for path in output.glob("*/*/*")}
    again = CliRunner().invoke(app, line)
    assert json.loads(again.stdout)["trade_off"] == rows
    assert again.stderr == ""  # nothing pruned, exported or timed
    assert {path: path.stat().st_mtime_ns for path in output.glob("*/*/*")} == before
    other = [word if word != "0.5" else "0.6" for word in line]
    states = json.loads(CliRunner().invoke(app, [*other, "--dry-run"]).stdout)["states"]
    assert [states.count(one) for one in ("done", "to do")] == [6, 7]  # the dense ones are there

    # A row that fails does not stop the others, and the report has it.
    strange = output / "checkpoints" / "magnitude-fisher-60"
    strange.mkdir()
    (strange / "mine").touch()
    last = CliRunner().invoke(app, other)
    assert isinstance(last.exception, Unfinished)
    assert last.exception.exit_code == 2
    assert "1 of 13 tasks failed, and 2 that need them were skipped" in str(last.exception)
    told = json.loads(last.stdout)
    assert {row["deployment"] for row in told["trade_off"]} == {
        *("wanda-fisher-60-onnxruntime-fp32", "dense-onnxruntime-fp32"),
        *("dense-onnxruntime-int8", "dense-onnxruntime-int4"),
    }
    assert [one["state"] for one in told["left"]] == ["failed", "skipped", "skipped"]
    page = (output / "report.html").read_text()
    assert "What is missing" in page
    assert f"{strange} was not written by owl" in page
    assert [path.name for path in strange.iterdir()] == ["mine"]


@pytest.mark.parametrize("target", ["onnxruntime", "deepsparse"])
def test_a_model_is_benched_up_to_its_last_token(deployments: dict[str, Path], target: str) -> None:
    """Which is chosen by onnxruntime-genai only where there is room for one more."""
    plan = BenchPlan(
        candidates=(deployments[target],),
        engines=("onnxruntime",),
        scenarios=("decode", "prefill", "generate", "throughput"),
        context=512,
        prompt=(8, 496),
        new_tokens=16,
        pairs=1,
    )
    result = run_bench(plan)
    assert result.failures == []
    assert "decode@512" in result.statistics
    with pytest.raises(BadInput, match="more than the 512 tokens"):
        run_bench(plan.model_copy(update={"context": (513,)}))
