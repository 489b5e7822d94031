"""A role is silent for as long as it says nothing new, and nobody is blamed for what could not be heard."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import ray

from cluster import launch
from cluster.pulse import Pulse, Services
from protocol.recipe_file import load_recipe


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pulse(clock: Clock) -> Pulse:
    return Pulse(clock)


def test_only_new_words_are_a_sign_of_life(pulse: Pulse, clock: Clock) -> None:
    pulse.hear({"moves": 0, "stands": 0})
    for second in range(1, 11):
        clock.now_s = second
        pulse.hear({"moves": second, "stands": 0})
    assert pulse.silent_s("moves") == 0
    assert pulse.silent_s("stands") == 10
    assert pulse.still(["moves", "stands"], bound_s=9) == ["stands"]


def test_a_role_that_has_never_spoken_has_the_bound_from_when_it_is_first_asked_about(
    pulse: Pulse, clock: Clock
) -> None:
    clock.now_s = 100
    assert pulse.still(["mute"], bound_s=5) == []
    clock.now_s = 106
    assert pulse.still(["mute"], bound_s=5) == ["mute"]


def test_the_longest_silent_comes_first(pulse: Pulse, clock: Clock) -> None:
    for second, role in enumerate(("first", "second", "third")):
        clock.now_s = second
        pulse.hear({role: 1})
    clock.now_s = 10
    assert pulse.still(["third", "first", "second"], bound_s=1) == ["first", "second", "third"]


def test_while_nothing_can_be_heard_nobody_is_silent(pulse: Pulse, clock: Clock) -> None:
    pulse.hear({"one": 0, "two": 0})
    clock.now_s = 50
    pulse.forgive("one")
    assert [pulse.silent_s(role) for role in ("one", "two")] == [0, 50]
    pulse.forgive_all()
    assert [pulse.silent_s(role) for role in ("one", "two")] == [0, 0]


@pytest.fixture(scope="module")
def store() -> Iterator[Any]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield launch.start_store(load_recipe("recipes/tiny_prdp.yaml"))
    ray.shutdown()


def test_a_service_that_is_stopped_gives_no_answer_and_one_that_is_restarted_does(store: Any) -> None:
    services = Services({"store": store})

    def answers_within(timeout_s: float) -> bool:
        before, deadline = services.answers()["store"], time.monotonic() + timeout_s
        while services.answers()["store"] < before + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        return services.answers()["store"] >= before + 2

    assert answers_within(60)
    (process,) = [child for child in psutil.Process().children(recursive=True) if "WeightStore" in child.cmdline()[0]]
    process.suspend()
    assert not answers_within(2)
    services.restart(["store"])
    assert answers_within(60)
    assert ray.get(store.held.remote()) == set()
