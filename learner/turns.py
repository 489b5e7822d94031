"""Colocated sampling: a learner rank answers tickets too, in turns with learning, on the one network that it has.

    [turn: tickets -> groups, until none waits] --> [learning: groups -> next version] --> [turn] --> ...
        text encoders and autoencoder are on the GPU    they are in main memory

Its groups go the way of a rollout actor's, through Redis, so that all promises hold for them, and rollout actors may
come and go beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from diffusion.chain import Chain
from diffusion.peak_memory import release_unused
from diffusion.weights import pack
from learner.versions import Versions, copy_state
from protocol.tickets import Ticket


class Worker(Protocol):
    """What answers tickets."""

    def answer_waiting(self, is_wanted: Callable[[Ticket], bool]) -> bool:
        """Answers the tickets that wait, but for those that nobody wants any more, and returns when none does. Returns
        True if there was any."""
        ...


MakeWorker = Callable[[Chain, Callable[[Ticket], bytes], Callable[[], None]], Worker]
"""Makes a worker that samples with a chain, given what fetches a ticket's weights, and what to call after each step."""


class Turns:
    """Lends a rank's network to a worker, and has it back as it was."""

    def __init__(
        self, make_worker: MakeWorker, chain: Chain, versions: Versions, after_step: Callable[[], None]
    ) -> None:
        self._policy, self._versions = chain.policy, versions
        self._own: dict[str, Tensor] | None = None
        self._worker = make_worker(chain, self._fetch, after_step)

    def sample(self, round_: int) -> None:
        """Lets the worker answer tickets of a round and of later ones. Afterwards the weights are the very bits that
        they were before, and the memory that sampling took is free."""
        release_unused(self._policy.device)
        try:
            has_sampled = self._worker.answer_waiting(lambda ticket: ticket.round >= round_)
        finally:
            if self._own is not None:
                self._policy.load_trainable_state(self._own)
                self._own = None
        if has_sampled:
            self._policy.set_aside()

    def _fetch(self, ticket: Ticket) -> bytes:
        """Asked for where other weights than the present ones are to sample."""
        if self._own is None:
            self._own = copy_state(self._policy.trainable_state())
        return pack(self._versions.states[ticket.version])
