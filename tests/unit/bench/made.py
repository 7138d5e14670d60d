"""A made-up result with everything in it, for what shows results."""

import math

import numpy as np

from owl_deploy.bench.machine import Machine
from owl_deploy.bench.measure import conclude
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import Result, Score, Subject

ROWS = (
    ("owl-70-owl-int8", "candidate", "owl", "int8", 0.7, 28.1, 4.0, 120),
    ("owl-70-deepsparse", "candidate", "deepsparse", "fp32", 0.7, 28.0, 15.0, 540),
    ("owl-50-deepsparse", "candidate", "deepsparse", "fp32", 0.5, 16.2, 18.0, 540),
    ("dense-deepsparse", "baseline", "deepsparse", "fp32", 0.0, 13.7, 21.0, 540),
    ("dense-fp32", "baseline", "onnxruntime", "fp32", 0.0, 13.7, 41.0, 540),
    ("dense-int8", "baseline", "onnxruntime", "int8", 0.0, 13.8, 18.6, 267),
    ("dense-int4", "baseline", "onnxruntime", "int4", 0.0, 17.5, 14.2, 86),
)


def result(pairs: int = 8, failure: str | None = None) -> Result:
    """Seven deployments in three engines; the last failed if `failure` says why."""
    plan = BenchPlan(candidates=("x",), scenarios=("decode", "prefill"), pairs=pairs)
    generator = np.random.default_rng(0)
    subjects = []
    for name, role, engine, precision, zeros, loss, ms, size in ROWS:
        samples = [
            {
                "round": index,
                "load_s": 2.0,
                "peak_bytes": size * 2_000_000,
                "latencies_ms": {
                    "decode@512": (ms * generator.normal(1, 0.02, 32)).tolist(),
                    "prefill@128": (6 * ms * generator.normal(1, 0.02, 5)).tolist(),
                },
            }
            for index in range(pairs)
        ]
        blocks = [
            {
                "name": f"model.layers.{i}",
                "sparsity": zeros + 0.005 * (i - 15),
                "outlier_ratio": 3 - i / 12,
            }
            for i in range(30)
        ]
        subjects.append(
            Subject.model_validate(
                {
                    "name": name,
                    "path": name,
                    "role": role,
                    "target": engine,
                    "engine": engine,
                    "precision": precision,
                    "zeros": zeros,
                    "perplexity": loss,
                    "size_bytes": size * 1_000_000,
                    "blocks": blocks if role == "candidate" else [],
                    "about": {"runtime": f"{engine} 1.2", "through": "internal KV cache <512>"},
                    "samples": samples,
                }
            )
        )
    if failure:
        subjects[-1] = subjects[-1].model_copy(update={"samples": (), "failure": failure})
    here = Machine(
        cpu="Some CPU <9000>",
        isa=("avx2", "avx512f", "avx512_vnni"),
        physical_cores=2,
        logical_cores=4,
        memory_bytes=24 << 30,
        governor=None,
        system="Linux 6",
        busy_cores=0.0,
    )
    return conclude(plan, plan.described(), here, 2, 30.0, tuple(subjects))


# Of ten problems, those that each deployment solves: the dense ones first.
SOLVED = {
    "dense-deepsparse": "11111111..",
    "dense-fp32": "11111111..",
    "dense-int8": "1111111...",
    "dense-int4": "11111.....",
    "owl-50-deepsparse": "111111....",
    "owl-70-deepsparse": "1.........",
    "owl-70-owl-int8": "1.........",
}


def with_code(problems: int = 10) -> Result:
    """The result, with HumanEval of each deployment over `problems`, by repeating `SOLVED`."""
    made = result()
    subjects = []
    for subject in made.subjects:
        marks = SOLVED[subject.name] * (problems // 10)
        share = marks.count("1") / problems
        score = Score(
            metric="pass@1",
            value=share,
            stderr=math.sqrt(share * (1 - share) / (problems - 1)),
            documents=problems,
            passed={f"HumanEval/{number}": mark == "1" for number, mark in enumerate(marks)},
        )
        subjects.append(subject.model_copy(update={"scores": {"humaneval": score}}))
    return made.model_copy(update={"subjects": tuple(subjects)})
