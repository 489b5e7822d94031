"""Groups: the answer to a ticket. One prompt, G sibling trajectories, their rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from protocol.errors import TrainingError


@dataclass(frozen=True)
class Group:
    """G scored siblings of one ticket.

    Made by a rollout worker, eaten by the learner rank that its index is dealt to. A worked example with
    G = 8 siblings, T = 10 steps, 4x8x8 latents:

        Group(ticket_id="000003-0007", round=3, index=7, prompt="a red seven on a blue ground",
              version=3, weights_digest="9f86d0..." (of the weights that really sampled, not a copy of the
              ticket's), sampler='{"eta":1.0,...}', fingerprint='{"device":"cpu",...}', worker="rollout-0@host",
              rollout_s=0.41, reward_s=0.02, num_images=8, num_evaluations=80,
              arrays={"latents_GSCHW": float32 (8, 11, 4, 8, 8), "log_prob_GT": float64 (8, 10),
                      "scored_T": bool (10,), "reward_G": float32 (8,),
                      "reward_digit_alignment_G": float32 (8,)})

    `sampler` and `fingerprint` are canonical JSON. `worker`, `rollout_s` and `reward_s` tell who made this
    copy and how long it took, `num_images` how many images were decoded and
    `num_evaluations` how often the network was evaluated for one latent; they are not part of its content.
    """

    ticket_id: str
    round: int
    index: int
    prompt: str
    version: int
    weights_digest: str
    sampler: str
    fingerprint: str
    worker: str
    rollout_s: float
    reward_s: float
    num_images: int
    num_evaluations: int
    arrays: Mapping[str, np.ndarray]

    def array(self, name: str) -> np.ndarray:
        """Returns a field that an algorithm needs, or says which one this group lacks."""
        if name not in self.arrays:
            raise TrainingError(
                f"group {self.ticket_id} lacks the field {name}",
                value=sorted(self.arrays),
                expected=f"a group with {name}, which the algorithm of this recipe needs",
                do="check that rollout workers and learner run the same recipe and code",
            )
        return self.arrays[name]

    def content_checksum(self) -> str:
        """Digest of all that the ticket determines: two copies made on equal fingerprints must agree."""
        digest = hashlib.sha256()
        for text in (self.ticket_id, self.prompt, str(self.version), self.weights_digest, self.sampler):
            digest.update(f"{len(text)}:{text}".encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            digest.update(f"{name}|{array.dtype.str}|{array.shape}".encode())
            digest.update(array.tobytes())
        return digest.hexdigest()

    def non_finite_field(self) -> str | None:
        """Returns the name of a field holding NaN or an infinity, or None."""
        for name, array in self.arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                return name
        return None
