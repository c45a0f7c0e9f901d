"""The files in deploy/ and beside the packages can be read, name the same versions, and hold valid sample jobs."""

from __future__ import annotations

import os
import shlex
import subprocess
import tomllib
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray.autoscaler.sdk import bootstrap_config

from psgd.spec.reader import load_spec

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
VERSIONS = dict(line.split("==") for line in PINS)
BASE_IMAGE = f"rayproject/ray:{VERSIONS['ray']}-py311"


@pytest.fixture(scope="module")
def kubernetes() -> dict[str, Any]:
    documents = yaml.safe_load_all((DEPLOY / "kuberay" / "rayjob.yaml").read_text())
    return {document["kind"]: document for document in documents}


@pytest.fixture(scope="module")
def cluster(kubernetes: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = kubernetes["RayJob"]["spec"]["rayClusterSpec"]
    return spec


@pytest.fixture(scope="module")
def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


@pytest.fixture(scope="module")
def entrypoint(kubernetes: dict[str, Any]) -> list[str]:
    return shlex.split(kubernetes["RayJob"]["spec"]["entrypoint"])


@pytest.mark.parametrize("path", sorted((DEPLOY / "jobs").iterdir()), ids=lambda path: path.name)
def test_a_sample_job_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_spec(path).name == path.stem


def test_pins_are_names_and_public_versions_and_nothing_else() -> None:
    for pin in PINS:
        name, _, version = pin.partition("==")
        assert name == canonicalize_name(name), pin
        assert str(Version(version)) == Version(version).public, pin


def test_pins_are_sorted_and_unique() -> None:
    assert sorted(PINS) == PINS
    assert len(VERSIONS) == len(PINS)


def test_everything_the_project_asks_for_is_pinned_within_its_range() -> None:
    extras = PROJECT["project"]["optional-dependencies"].values()
    asked = chain(PROJECT["project"]["dependencies"], PROJECT["build-system"]["requires"], *extras)
    for requirement in map(Requirement, asked):
        if requirement.name != "psgd":
            assert VERSIONS[canonicalize_name(requirement.name)] in requirement.specifier, str(requirement)


def test_the_image_is_built_on_the_pinned_ray() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    assert [line for line in lines if line.startswith("FROM")] == [f"FROM {BASE_IMAGE}"]


def test_the_image_may_copy_all_that_the_build_needs() -> None:
    packages = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    project = PROJECT["project"]
    needed = ["constraints.txt", "pyproject.toml", project["readme"], *project["license-files"], *packages]
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert {f"!{Path(path).parts[0]}" for path in needed} == {line for line in ignore if line.startswith("!")}


def test_kubernetes_resumes_the_job_of_the_config_map(
    kubernetes: dict[str, Any], entrypoint: list[str], pods: list[dict[str, Any]], tmp_path: Path
) -> None:
    file = Path(entrypoint[2])
    text = kubernetes["ConfigMap"]["data"][file.name]
    (tmp_path / file.name).write_text(text)
    assert entrypoint[:2] == ["psgd", "train"]
    assert "--resume" in entrypoint
    assert load_spec(tmp_path / file.name).failure.start_timeout_s > 0
    for pod in pods:
        assert _volume_at(pod, str(file.parent)) == {"configMap": {"name": kubernetes["ConfigMap"]["metadata"]["name"]}}


def test_kubernetes_keeps_the_run_on_a_claim_that_every_node_shares(
    kubernetes: dict[str, Any], entrypoint: list[str], pods: list[dict[str, Any]]
) -> None:
    claim = kubernetes["PersistentVolumeClaim"]
    storage = entrypoint[entrypoint.index("--storage") + 1]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for pod in pods:
        assert _volume_at(pod, storage) == {"persistentVolumeClaim": {"claimName": claim["metadata"]["name"]}}


def test_kubernetes_retries_a_failed_driver_and_leaves_nothing_running(kubernetes: dict[str, Any]) -> None:
    job = kubernetes["RayJob"]
    assert (job["apiVersion"], job["spec"]["submissionMode"]) == ("ray.io/v1", "K8sJobMode")
    assert job["spec"]["backoffLimit"] > 0
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["activeDeadlineSeconds"] > 0


def test_kubernetes_runs_one_image_of_the_pinned_ray(cluster: dict[str, Any], pods: list[dict[str, Any]]) -> None:
    tag = f"psgd:{PROJECT['project']['version']}-ray{VERSIONS['ray']}"
    images = {container["image"] for pod in pods for container in pod["containers"]}
    assert cluster["rayVersion"] == VERSIONS["ray"]
    assert {image.rpartition("/")[2] for image in images} == {tag}
    assert f"{images.pop()} ." in (DEPLOY / "Dockerfile").read_text()


def test_kubernetes_pods_request_what_they_are_limited_to(pods: list[dict[str, Any]]) -> None:
    for resources in (container["resources"] for pod in pods for container in pod["containers"]):
        assert resources["requests"] == resources["limits"]
        assert resources["limits"].keys() >= {"cpu", "memory"}


def test_kubernetes_has_room_for_the_workers(kubernetes: dict[str, Any], cluster: dict[str, Any]) -> None:
    job = yaml.safe_load(kubernetes["ConfigMap"]["data"]["job.yaml"])
    (group,) = cluster["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert job["scaling"]["workers"] <= group["replicas"] * int(container["resources"]["limits"]["cpu"])


def test_ray_up_accepts_the_cluster_and_installs_psgd_on_the_pinned_ray() -> None:
    config = bootstrap_config(yaml.safe_load((DEPLOY / "cluster.yaml").read_text()), no_config_cache=True)
    (install,) = config["setup_commands"]
    (project,) = (remote for remote, local in config["file_mounts"].items() if local == ".")
    assert config["docker"]["image"] == BASE_IMAGE
    assert shlex.split(install) == ["pip", "install", "--constraint", f"{project}/constraints.txt", f"{project}[data]"]


def test_clusters_ask_for_a_token(cluster: dict[str, Any]) -> None:
    config = yaml.safe_load((DEPLOY / "cluster.yaml").read_text())
    assert cluster["authOptions"] == {"mode": "token"}
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_the_workflow_runs_what_a_desk_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    job = workflow["jobs"]["test"]
    script = ROOT / ".ci" / "run"
    assert job["steps"][-1] == {"run": ".ci/run"}
    assert job["timeout-minutes"] <= 60
    assert workflow["permissions"] == {"contents": "read"}
    assert f">={job['strategy']['matrix']['python'][0]}" == PROJECT["project"]["requires-python"]
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"


@pytest.mark.parametrize(
    ("target", "commands"),
    [
        ("demo", ["psgd train deploy/jobs/digits.yaml"]),
        ("test", ["ruff check", "ruff format --check", "mypy", "lint-imports", "tests/unit", "tests/integration"]),
    ],
)
def test_make_runs_each_habit(target: str, commands: list[str]) -> None:
    plan = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert [command for command in commands if command not in plan] == []


def _volume_at(pod: dict[str, Any], path: str) -> dict[str, Any]:
    """Return the volume that each container of a pod mounts at a path, without its name."""
    names = {m["name"] for container in pod["containers"] for m in container["volumeMounts"] if m["mountPath"] == path}
    (volume,) = (volume for volume in pod["volumes"] if {volume["name"]} == names)
    return {key: value for key, value in volume.items() if key != "name"}
