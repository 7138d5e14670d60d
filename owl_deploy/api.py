"""The public Python API: what the verbs of `owl` do, as functions.

    from owl_deploy.api import Calibration, PruneSettings, export, prune

It is a module of its own, and not `owl_deploy` itself, because `prune`, `export`, `bench`,
`evaluate` and `finetune` are packages in there (`generate` and `verify` are modules): whatever
imports one of them makes it what that name means in `owl_deploy`, so a function of the same name
would be there or not by what was imported before.

What stands here is public, and keeps its meaning as the version number promises; all else in the
package may change. Importing this module loads no torch: a name is looked up when it is used.

The functions do what the command line does: they show their progress on stderr, write an output
whole or not at all, and raise an `OwlError` (`BadInput`, `ParityFailed`, `EngineFailed`, ...) for
what a user can meet; its sentences spell options as the command line does. Settings that are given
a value of a wrong type, or an unknown one, raise pydantic's `ValidationError`; `prune_settings`
makes a `BadInput` of it. A folder may be a `str` or a `Path`.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from owl_deploy.errors import not_installed

if TYPE_CHECKING:
    from owl_deploy.bench.decision import decide
    from owl_deploy.bench.plan import BenchPlan
    from owl_deploy.bench.result import Comparison, Result, read_result
    from owl_deploy.bench.run import Outcome, bench, run_gate
    from owl_deploy.compression.recipe import merged as prune_settings
    from owl_deploy.compression.run import prune, quantize
    from owl_deploy.compression.settings import PruneSettings
    from owl_deploy.data.calibration import Calibration
    from owl_deploy.errors import (
        BadInput,
        EngineFailed,
        EnvironmentFailed,
        OwlError,
    )
    from owl_deploy.evaluate.perplexity import Perplexity
    from owl_deploy.evaluate.run import Evaluation, evaluate
    from owl_deploy.evaluate.settings import EvaluationSettings
    from owl_deploy.evaluate.zero_shot import TaskResult
    from owl_deploy.export.parity import ParityFailed
    from owl_deploy.export.targets import TARGETS, export
    from owl_deploy.finetune.run import finetune
    from owl_deploy.finetune.settings import FinetuneSettings
    from owl_deploy.inference.generate import generate
    from owl_deploy.inference.rows import Speed
    from owl_deploy.inference.sampling import Sampling
    from owl_deploy.inference.verify import Verified, verify
    from owl_deploy.models.manifest import AdapterManifest, CheckpointManifest, DeploymentManifest
    from owl_deploy.utils.hardware import Hardware

__all__ = [
    "TARGETS",
    "AdapterManifest",
    "BadInput",
    "BenchPlan",
    "Calibration",
    "CheckpointManifest",
    "Comparison",
    "DeploymentManifest",
    "EngineFailed",
    "EnvironmentFailed",
    "Evaluation",
    "EvaluationSettings",
    "FinetuneSettings",
    "Hardware",
    "Outcome",
    "OwlError",
    "ParityFailed",
    "Perplexity",
    "PruneSettings",
    "Result",
    "Sampling",
    "Speed",
    "TaskResult",
    "Verified",
    "bench",
    "decide",
    "evaluate",
    "export",
    "finetune",
    "generate",
    "prune",
    "prune_settings",
    "quantize",
    "read_result",
    "run_gate",
    "verify",
]

# Where each name is; the same as above says to type checkers.
WHERE = {
    "AdapterManifest": "owl_deploy.models.manifest:AdapterManifest",
    "BadInput": "owl_deploy.errors:BadInput",
    "BenchPlan": "owl_deploy.bench.plan:BenchPlan",
    "Calibration": "owl_deploy.data.calibration:Calibration",
    "CheckpointManifest": "owl_deploy.models.manifest:CheckpointManifest",
    "Comparison": "owl_deploy.bench.result:Comparison",
    "DeploymentManifest": "owl_deploy.models.manifest:DeploymentManifest",
    "EngineFailed": "owl_deploy.errors:EngineFailed",
    "EnvironmentFailed": "owl_deploy.errors:EnvironmentFailed",
    "Evaluation": "owl_deploy.evaluate.run:Evaluation",
    "EvaluationSettings": "owl_deploy.evaluate.settings:EvaluationSettings",
    "FinetuneSettings": "owl_deploy.finetune.settings:FinetuneSettings",
    "Hardware": "owl_deploy.utils.hardware:Hardware",
    "Outcome": "owl_deploy.bench.run:Outcome",
    "OwlError": "owl_deploy.errors:OwlError",
    "ParityFailed": "owl_deploy.export.parity:ParityFailed",
    "Perplexity": "owl_deploy.evaluate.perplexity:Perplexity",
    "PruneSettings": "owl_deploy.compression.settings:PruneSettings",
    "Result": "owl_deploy.bench.result:Result",
    "Sampling": "owl_deploy.inference.sampling:Sampling",
    "Speed": "owl_deploy.inference.rows:Speed",
    "TARGETS": "owl_deploy.export.targets:TARGETS",
    "TaskResult": "owl_deploy.evaluate.zero_shot:TaskResult",
    "Verified": "owl_deploy.inference.verify:Verified",
    "bench": "owl_deploy.bench.run:bench",
    "decide": "owl_deploy.bench.decision:decide",
    "evaluate": "owl_deploy.evaluate.run:evaluate",
    "export": "owl_deploy.export.targets:export",
    "finetune": "owl_deploy.finetune.run:finetune",
    "generate": "owl_deploy.inference.generate:generate",
    "prune": "owl_deploy.compression.run:prune",
    "prune_settings": "owl_deploy.compression.recipe:merged",
    "quantize": "owl_deploy.compression.run:quantize",
    "read_result": "owl_deploy.bench.result:read_result",
    "run_gate": "owl_deploy.bench.run:run_gate",
    "verify": "owl_deploy.inference.verify:verify",
}


if not TYPE_CHECKING:  # a checker that saw this would take any name for one that is there

    def __getattr__(name: str) -> Any:  # noqa: ANN401
        """What `name` stands for, imported now."""
        if name not in WHERE:
            message = f"module {__name__!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=sys.modules[__name__])
        module, attribute = WHERE[name].split(":")
        try:
            return getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            raise not_installed(error) or error from error


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
