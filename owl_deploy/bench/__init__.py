"""Honest CPU benchmarks of deployments: how much faster, against what."""

from owl_deploy.bench.measure import run_bench
from owl_deploy.bench.plan import BenchPlan
from owl_deploy.bench.result import Result, read_result, write_result

__all__ = ["BenchPlan", "Result", "read_result", "run_bench", "write_result"]
