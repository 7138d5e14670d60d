"""The formats of what owl writes, as JSON Schemas: `python -m owl_deploy.schemas docs/schemas`."""

import sys
from pathlib import Path

from pydantic import BaseModel

from owl_deploy.bench.result import Result
from owl_deploy.models.manifest import AdapterManifest, CheckpointManifest, DeploymentManifest
from owl_deploy.utils.artefact import write_json

SCHEMAS: dict[str, type[BaseModel]] = {
    "checkpoint": CheckpointManifest,
    "adapter": AdapterManifest,
    "deployment": DeploymentManifest,
    "result": Result,
}


def write(folder: Path) -> None:
    """Write each schema into `folder`, as NAME.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in SCHEMAS.items():
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        write_json(folder / f"{name}.json", schema | model.model_json_schema())


if __name__ == "__main__":
    write(Path(sys.argv[1]))
