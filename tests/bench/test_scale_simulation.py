"""The simulation of the plumbing agrees with closed forms where there are any."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from bench.scale_simulation import Demand, Plant, broadcast_s, simulate

DEMAND = Demand(group_bytes=1e6, worker_s=0.02, server_s=0.01, rank_s=0.03)
BUSY = Plant(num_actors=50, compute_s=1.0, window=100)


def test_one_actor_makes_a_group_in_the_sum_of_its_times() -> None:
    told = simulate(Plant(num_actors=1, compute_s=1.0, window=1), DEMAND, 40)
    assert told.groups_per_s == pytest.approx(1 / (1.0 + 0.02 + 0.01 + 0.03))
    assert told.latency_s == pytest.approx(0.06)


def test_few_actors_work_without_a_pause_where_tickets_wait_for_them() -> None:
    told = simulate(replace(BUSY, num_actors=10, window=20), DEMAND, 200)
    assert told.groups_per_s == pytest.approx(10 / (1.0 + 0.02 + 0.005), rel=0.02)


def test_a_rank_takes_in_no_more_than_it_can_decode() -> None:
    told = simulate(BUSY, DEMAND, 300)
    assert told.groups_per_s == pytest.approx(1 / (0.03 + 0.005), rel=0.05)


def test_a_network_card_passes_no_more_than_its_bytes() -> None:
    told = simulate(replace(BUSY, num_ranks=10, server_bytes_per_s=10e6), DEMAND, 300)
    # Each group comes in and goes out.
    assert told.groups_per_s == pytest.approx(10e6 / 2 / 1e6, rel=0.05)
    assert told.busy["servers"] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("num_others", [0, 2, 6])
def test_shared_cores_are_shared_with_others_too(num_others: int) -> None:
    plant = Plant(num_actors=20, compute_s=0.0, window=20, num_ranks=20, cores=1, num_others=num_others)
    alone = simulate(replace(plant, num_others=0), DEMAND, 300).groups_per_s
    assert alone == pytest.approx(1 / (0.02 + 0.01 + 0.03), rel=0.1)
    assert simulate(plant, DEMAND, 300).groups_per_s <= alone


def test_more_servers_and_ranks_never_do_less() -> None:
    told = [simulate(replace(BUSY, num_servers=n, num_ranks=4 * n), DEMAND, 300).groups_per_s for n in (1, 2, 4)]
    assert told == sorted(told)
    assert told[-1] <= 50 / 1.02


@pytest.mark.parametrize("num_nodes", [1, 2, 7, 1000])
def test_a_version_that_is_handed_on_comes_in_as_many_turns_as_holders_double(num_nodes: int) -> None:
    fast, slow = broadcast_s(3e6, num_nodes, 1e6)
    assert fast == 3 * math.ceil(math.log2(num_nodes + 1))
    assert slow == 3 * num_nodes
