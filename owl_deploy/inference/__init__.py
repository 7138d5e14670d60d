"""Inference engines, each in a process, and where needed an environment, of its own.

The layer under export's parity check, evaluation and benchmarks.
"""

from owl_deploy.inference.deployment import Deployment, open_deployment
from owl_deploy.inference.environment import (
    install,
    installed_version,
    is_installed,
    list_engines,
    python_of,
    remove,
    require,
    served_by,
    software,
)
from owl_deploy.inference.process import EngineProcess, default_threads, threads_for
from owl_deploy.inference.registry import (
    ENGINES,
    Engine,
    Ink,
    engine_for,
    get_engine,
    public_engine,
)
from owl_deploy.inference.server import ServerProcess

__all__ = [
    "ENGINES",
    "Deployment",
    "Engine",
    "EngineProcess",
    "Ink",
    "ServerProcess",
    "default_threads",
    "engine_for",
    "get_engine",
    "install",
    "installed_version",
    "is_installed",
    "list_engines",
    "open_deployment",
    "public_engine",
    "python_of",
    "remove",
    "require",
    "served_by",
    "software",
    "threads_for",
]
