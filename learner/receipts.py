"""Receipts: what the ledger and the metrics keep of a group once its tensors are gone."""

from __future__ import annotations

from dataclasses import dataclass

from protocol.groups import Group


@dataclass(frozen=True)
class Receipt:
    """Proof of one consumed group. A worked example with G = 4:

    Receipt(ticket_id="000003-0007", version=3, weights_digest="9f86d0...", checksum="2c26b4...",
            worker="0@host", fingerprint='{"device":"cpu",...}', rollout_s=0.41, reward_s=0.02,
            num_images=4, num_evaluations=40, rewards={"mean": (-1.2, -0.4, -2.0, -0.9), "digit_alignment": (...)})

    `rewards["mean"]` is the weighted sum that is trained on. A group that nothing was scored of has no rewards.
    """

    ticket_id: str
    version: int
    weights_digest: str
    checksum: str
    worker: str
    fingerprint: str
    rollout_s: float
    reward_s: float
    num_images: int
    num_evaluations: int
    rewards: dict[str, tuple[float, ...]]


def receipt_of(group: Group) -> Receipt:
    """Returns the receipt of a group as it came. Its rewards are added up later, with those of the whole round."""
    return Receipt(
        group.ticket_id,
        group.version,
        group.weights_digest,
        group.content_checksum(),
        group.worker,
        group.fingerprint,
        group.rollout_s,
        group.reward_s,
        group.num_images,
        group.num_evaluations,
        {},
    )
