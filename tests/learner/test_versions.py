"""The last lag + 1 versions are kept as they were, and given again to a store that lost them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusion.weights import unpack, weights_digest
from learner.versions import Versions


class Shelf:
    """A version store in this process."""

    def __init__(self) -> None:
        self.data: dict[int, tuple[str, bytes]] = {}

    def publish(self, version: int, digest: str, data: bytes) -> None:
        self.data[version] = (digest, data)

    def held(self) -> set[int]:
        return set(self.data)


def state(value: float) -> dict[str, Tensor]:
    return {"b": torch.full((2, 3), value), "a": torch.tensor([value], dtype=torch.bfloat16)}


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_last_lag_plus_one_versions_are_kept(lag: int) -> None:
    versions = Versions(lag)
    for version in range(6):
        versions.keep(version, state(version))
        assert set(versions.states) == set(versions.digests) == set(range(max(0, version - lag), version + 1))


def test_a_kept_version_does_not_change_with_the_weights_that_are_trained() -> None:
    live, versions = state(1.0), Versions(0)
    versions.keep(0, live)
    digest = weights_digest(live)
    for tensor in live.values():
        tensor.add_(1)
    assert versions.digests[0] == digest == weights_digest(versions.states[0]) != weights_digest(live)


def test_packed_bytes_hold_the_very_bits_that_the_digest_names() -> None:
    versions = Versions(1)
    for version in range(2):
        versions.keep(version, state(version / 3))
    for version, data in versions.packed().items():
        assert weights_digest(unpack(data)) == versions.digests[version]


def test_a_store_gets_exactly_what_it_lost() -> None:
    versions, shelf = Versions(2), Shelf()
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
