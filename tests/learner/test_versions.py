"""The versions that rounds to come may ask for are kept as they were, and given again to a store that lost them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.weights import unpack, weights_digest
from learner.versions import Versions
from protocol.tickets import Source, TicketPlan


class Shelf:
    """A version store in this process."""

    def __init__(self) -> None:
        self.data: dict[int, tuple[str, bytes]] = {}

    def publish(self, version: int, digest: str, data: bytes) -> None:
        self.data[version] = (digest, data)

    def held(self) -> set[int]:
        return set(self.data)


def make_versions(lag: int = 0, iteration_starts: tuple[int, ...] = ()) -> Versions:
    """The versions of a run of that lag, or of self-play."""
    return Versions(TicketPlan(0, (Source.of_prompts("ab"),), 2, 2, lag, iteration_starts))


def state(value: float) -> dict[str, Tensor]:
    return {"b": torch.full((2, 3), value), "a": torch.tensor([value], dtype=torch.bfloat16)}


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_last_lag_plus_one_versions_are_kept(lag: int) -> None:
    versions = make_versions(lag)
    for version in range(6):
        versions.keep(version, state(version))
        assert set(versions.states) == set(versions.digests) == set(range(max(0, version - lag), version + 1))


def test_a_kept_version_does_not_change_with_the_weights_that_are_trained() -> None:
    live, versions = state(1.0), make_versions()
    versions.keep(0, live)
    digest = weights_digest(live)
    for tensor in live.values():
        tensor.add_(1)
    assert versions.digests[0] == digest == weights_digest(versions.states[0]) != weights_digest(live)


def test_packed_bytes_hold_the_very_bits_that_the_digest_names() -> None:
    versions = make_versions(lag=1)
    for version in range(2):
        versions.keep(version, state(version / 3))
    for version, data in versions.packed().items():
        assert weights_digest(unpack(data)) == versions.digests[version]


def test_a_store_gets_exactly_what_it_lost() -> None:
    versions, shelf = make_versions(lag=2), Shelf()
    for version in range(3):
        versions.keep(version, state(version))
    shelf.publish(1, "held", b"already")
    versions.publish_lost(shelf)
    assert shelf.data[1] == ("held", b"already")
    assert {version: digest for version, (digest, _) in shelf.data.items() if version != 1} == {
        0: versions.digests[0],
        2: versions.digests[2],
    }
    assert weights_digest(unpack(shelf.data[2][1])) == versions.digests[2]


def test_a_publication_is_of_the_bytes_that_the_store_was_given() -> None:
    versions, shelf = make_versions(), Shelf()
    assert versions.published is None
    for version in range(2):
        versions.keep(version, state(version))
        versions.publish(version, shelf)
        assert versions.published is not None
        assert (versions.published.version, versions.published.size_bytes) == (version, len(shelf.data[version][1]))
        assert versions.published.publish_s >= 0


# Self-play: rounds of an iteration ask for the weights at its start.

STARTS = (0, 2, 5)


@pytest.mark.parametrize("lag", [0, 1])
def test_self_play_keeps_the_opponent_and_the_newest(lag: int) -> None:
    versions, found = make_versions(lag, STARTS), []
    for version in range(8):
        versions.keep(version, state(version))
        found.append(set(versions.states))
    assert found == [{0}, {0, 1}, {2}, {2, 3}, {2, 4}, {5}, {5, 6}, {5, 7}]


def test_the_opponent_is_what_it_was_at_its_iterations_start() -> None:
    versions = make_versions(iteration_starts=STARTS)
    for version in range(5):
        versions.keep(version, state(version))
    assert versions.digests[2] == weights_digest(state(2)) == weights_digest(versions.states[2])


def test_only_versions_that_are_sampled_with_are_published() -> None:
    versions, shelf = make_versions(iteration_starts=STARTS), Shelf()
    for version in range(8):
        versions.keep(version, state(version))
        versions.publish(version, shelf)
    assert set(shelf.data) == {*STARTS}
    assert all(digest == weights_digest(unpack(data)) for digest, data in shelf.data.values())
    assert versions.published is not None
    assert versions.published.version == STARTS[-1]


def test_a_store_that_lost_everything_gets_the_opponent_alone() -> None:
    versions, shelf = make_versions(iteration_starts=STARTS), Shelf()
    for version in range(5):
        versions.keep(version, state(version))
    versions.publish_lost(shelf)
    assert set(shelf.data) == {2}


@pytest.mark.parametrize("newest", range(1, 8))
@pytest.mark.parametrize("starts", [(), STARTS])
def test_what_a_checkpoint_keeps_is_kept_when_it_is_read_back(newest: int, starts: tuple[int, ...]) -> None:
    """A resumed run keeps each version again, oldest first."""
    versions = make_versions(1, starts)
    for version in range(newest + 1):
        versions.keep(version, state(version))
    again = make_versions(1, starts)
    for version, data in sorted(versions.packed().items()):
        again.keep(version, unpack(data))
    assert again.digests == versions.digests
