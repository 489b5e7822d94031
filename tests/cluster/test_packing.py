"""Whether processes fit on nodes, against trying everything."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from cluster.packing import Room, Unit, fits

AMOUNTS = st.sampled_from([0.0, 0.5, 1.0, 2.0])
RESOURCES = st.fixed_dictionaries({"CPU": AMOUNTS, "GPU": st.sampled_from([0.0, 1.0, 2.0]), "rollout": AMOUNTS})
DEMANDS = st.fixed_dictionaries({"CPU": AMOUNTS, "GPU": st.sampled_from([0.0, 0.4, 0.5, 1.0])})
UNITS = st.lists(st.tuples(DEMANDS) | st.tuples(DEMANDS, DEMANDS), max_size=5)


def fits_by_trying(rooms: Sequence[Room], units: Sequence[Unit]) -> bool:
    def works(nodes: tuple[int, ...]) -> bool:
        left: list[Room | None] = list(rooms)
        for node, unit in zip(nodes, units, strict=True):
            room = left[node]
            left[node] = room.less(unit) if room else None
        return None not in left

    return any(works(nodes) for nodes in product(range(len(rooms)), repeat=len(units)))


@given(st.lists(RESOURCES, min_size=1, max_size=3), UNITS)
def test_the_search_finds_a_place_exactly_where_trying_everything_does(
    nodes: list[dict[str, float]], units: list[Unit]
) -> None:
    rooms = [Room.of(node) for node in nodes]
    assert fits(rooms, units) is fits_by_trying(rooms, units)


def test_nodes_that_are_enough_in_sum_may_be_too_small_each() -> None:
    rooms = [Room.of({"CPU": 3}), Room.of({"CPU": 3})]
    assert fits(rooms, [({"CPU": 2},)] * 2) is True
    assert fits(rooms, [({"CPU": 2},)] * 3) is False


def test_what_belongs_together_is_on_one_node() -> None:
    pair = ({"GPU": 1}, {"GPU": 1})
    assert fits([Room.of({"GPU": 1}), Room.of({"GPU": 1})], [pair]) is False
    assert fits([Room.of({"GPU": 1}), Room.of({"GPU": 2})], [pair]) is True


def test_a_part_of_a_gpu_is_on_one_gpu() -> None:
    two_gpus = [Room.of({"GPU": 2})]
    assert fits(two_gpus, [({"GPU": 0.5},)] * 4) is True
    assert fits(two_gpus, [({"GPU": 0.6},)] * 2) is True
    assert fits(two_gpus, [({"GPU": 0.6},)] * 3) is False
    assert fits(two_gpus, [({"GPU": 0.5},), ({"GPU": 2},)]) is False
    assert fits(two_gpus, [({"GPU": 0.1},)] * 20) is True


def test_equal_nodes_and_processes_are_not_tried_in_every_order() -> None:
    rooms = [Room.of({"CPU": 3})] * 30
    assert fits(rooms, [({"CPU": 2},)] * 31, max_steps=100) is False


def test_a_search_that_takes_too_long_is_given_up() -> None:
    rooms = [Room.of({"CPU": 10 + number}) for number in range(8)]
    assert fits(rooms, [({"CPU": 3 + number / 7},) for number in range(30)], max_steps=50) is None


def test_no_nodes_hold_nothing_and_nothing_fits_anywhere() -> None:
    assert fits([], []) is True
    assert fits([], [({"CPU": 1},)]) is False
