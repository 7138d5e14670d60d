"""The files in `examples/cluster` are such as Ray and KubeRay take, as far as is seen here."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from owl_deploy.cli import app

FOLDER = Path("examples/cluster")


def load(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def test_rays_launcher_takes_the_file() -> None:
    ray = pytest.importorskip("ray", reason="pip install 'owl-deploy[ray]'")
    import jsonschema  # which comes with it

    cluster = load("ray-aws.yaml")
    schema = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
    jsonschema.validate(cluster, schema)
    types = cluster["available_node_types"]
    assert types[cluster["head_node_type"]]["resources"] == {"CPU": 0}
    assert "--num-cpus=0" in " ".join(cluster["head_start_ray_commands"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(cluster | {"max_workers": "four"}, schema)


def test_the_rayjob_is_whole() -> None:
    job = load("kuberay-job.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    for pod in (group["template"]["spec"] for group in groups):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_commands_in_them_are_owls() -> None:
    comment = re.sub(r"\\?\n# *", " ", (FOLDER / "ray-aws.yaml").read_text())
    (quoted,) = re.findall(r'"cd /shared && (owl [^"]*)"', comment)
    for command in (quoted, load("kuberay-job.yaml")["spec"]["entrypoint"]):
        verb, *rest = shlex.split(command)[1:]
        context = get_command(app).commands[verb].make_context("owl", rest)  # type: ignore[attr-defined]
        assert context.params["ray"] == "auto"
