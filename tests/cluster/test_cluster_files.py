"""The cluster files: what Ray's own loader makes of them, and that recipes, images, ports and secrets fit together."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import ray.autoscaler._private.kuberay.autoscaling_config as kuberay
import yaml
from ray._private import ray_constants
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.docker import docker_start_cmds
from ray.autoscaler._private.util import prepare_config, validate_config

from cluster.head_redis import PORT
from cluster.nodes import demand, roles
from protocol.paths import ROOT
from protocol.recipe import Recipe
from protocol.recipe_file import load_recipe

RAY_UP = ("a100x8", "single-node", "local")
CLOUD = ("a100x8", "single-node")
KINDS = ("learner", "rollout", "reward")
SHARED = "/mnt/sfumato"
OVERRIDES = {"single-node": ["learner.world_size=4", "rollouts=3", "rewards.0.replicas=1"]}
"""What docs/cluster.md has people change where a file has fewer machines."""

RAY_PORTS = {6379, 8076, 8265, 10001}
SMALL_BYTES = 20 * 2**20
Nodes = dict[str, dict[str, Any]]


def read(name: str) -> dict[str, Any]:
    """A file for `ray up`, as it stands."""
    document: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text())
    return document


def manifests(kind: str) -> list[dict[str, Any]]:
    """Documents of one kind in kuberay.yaml."""
    documents = yaml.safe_load_all((ROOT / "cluster" / "kuberay.yaml").read_text())
    return [document for document in documents if document["kind"] == kind]


def ray_cluster() -> dict[str, Any]:
    (document,) = manifests("RayCluster")
    return document


def pinned(package: str) -> str:
    """The version of a package that was tested."""
    (line,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(line)


def node_types(name: str) -> tuple[str, Nodes]:
    """The head's type and all types, as Ray's loaders read them, with how many nodes of each there may be."""
    if name == "kuberay":
        config = kuberay._derive_autoscaling_config_from_ray_cr(ray_cluster())
    else:
        config = prepare_config(read(name))
    head = config["head_node_type"]
    types: Nodes = config["available_node_types"]
    return head, {
        kind: {"resources": settings["resources"], "count": settings["max_workers"] + (kind == head)}
        for kind, settings in types.items()
    }


def cluster_recipes() -> list[str]:
    """Recipes that place their roles."""
    files = sorted((ROOT / "recipes").glob("*.yaml"))
    return [file.stem for file in files if any(placement.resources for placement, _ in roles(load_recipe(file)))]


def load(recipe: str, cluster: str) -> Recipe:
    return load_recipe(ROOT / "recipes" / f"{recipe}.yaml", OVERRIDES.get(cluster, []))


def commands(name: str) -> list[str]:
    """Every shell command of a file, as Ray hands them to bash."""
    config = prepare_config(read(name))
    return [command for key, lines in config.items() if key.endswith("_commands") for command in lines]


# What Ray makes of them.


@pytest.mark.parametrize("name", RAY_UP)
def test_rays_own_schema_and_loader_take_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    validate_config(prepare_config(read(name)))


def test_rays_own_reader_of_raycluster_resources_takes_the_manifest() -> None:
    config = kuberay._derive_autoscaling_config_from_ray_cr(ray_cluster())
    types = config["available_node_types"]
    assert {kind: types[kind]["resources"].get(kind) for kind in KINDS} == {"learner": 8, "rollout": 8, "reward": 1}
    assert {kind: (types[kind]["min_workers"], types[kind]["max_workers"]) for kind in KINDS} == {
        "learner": (1, 1),
        "rollout": (0, 4),
        "reward": (0, 4),
    }


@pytest.mark.parametrize("name", RAY_UP)
def test_every_command_is_a_shell_command(name: str) -> None:
    assert commands(name)
    for command in commands(name):
        done = subprocess.run(["bash", "-n", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("name", CLOUD)
def test_the_container_is_started_with_one_word_an_option(name: str) -> None:
    config = prepare_config(read(name))
    options = config["docker"]["run_options"]
    (command,) = [docker_start_cmds("ubuntu", "image", {}, "sfumato", options, "cluster", "/home/ray", "docker")]
    words = command.split()
    assert words[words.index("--volume") + 1] == f"{SHARED}:{SHARED}"
    assert "--ipc=host" in words
    assert any(word.startswith("--shm-size=") for word in words)
    environment = dict(word.split("=", 1) for before, word in itertools.pairwise(words) if before == "--env")
    assert {"SFUMATO_RUNS", "SFUMATO_CACHE", "HF_HOME", "RAY_JOB_STOP_WAIT_TIME_S"} == set(environment)


def test_on_your_own_machines_one_without_a_file_of_resources_joins_with_none(tmp_path: Path) -> None:
    start = read("local")["worker_start_ray_commands"][-1]
    (option,) = re.findall(r'--resources=("\$\(.*\)")', start)
    told = [subprocess.check_output(["bash", "-c", f"echo {option}"], env={"HOME": str(tmp_path)}, text=True)]
    (tmp_path / ".sfumato").mkdir()
    (tmp_path / ".sfumato" / "resources.json").write_text('{"rollout": 8}')
    told.append(subprocess.check_output(["bash", "-c", f"echo {option}"], env={"HOME": str(tmp_path)}, text=True))
    assert list(map(json.loads, told)) == [{}, {"rollout": 8}]


# What must agree with what.


def test_all_images_hold_the_tested_ray_and_a_python_that_we_run_on() -> None:
    images = {read(name)["docker"]["image"] for name in CLOUD}
    (base,) = re.findall(r"^FROM (\S+)$", (ROOT / "cluster" / "Dockerfile").read_text(), re.MULTILINE)
    assert images == {base} == {f"rayproject/ray:{pinned('ray')}-py311-gpu"}
    assert ray_cluster()["spec"]["rayVersion"] == pinned("ray")
    assert re.search(r'requires-python = ">=3\.11"', (ROOT / "pyproject.toml").read_text())


def test_head_and_workers_on_kubernetes_run_one_image() -> None:
    spec = ray_cluster()["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    images = {group["template"]["spec"]["containers"][0]["image"] for group in groups}
    (image,) = images
    assert image in (ROOT / "cluster" / "Dockerfile").read_text()
    assert re.search(r":\d+\.\d+\.\d+$", image)


@pytest.mark.parametrize("name", ["a100x8", "kuberay"])
def test_the_head_has_no_gpu_and_no_role_fits_there(name: str) -> None:
    head, types = node_types(name)
    assert types[head]["resources"].get("GPU", 0) == 0
    assert not set(KINDS) & set(types[head]["resources"])
    assert {kind: types[kind]["resources"]["GPU"] for kind in KINDS} == {"learner": 8, "rollout": 8, "reward": 1}


@pytest.mark.parametrize("name", ["a100x8", "kuberay", "single-node"])
@pytest.mark.parametrize("recipe", cluster_recipes())
def test_every_role_of_a_clusters_recipe_finds_its_place(name: str, recipe: str) -> None:
    _, types = node_types(name)
    most: dict[str, float] = {}
    for settings in types.values():
        for resource, amount in settings["resources"].items():
            most[resource] = most.get(resource, 0) + amount * settings["count"]
    wanted: dict[str, float] = {}
    for placement, count in roles(load(recipe, name)):
        asked = demand(placement)
        assert placement.resources, "a role without a resource of its kind may land anywhere"
        fitting = [t for t in types.values() if all(t["resources"].get(r, 0) >= amount for r, amount in asked.items())]
        assert len(fitting) == 1, f"{asked} fits {len(fitting)} node types"
        for resource, amount in asked.items():
            wanted[resource] = wanted.get(resource, 0) + amount * count
    assert {resource: amount for resource, amount in wanted.items() if amount > most.get(resource, 0)} == {}


def test_there_is_a_recipe_for_a_cluster() -> None:
    assert "prdp_sdxl" in cluster_recipes()


@pytest.mark.parametrize("recipe", cluster_recipes())
def test_a_clusters_recipe_takes_redis_from_the_heads_environment_and_waits_for_nodes(recipe: str) -> None:
    loaded = load(recipe, "a100x8")
    assert loaded.redis.url == "env:SFUMATO_REDIS_URL"
    assert loaded.supervision.node_timeout_s >= 1800


def test_learners_are_on_demand_and_all_that_can_be_lost_is_on_spot() -> None:
    types = read("a100x8")["available_node_types"]
    spot = {kind for kind, settings in types.items() if "InstanceMarketOptions" in settings["node_config"]}
    assert spot == {"rollout", "reward"}
    assert (types["learner"]["min_workers"], types["learner"]["max_workers"]) == (1, 1)
    assert all(types[kind]["min_workers"] == 0 and types[kind]["max_workers"] > 0 for kind in spot)


def test_redis_and_ray_have_ports_of_their_own() -> None:
    assert PORT not in RAY_PORTS
    (service,), (deployment,) = manifests("Service"), manifests("Deployment")
    assert [port["port"] for port in service["spec"]["ports"]] == [PORT]
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    assert f"'port {PORT}'" in container["args"][0]
    assert [port["containerPort"] for port in container["ports"]] == [PORT]
    for name in RAY_UP:
        ports = {int(port) for command in commands(name) for port in re.findall(r"(?:-port=|IP:)(\d+)", command)}
        assert ports <= RAY_PORTS, name


def test_the_redis_on_kubernetes_is_configured_like_ours() -> None:
    (deployment,) = manifests("Deployment")
    container = deployment["spec"]["template"]["spec"]["containers"][0]
    script = container["args"][0].replace("exec redis-server -", "cat")
    told = subprocess.check_output(["sh", "-c", script], env={"REDIS_PASSWORD": "hush", "PATH": "/usr/bin:/bin"})
    lines = dict(line.split(" ", 1) for line in told.decode().splitlines())
    assert (lines["requirepass"], lines["save"]) == ("hush", '""')
    assert (lines["maxmemory-policy"], lines["appendonly"]) == ("noeviction", "no")


def test_no_file_holds_a_password() -> None:
    for file in (ROOT / "cluster").glob("*.yaml"):
        text = file.read_text()
        assert not re.search(r"rediss?://[^$\s]*:[^$\s(]+@", text), file.name
        assert not re.search(r"stringData|\bdata:\s*\n\s+password", text), file.name
    (deployment,) = manifests("Deployment")
    head = ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    for container in (deployment["spec"]["template"]["spec"]["containers"][0], head):
        (password,) = [each for each in container["env"] if each["name"] == "REDIS_PASSWORD"]
        assert "value" not in password


def test_workers_on_kubernetes_are_not_told_the_redis_password() -> None:
    for group in ray_cluster()["spec"]["workerGroupSpecs"]:
        assert "REDIS" not in json.dumps(group)


def test_what_must_outlive_nodes_is_on_the_shared_volume() -> None:
    head = ray_cluster()["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    told = {each["name"]: each.get("value", "") for each in head["env"]}
    assert all(told[name].startswith(f"{SHARED}/") for name in ("SFUMATO_RUNS", "SFUMATO_CACHE", "HF_HOME"))
    for name in RAY_UP:
        text = (ROOT / "cluster" / f"{name}.yaml").read_text()
        for variable in ("SFUMATO_RUNS", "SFUMATO_CACHE", "HF_HOME"):
            assert re.search(rf"{variable}={SHARED}/", text), (name, variable)
    for group in (ray_cluster()["spec"]["headGroupSpec"], *ray_cluster()["spec"]["workerGroupSpecs"]):
        mounts = group["template"]["spec"]["containers"][0]["volumeMounts"]
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        assert {mount["mountPath"] for mount in mounts} == {SHARED, "/dev/shm"}
        assert all(mount["name"] in volumes for mount in mounts)


# What a job uploads.


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `ray job submit --working-dir .` uploads of this repository after it has been worked with."""
    folder = tmp_path_factory.mktemp("submit")
    copy = folder / "repository"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "dist", "build", ".*_cache"))
    big = ("runs/a/checkpoints/round-1/state", ".git/objects/pack", ".venv/lib/torch", "exports/a", "dist", "build")
    for name in big:
        (copy / name).mkdir(parents=True)
        (copy / name / "big.bin").write_bytes(bytes(1000))
    excludes = ray_constants.get_runtime_env_default_excludes()
    create_package(
        str(copy), folder / "package.zip", include_gitignore=True, include_parent_dir=False, excludes=excludes
    )
    return folder / "package.zip"


def test_a_job_uploads_little_and_nothing_that_runs_have_left(package: Path) -> None:
    assert package.stat().st_size < SMALL_BYTES
    names = zipfile.ZipFile(package).namelist()
    assert not [name for name in names if name.endswith("big.bin")]
    assert not {name.split("/")[0] for name in names} & {".git", ".venv", "runs", "exports", "dist", "build", "tests"}


def test_a_job_uploads_all_that_a_run_needs(package: Path) -> None:
    names = set(zipfile.ZipFile(package).namelist())
    packages = {
        str(file.relative_to(ROOT)) for folder in ROOT.glob("*/__init__.py") for file in folder.parent.rglob("*.py")
    }
    assert {name for name in packages if not name.startswith(("tests/", "bench/"))} <= names
    assert {"sfumato.py", "pyproject.toml", "recipes/prdp_sdxl.yaml", "assets/prompts_train.txt"} <= names
