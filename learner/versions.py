"""The versions of the weights that a run may still need: the last lag + 1, or self-play's opponent and the newest."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffusion.weights import State, pack, weights_digest
from protocol.tickets import TicketPlan


class VersionStore(Protocol):
    """Where rollout workers get a version's bytes. It may lose them: the learner publishes again."""

    def publish(self, version: int, digest: str, data: bytes) -> None:
        """Keeps a version's bytes until newer ones push it out."""
        ...

    def held(self) -> set[int]:
        """Returns the versions that it has."""
        ...


@dataclass(frozen=True)
class Publication:
    """What it took to give the store a version: `Publication(version=3, size_bytes=123456, publish_s=0.01)`."""

    version: int
    size_bytes: int
    publish_s: float


class Versions:
    """Copies of published weights, on the CPU of every rank.

    keep(u + 1) -> [kept: checkpointed, published, held for parity probes] -> gone when no round to come asks for it
    """

    def __init__(self, plan: TicketPlan) -> None:
        self._plan = plan
        self.states: dict[int, dict[str, Tensor]] = {}
        self.digests: dict[int, str] = {}
        self.published: Publication | None = None
        self._pinned: int | None = None

    def keep(self, version: int, state: State) -> None:
        """Copies a state as it is now, and lets go of what is no longer needed."""
        self.states[version] = copy_state(state)
        self.digests[version] = weights_digest(state)
        kept = self._plan.kept_versions(version)
        for old in [v for v in self.states if v < version and v not in kept and v != self._pinned]:
            del self.states[old], self.digests[old]

    def pin(self, version: int) -> None:
        """Keeps a version until another one is pinned."""
        self._pinned = version

    def packed(self) -> dict[int, bytes]:
        """Returns every kept version's bytes."""
        return {version: pack(state) for version, state in self.states.items()}

    def publish(self, version: int, store: VersionStore) -> None:
        """Gives a version's bytes to the store, if any round to come is sampled with it."""
        if self._plan.is_sampled_with(version):
            data = pack(self.states[version])
            started = time.monotonic()
            store.publish(version, self.digests[version], data)
            self.published = Publication(version, len(data), time.monotonic() - started)

    def publish_lost(self, store: VersionStore) -> None:
        """Publishes again what a restarted store no longer has."""
        wanted = set(self._plan.kept_versions(max(self.states)))
        for version in sorted(wanted & self.states.keys() - store.held()):
            self.publish(version, store)


def copy_state(state: State) -> dict[str, Tensor]:
    """Returns a copy on the CPU that later updates do not touch."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
