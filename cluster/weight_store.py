"""The weight store: the last versions' bytes, in Ray's object store, outside the learner.

publish -> [chunks, put by the store itself, so that the learner's death does not take them along] -> fetch
        -> gone when `num_kept` newer versions have come, or a chunk is lost
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, OwnerDiedError

from cluster.pulse import HEALTH

CHUNK_BYTES = 16 * 2**20
"""Small, since the store's own node sends at least one to each node before they can share; not smaller, since to ask
for one takes milliseconds, as 16 MiB take to cross at 25 Gbit/s."""


class WeightStore:
    """Becomes one Ray actor at launch. Restarted, it is empty, and the learner publishes again."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._refs: dict[int, tuple[str, list[Any]]] = {}

    def publish(self, version: int, digest: str, *chunks: np.ndarray) -> None:
        """Keeps a version's bytes, each chunk uint8 (size_bytes,)."""
        self._refs[version] = (digest, [ray.put(chunk) for chunk in chunks])
        for old in sorted(self._refs)[: -self._num_kept]:
            del self._refs[old]

    def held(self) -> set[int]:
        """Returns the versions that are here."""
        return set(self._refs)

    @ray.method(concurrency_group=HEALTH)
    def ping(self) -> None:
        """Answers also while bytes are stored."""

    def fetch(self, digest: str) -> list[Any] | None:
        """Returns references to the chunks of the version with a digest, or None if it is not here.

        References travel inside a list: as they stand, Ray would send the bytes through this process.
        """
        return next((refs for held_digest, refs in self._refs.values() if held_digest == digest), None)

    def forget(self, digest: str) -> None:
        """Lets go of a version of which a chunk is lost: the learner publishes again what is not held."""
        self._refs = {version: kept for version, kept in self._refs.items() if kept[0] != digest}


class StoreClient:
    """The store as learner and rollouts see it: calls that wait, and that outlast its restart."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def publish(self, version: int, digest: str, data: bytes) -> None:
        """Gives the store a version's bytes."""
        whole = np.frombuffer(data, np.uint8)
        starts = range(0, len(data), CHUNK_BYTES)
        ray.get(self._store.publish.remote(version, digest, *(whole[at : at + CHUNK_BYTES] for at in starts)))

    def held(self) -> set[int]:
        """Returns the versions that the store has."""
        versions: set[int] = ray.get(self._store.held.remote())
        return versions

    def fetch(self, digest: str) -> bytes | None:
        """Returns a version's bytes, or None if the store does not have them all now."""
        refs = ray.get(self._store.fetch.remote(digest))
        try:
            return None if refs is None else join(refs)
        except OwnerDiedError:  # They went with the store, and the next one began empty.
            return None
        except ObjectLostError:
            ray.get(self._store.forget.remote(digest))
            return None


def join(refs: Sequence[Any]) -> bytes:
    """Returns the bytes that chunks make together. Raises ObjectLostError.

    They are fetched one by one, and each node begins with another, so that nodes hand on what they have while others
    still come: of all that is asked for at once, Ray fetches each from whoever has it then, the store's own node alone.
    """
    first = int(ray.get_runtime_context().get_node_id(), 16) % max(1, len(refs))
    chunks = {number: ray.get(refs[number]) for number in (*range(first, len(refs)), *range(first))}
    return b"".join(chunks[number] for number in range(len(refs)))
