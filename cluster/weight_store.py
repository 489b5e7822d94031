"""The weight store: the last versions' bytes, in Ray's object store, outside the learner.

publish -> [put by the store itself, so that the learner's death does not take it along] -> fetch
        -> gone when `num_kept` newer versions have come
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray

from cluster.pulse import HEALTH


class WeightStore:
    """Becomes one Ray actor at launch. Restarted, it is empty, and the learner publishes again."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._refs: dict[int, tuple[str, Any]] = {}

    def publish(self, version: int, digest: str, data: np.ndarray) -> None:
        """Keeps a version's bytes, uint8 (size_bytes,)."""
        self._refs[version] = (digest, ray.put(data))
        for old in sorted(self._refs)[: -self._num_kept]:
            del self._refs[old]

    def held(self) -> set[int]:
        """Returns the versions that are here."""
        return set(self._refs)

    @ray.method(concurrency_group=HEALTH)
    def ping(self) -> None:
        """Answers also while bytes are stored."""

    def fetch(self, digest: str) -> list[Any]:
        """Returns [reference to the bytes] of the version with a digest, or [] if it is not here.

        The reference travels inside a list: as it stands, Ray would send the bytes through this process.
        """
        return [ref for held_digest, ref in self._refs.values() if held_digest == digest]


class StoreClient:
    """The store as learner and rollouts see it: calls that wait, and that outlast its restart."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def publish(self, version: int, digest: str, data: bytes) -> None:
        """Gives the store a version's bytes."""
        ray.get(self._store.publish.remote(version, digest, np.frombuffer(data, np.uint8)))

    def held(self) -> set[int]:
        """Returns the versions that the store has."""
        versions: set[int] = ray.get(self._store.held.remote())
        return versions

    def fetch(self, digest: str) -> bytes | None:
        """Returns a version's bytes, or None if the store does not have it now."""
        refs = ray.get(self._store.fetch.remote(digest))
        return ray.get(refs[0]).tobytes() if refs else None
