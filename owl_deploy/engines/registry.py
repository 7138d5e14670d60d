"""The inference engines, one row each: what drives them, what they open, what is allowed."""

from dataclasses import dataclass
from pathlib import Path

from owl_deploy.errors import unknown_name

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """One inference engine.

    `package` is the distribution whose version counts; `lock` the lock file of the environment it
    needs (None: the running Python has it); `targets` the deployments that it opens.
    """

    name: str
    driver: Path
    package: str
    targets: tuple[str, ...]
    licence: str
    lock: Path | None = None
    pythons: tuple[str, ...] = ()


_ENGINES = (
    Engine(
        name="deepsparse",
        driver=_HERE / "drivers" / "deepsparse.py",
        package="deepsparse",
        targets=("deepsparse",),
        licence="Neural Magic Community License: evaluation in development and test only, "
        "never production; no reverse engineering. Retired by its makers in June 2025.",
        lock=_HERE / "locks" / "deepsparse.txt",
        pythons=("3.11", "3.10", "3.9", "3.8"),
    ),
    Engine(
        name="onnxruntime",
        driver=_HERE / "drivers" / "onnxruntime.py",
        package="onnxruntime-genai",
        targets=("onnxruntime", "deepsparse"),
        licence="MIT: any use.",
    ),
    Engine(
        name="owl",
        driver=_HERE / "drivers" / "onnxruntime.py",
        package="onnxruntime-genai",
        targets=("owl",),
        licence="Apache-2.0 (our operators) in onnxruntime-genai (MIT): any use.",
    ),
    Engine(
        name="fake",
        driver=_HERE / "drivers" / "fake.py",
        package="owl-deploy",
        targets=("fake",),
        licence="Apache-2.0. Runs nothing: its latencies are written in the deployment, for tests.",
    ),
)
ENGINES = {engine.name: engine for engine in _ENGINES}
TARGETS = tuple(dict.fromkeys(target for engine in _ENGINES for target in engine.targets))


def get_engine(name: str) -> Engine:
    """The engine called `name`; raises `BadInput` with the nearest name for an unknown one."""
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    return ENGINES[name]


def engine_for(target: str) -> Engine:
    """The engine that a deployment's `target` is made for (the one of the same name)."""
    if target not in ENGINES:
        raise unknown_name("deployment target", target, TARGETS)
    return ENGINES[target]
