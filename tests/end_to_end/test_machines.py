"""A cluster of machines with addresses of their own and Redis behind TLS. Packets are lost without a word, as when a
machine dies, and the weights are those of one machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.end_to_end.machines import REDIS_ADDRESS, Network, NoNetworkError
from tests.end_to_end.runs import Driver, Run, finished, sfumato

pytestmark = pytest.mark.slow

TWO_RANKS = ("rounds=5", "lag=1", "learner.world_size=2")
ON_NODES = ("learner.resources={learner: 1}", "rollout_worker.resources={rollout: 1}", "rollouts=2")
ARGUMENTS = ("recipe.yaml", *TWO_RANKS, *ON_NODES, "redis.url=env:SFUMATO_REDIS_URL")
NUM_ROUNDS = 16
LONGER = f"rounds={NUM_ROUNDS}"
"""Of runs that must not be over before something happens to them: their first versions are compared."""

PATIENCE_S = 60


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A head with Redis, and machines for a learner rank and a rollout actor each."""
    with ExitStack() as stack:
        try:
            network = stack.enter_context(Network(tmp_path_factory.mktemp("network")))
        except NoNetworkError as error:
            pytest.skip(str(error))
        for name in ("learner", "rollout"):
            for number in range(2):
                network.add(f"{name}-{number}", {name: 1})
        yield network


@pytest.fixture
def drive(workshop: Path, network: Network) -> Callable[[str], Driver]:
    """Starts a long run, in a folder of this name, on the head."""

    def drive_(name: str) -> Driver:
        settings = {"env": network.env, "prefix": network.head.prefix}
        return Driver(workshop / name, [*ARGUMENTS, LONGER], cwd=workshop, **settings)

    return drive_


def test_a_gang_over_two_machines_ends_with_the_digests_of_one(
    train: Callable[..., Run], workshop: Path, network: Network
) -> None:
    folder = workshop / "machines"
    settings = {"env": network.env, "prefix": network.head.prefix}
    run = finished(sfumato("train", *ARGUMENTS, "--run-dir", folder, cwd=workshop, **settings), folder)
    assert "placing the 2 ranks of learner on several nodes: none has room for all" in run.output
    assert run.digests == train(*TWO_RANKS).digests


def test_what_rollouts_send_to_redis_may_be_lost_for_30_s(
    train: Callable[..., Run], network: Network, drive: Callable[[str], Driver]
) -> None:
    rollouts = [network[f"rollout-{number}"] for number in range(2)]
    with drive("lost-packets") as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        for machine in rollouts:
            machine.lose_what_goes_to(REDIS_ADDRESS)
        at_the_cut = driver.rounds_done()
        time.sleep(30)
        assert driver.rounds_done() <= at_the_cut + 2 < NUM_ROUNDS, "the run went on without rollouts"
        for machine in rollouts:
            machine.find_again(REDIS_ADDRESS)
        run = driver.finish()
    assert run.digests.items() >= train(*TWO_RANKS).digests.items()


@pytest.mark.parametrize("role", ["rollout", "learner"])
def test_a_machine_that_falls_silent_in_mid_round_is_replaced_and_ends_what_it_runs_once_it_is_back(
    train: Callable[..., Run], network: Network, drive: Callable[[str], Driver], role: str
) -> None:
    silent = network[f"{role}-1"]
    with drive(f"silent-{role}") as driver:
        driver.wait_for(lambda: driver.rounds_done() >= 1)
        silent.pull_cable()
        assert driver.rounds_done() < NUM_ROUNDS - 2, "the run was over before its machine was lost"
        network.add(f"{role}-2", {role: 1})
        run = driver.finish()
    assert run.digests.items() >= train(*TWO_RANKS).digests.items()
    silent.plug_in()
    deadline = time.monotonic() + PATIENCE_S
    while silent.runs("ray::"):
        assert time.monotonic() < deadline, "the run is over, and its actors live on"
        time.sleep(1)
