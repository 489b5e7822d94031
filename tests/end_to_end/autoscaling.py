"""A Ray head with Ray's own autoscaler, as `ray up` starts it, whose cloud is this machine: each node is a raylet."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from ray.autoscaler.v2.schema import ClusterStatus
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util import get_node_ip_address

from tests.end_to_end.runs import environment

HEAD_ID, HEAD_TYPE = "f" * 51 + "00000", "ray.head.default"
"""What Ray's provider of such nodes takes for the head."""

MARK = "SFUMATO_TEST_CLUSTER"
TIMEOUT_S = 120.0
IDLE_TIMEOUT_S = 20.0
"""More than a busy machine takes from having its nodes to starting actors on them."""
AMOUNTS = {"CPU": 2, "learner": 2, "rollout": 1, "reward": 1}
"""What a node has, of what the cluster file names."""

OBJECT_STORE_BYTES = 2**27
COMMANDS = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")


def small_nodes(cluster_file: str, address: str) -> dict[str, Any]:
    """Returns a cluster file with small nodes on this machine, none of which stays without need."""
    config = yaml.safe_load(Path(cluster_file).read_text())
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    types = {
        name: {
            "resources": {
                "object_store_memory": OBJECT_STORE_BYTES,
                **{resource: AMOUNTS[resource] for resource in node["resources"] if resource in AMOUNTS},
            },
            "node_config": {},
            "max_workers": node["max_workers"],
        }
        for name, node in config["available_node_types"].items()
        if name != config["head_node_type"]
    }
    provider = {
        # By its name, `fake_multinode`, it would read a file that Ray's wheels lack.
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    return {
        **{name: config[name] for name in ("cluster_name", "max_workers")},
        **{f"{name}_commands": [] for name in COMMANDS},
        "idle_timeout_minutes": IDLE_TIMEOUT_S / 60,
        "provider": provider,
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "head_node_type": HEAD_TYPE,
        "available_node_types": {HEAD_TYPE: head, **types},
    }


class Autoscaled:
    """A head without CPUs, and nodes for as long as somebody needs them. Every driver that gets `env` joins them."""

    def __init__(self, folder: Path, cluster_file: str) -> None:
        self._host, self._mark = get_node_ip_address(), uuid.uuid4().hex
        with closing(socket.socket()) as probe:
            probe.bind((self._host, 0))
            self._port = probe.getsockname()[1]
        self._config, self._log = folder / "cluster.yaml", folder / "head.log"
        self._config.write_text(json.dumps(small_nodes(cluster_file, self.env["RAY_ADDRESS"])))

    @property
    def env(self) -> dict[str, str]:
        """What tells a driver where the head is."""
        return {"RAY_ADDRESS": f"{self._host}:{self._port}"}

    def nodes(self, kind: str = "") -> dict[str, str]:
        """Returns id -> type of the living nodes, of all types or of one, less the head."""
        status = self._status()
        living = {node.node_id: node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
        return {node_id: type_ for node_id, type_ in living.items() if type_ != HEAD_TYPE and kind in ("", type_)}

    def is_asked(self) -> bool:
        """Whether anybody asks for more than there is."""
        asked = self._status().resource_demands
        return bool(asked.placement_group_demand or asked.ray_task_actor_demand or asked.cluster_constraint_demand)

    def is_at_rest(self) -> bool:
        """Whether nothing is paid for but the head: no other node lives or is to come, and nobody asks for one."""
        status = self._status()
        return not (self.nodes() or status.pending_launches or status.pending_nodes or self.is_asked())

    def take_away(self, node_id: str) -> None:
        """Kills all processes of a node at once, as a cloud does with a spot machine."""
        for process in self._processes("RAY_OVERRIDE_NODE_ID_FOR_TESTING", node_id):
            process.kill()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition holds."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert self._head.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, f"still {self._status()}"
            time.sleep(0.5)

    def __enter__(self) -> Self:
        command = [
            str(Path(sys.executable).with_name("ray")),
            *("start", "--head", "--block", "--disable-usage-stats", "--include-dashboard=false"),
            *(f"--node-ip-address={self._host}", f"--port={self._port}", f"--autoscaling-config={self._config}"),
            *("--num-cpus=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
        ]
        env = {
            MARK: self._mark,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
            # What `ray up` sets, unless it is told to take the older autoscaler.
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_NODE_TYPE_NAME": HEAD_TYPE,
        }
        with self._log.open("w") as log:
            self._head = subprocess.Popen(command, env=environment(env), stdout=log, stderr=subprocess.STDOUT)
        self.wait_for(lambda: "block forever" in self._log.read_text())
        return self

    def __exit__(self, *_: object) -> None:
        # Nodes are no children of the head's, and outlive it.
        for process in [psutil.Process(self._head.pid), *self._processes(MARK, self._mark)]:
            with suppress(psutil.Error):
                process.kill()
        self._head.wait()

    def _status(self) -> ClusterStatus:
        return get_cluster_status(self.env["RAY_ADDRESS"])

    def _processes(self, name: str, value: str) -> list[psutil.Process]:
        """Returns what runs in this cluster with this in its environment."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if {MARK: self._mark, name: value}.items() <= process.environ().items():
                    found.append(process)
        return found
