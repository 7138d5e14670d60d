"""The baselines a user really has: one dense checkpoint, exported for every engine."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

from owl_deploy.artefact import is_artefact
from owl_deploy.cache import cache_dir
from owl_deploy.engines import engine_for, open_deployment
from owl_deploy.errors import BadInput

# (checkpoint, destination, target, precision): export's function, given by the caller, because the
# parts of the package that are verbs do not know each other.
Export = Callable[[Path, Path, str, str], None]
# What people deploy when they do not prune.
ROADS = (
    ("onnxruntime", "fp32"),
    ("onnxruntime", "int8"),
    ("onnxruntime", "int4"),
)


def dense_baselines(
    checkpoint: Path,
    targets: Iterable[tuple[str, str]],
    export: Export,
    folder: Path | None = None,
) -> tuple[Path, ...]:
    """Deployments of a dense checkpoint, made in the cache (or `folder`) unless they are there.

    `targets`, with their precisions, are those of the deployments to compare with.
    """
    if not (checkpoint / "config.json").is_file():
        raise BadInput(f"{checkpoint} is no checkpoint: it has no config.json.")
    folder = folder or cache_dir("dense", _identity(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    # What runs in an engine that skips zeros is compared with dense in the same.
    own = sorted(road for road in set(targets) if engine_for(road[0]).skips_zeros)
    found = []
    for target, precision in (*own, *ROADS):
        destination = folder / f"dense-{target}-{precision}"
        if not is_artefact(destination):
            export(checkpoint, destination, target, precision)
        found.append(destination)
    return tuple(found)


def baselines_for(
    checkpoint: Path, deployments: Iterable[Path], export: Export, *, trust_library: bool = False
) -> tuple[Path, ...]:
    """The dense baselines that suit these deployments."""
    opened = [open_deployment(path, trust_library=trust_library) for path in deployments]
    return dense_baselines(checkpoint, [(one.target, one.precision) for one in opened], export)


def _identity(checkpoint: Path) -> str:
    """A name that changes when the checkpoint's files do."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    text = json.dumps([str(checkpoint.resolve()), facts])
    return hashlib.sha256(text.encode()).hexdigest()[:16]
