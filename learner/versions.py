"""The versions of the weights that a run may still need: the last lag + 1."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from diffusion.weights import State, pack, weights_digest


class VersionStore(Protocol):
    """Where rollout workers get a version's bytes. It may lose them: the learner publishes again."""

    def publish(self, version: int, digest: str, data: bytes) -> None:
        """Keeps a version's bytes until newer ones push it out."""
        ...

    def held(self) -> set[int]:
        """Returns the versions that it has."""
        ...


class Versions:
    """Copies of published weights, on the CPU of every rank.

    keep(u + 1) -> [kept: checkpointed, published, held for parity probes] -> gone when version u + 2 + lag comes
    """

    def __init__(self, lag: int) -> None:
        self._lag = lag
        self.states: dict[int, dict[str, Tensor]] = {}
        self.digests: dict[int, str] = {}

    def keep(self, version: int, state: State) -> None:
        """Copies a state as it is now, and lets go of what is no longer needed."""
        self.states[version] = copy_state(state)
        self.digests[version] = weights_digest(state)
        for old in [v for v in self.states if v < version - self._lag]:
            del self.states[old], self.digests[old]

    def packed(self) -> dict[int, bytes]:
        """Returns every kept version's bytes."""
        return {version: pack(state) for version, state in self.states.items()}

    def publish(self, version: int, store: VersionStore) -> None:
        """Gives a version's bytes to the store."""
        store.publish(version, self.digests[version], pack(self.states[version]))

    def publish_lost(self, store: VersionStore) -> None:
        """Publishes again what a restarted store no longer has."""
        for version in sorted(set(self.states) - store.held()):
            self.publish(version, store)


def copy_state(state: State) -> dict[str, Tensor]:
    """Returns a copy on the CPU that later updates do not touch."""
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in state.items()}
