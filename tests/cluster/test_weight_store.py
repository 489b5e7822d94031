"""Weights between real Ray actors: to the bit whatever their length, whole or not there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from ray._private.internal_api import free

from cluster import launch
from cluster.weight_store import CHUNK_BYTES, StoreClient
from protocol.recipe_file import load_recipe

TWO_CHUNKS = np.random.default_rng(0).bytes(CHUNK_BYTES + 1)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


@pytest.fixture
def store() -> Iterator[Any]:
    """A weight store that keeps two versions."""
    actor = launch.start_store(load_recipe("recipes/tiny_prdp.yaml"))
    yield actor
    ray.kill(actor)


@ray.remote(num_cpus=0)
class Answered:
    """A store in the moment after it has told where a version's chunks are."""

    def __init__(self, refs: list[Any]) -> None:
        self._refs = refs

    def fetch(self, digest: str) -> list[Any]:
        return self._refs


def become(condition: Callable[[], bool], within_s: float = 60) -> bool:
    """Waits: Ray kills and frees in its own time, and what dies may still answer."""
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def test_bytes_of_any_length_come_back_by_digest(store: Any) -> None:
    client = StoreClient(store)
    whole = np.random.default_rng(1).bytes(3 * CHUNK_BYTES + 5)
    for size in (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(whole)):
        client.publish(size, str(size), whole[:size])
        assert client.fetch(str(size)) == whole[:size]
        assert len(ray.get(store.fetch.remote(str(size)))) == -(-size // CHUNK_BYTES)
    assert client.fetch("another") is None


def test_a_store_keeps_the_newest_versions_whatever_order_they_come_in(store: Any) -> None:
    client = StoreClient(store)
    for version in (3, 1, 2, 4):
        client.publish(version, f"digest {version}", b"weights")
    assert client.held() == {3, 4}
    assert client.fetch("digest 1") is None


def test_a_store_that_was_restarted_is_empty_and_answers(store: Any) -> None:
    client = StoreClient(store)
    client.publish(0, "abc", TWO_CHUNKS)
    ray.kill(store, no_restart=False)
    assert become(lambda: not client.held())
    assert client.fetch("abc") is None
    client.publish(0, "abc", TWO_CHUNKS)
    assert client.fetch("abc") == TWO_CHUNKS


def test_a_version_whose_store_dies_between_its_answer_and_the_bytes_is_not_there(store: Any) -> None:
    client = StoreClient(store)
    client.publish(0, "abc", TWO_CHUNKS)
    late = StoreClient(Answered.remote(ray.get(store.fetch.remote("abc"))))
    assert late.fetch("abc") == TWO_CHUNKS
    ray.kill(store, no_restart=False)
    assert become(lambda: late.fetch("abc") is None)


@pytest.mark.filterwarnings("ignore:`free` is a deprecated API")
def test_a_version_of_which_a_chunk_is_lost_is_not_held_until_it_is_published_again(store: Any) -> None:
    client = StoreClient(store)
    client.publish(0, "abc", TWO_CHUNKS)
    client.publish(1, "def", TWO_CHUNKS)
    free(ray.get(store.fetch.remote("abc"))[1:])
    assert become(lambda: client.fetch("abc") is None)
    assert client.held() == {1}
    client.publish(0, "abc", TWO_CHUNKS)
    assert client.fetch("abc") == client.fetch("def") == TWO_CHUNKS


def test_bytes_outlive_the_process_that_published_them(store: Any) -> None:
    @ray.remote(num_cpus=1)
    def publish_and_die() -> None:
        StoreClient(store).publish(7, "abc", b"weights" * 3_000_000)
        threading.Timer(0.2, os._exit, (1,)).start()

    ray.get(publish_and_die.remote())
    time.sleep(1)
    assert StoreClient(store).fetch("abc") == b"weights" * 3_000_000
