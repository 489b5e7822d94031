"""Ray's autoscaler supplies a run with the nodes of cluster/a100x8.yaml, and takes them back when nobody needs them."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.util import get_node_ip_address

from cluster.redis_server import RedisServer
from tests.end_to_end.autoscaling import Autoscaled
from tests.end_to_end.runs import Driver, Run, finished, rows, sfumato

pytestmark = pytest.mark.slow

RUN = ("recipe.yaml", "lag=1")
ENDLESS = "rounds=1000"
ON_NODES = (
    "learner.resources={learner: 1}",
    "rollout_worker.resources={rollout: 1}",
    "rewards.0.resources={reward: 1}",
    "redis.url=env:SFUMATO_REDIS_URL",
    "supervision.node_timeout_s=120",
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Autoscaled]:
    """A head on which nothing of a run has room."""
    with Autoscaled(tmp_path_factory.mktemp("cluster"), "cluster/a100x8.yaml") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def settings(cluster: Autoscaled, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a driver is given besides its run: where the cluster is, and its Redis."""
    with RedisServer(tmp_path_factory.mktemp("redis"), host=get_node_ip_address()) as server:
        yield {"env": {**cluster.env, "SFUMATO_REDIS_URL": server.url}}


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: Autoscaled) -> Iterator[None]:
    """However a run ends, nobody pays for its nodes any longer."""
    cluster.wait_for(cluster.is_at_rest)
    yield
    cluster.wait_for(cluster.is_at_rest)


def workers(driver: Driver) -> set[str]:
    """Returns the rollout actors whose groups the last round was learnt from."""
    ledger = rows(driver.folder / "ledger.jsonl")
    return {worker.partition("@")[0] for worker in ledger[-1]["workers"]} if ledger else set()


def scale(driver: Driver, cluster: Autoscaled, num: int) -> None:
    """Asks for so many rollout actors, and waits until there are as many nodes for them."""
    asked = sfumato("scale", driver.folder, "--rollouts", str(num), cwd=driver.folder.parent)
    assert asked.returncode == 0, asked.stderr
    cluster.wait_for(lambda: len(cluster.nodes("rollout")) == num)


def stopped(driver: Driver) -> Run:
    """Ends a run that has no end of its own."""
    driver.ask_to_end(signal.SIGINT)
    driver.wait_for_failure(130)
    return Run(driver.folder, driver.output())


def on_one_machine(run: Run, workshop: Path) -> Run:
    """Returns a run of as many rounds without a cluster."""
    folder = workshop / f"{run.folder.name}-alone"
    return finished(sfumato("train", *RUN, f"rounds={len(run.ledger)}", "--run-dir", folder, cwd=workshop), folder)


def test_a_run_has_the_nodes_that_its_size_needs_and_the_weights_of_one_machine(
    workshop: Path, cluster: Autoscaled, settings: dict[str, Any]
) -> None:
    folder = workshop / "autoscaled"
    with Driver(folder, [*RUN, *ON_NODES, ENDLESS, "rollouts=1"], cwd=workshop, **settings) as driver:
        driver.wait_for(lambda: "waiting for nodes: " in driver.output())
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        assert Counter(cluster.nodes().values()) == {"learner": 1, "rollout": 1, "reward": 1}
        scale(driver, cluster, 2)
        driver.wait_for(lambda: workers(driver) == {"0", "1"})
        scale(driver, cluster, 1)
        driver.wait_for(lambda: workers(driver) == {"0"})
        run = stopped(driver)
    assert run.digests == on_one_machine(run, workshop).digests


def test_a_spot_node_that_is_taken_away_is_replaced_and_the_weights_are_those_of_one_machine(
    workshop: Path, cluster: Autoscaled, settings: dict[str, Any]
) -> None:
    with Driver(workshop / "spot", [*RUN, *ON_NODES, ENDLESS, "rollouts=2"], cwd=workshop, **settings) as driver:
        driver.wait_for(lambda: len(workers(driver)) == 2)
        kept, lost = cluster.nodes("rollout")
        cluster.take_away(lost)
        driver.wait_for(lambda: len(workers(driver)) == 1)
        cluster.wait_for(lambda: len(cluster.nodes("rollout").keys() - {kept, lost}) == 1)
        driver.wait_for(lambda: len(workers(driver)) == 2)
        run = stopped(driver)
    assert "lost: " in run.output
    assert run.digests == on_one_machine(run, workshop).digests


@pytest.mark.parametrize("said", ["waiting for nodes: ", "training"])
def test_a_driver_that_is_killed_leaves_no_node_behind(
    workshop: Path, cluster: Autoscaled, settings: dict[str, Any], said: str
) -> None:
    folder = workshop / f"killed-{said[:7]}"
    with Driver(folder, [*RUN, *ON_NODES, ENDLESS, "rollouts=1"], cwd=workshop, **settings) as driver:
        driver.wait_for(lambda: said in driver.output())
        driver.wait_for(lambda: len(cluster.nodes()) > 0)
        driver.kill()


@pytest.mark.parametrize("node_timeout_s", [0, 10])
def test_a_run_that_the_cluster_can_never_hold_is_refused_with_a_table_and_starts_no_node(
    workshop: Path, cluster: Autoscaled, settings: dict[str, Any], node_timeout_s: int
) -> None:
    arguments = (*RUN, *ON_NODES, "rollouts=5", f"supervision.node_timeout_s={node_timeout_s}")
    refused = sfumato("train", *arguments, "--run-dir", workshop / f"large-{node_timeout_s}", cwd=workshop, **settings)
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "the cluster cannot hold this recipe: " in refused.stderr
    assert "rollout 0 of 5" in refused.stderr
    assert "there, on each node" in refused.stderr
    assert ("waiting for nodes: " in refused.stdout) == (node_timeout_s > 0)
    assert cluster.nodes() == {}
