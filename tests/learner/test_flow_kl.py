"""Flow-GRPO's KL to the pretrained model, on a real chain of a flow-matching model (algorithms.md 5.8)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from diffusion.chain import Chain
from diffusion.policy import Policy
from diffusion.process import told_share
from diffusion.schedules import make_flow_schedule
from learner.batching import RoundBatch, stack_groups
from learner.probes import TransitionProbe
from protocol.groups import Group
from protocol.recipe import Lora, Sampler
from tests.models import make_tiny_sd3_model

SHARES = torch.tensor([1.0, 0.75, 0.5], dtype=torch.float64)
"""Two scored steps of length 1/4, with DanceGRPO's eta 1 a sigma of 1/2 each, and the last one."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    torch.set_num_threads(1)
    folder = make_tiny_sd3_model(tmp_path_factory.mktemp("flow") / "model")
    policy = Policy(str(folder), trainable=Lora(rank=2), seed=0, with_decoder=False)
    found = Chain(policy, Sampler(kernel="dance_grpo", eta=1.0, num_steps=3, guidance_scale=2.0))
    found.schedule = make_flow_schedule(SHARES, told_share(SHARES), kernel="dance_grpo", eta=1.0)
    return found


@pytest.fixture(scope="module")
def batch(chain: Chain) -> RoundBatch:
    drawn = chain.sample("a red seven", [1, 2])
    group = Group(
        ticket_id="t",
        round=0,
        index=0,
        prompt="a red seven",
        version=0,
        weights_digest="",
        sampler=chain.description,
        fingerprint="",
        worker="w",
        rollout_s=0.0,
        reward_s=0.0,
        num_images=0,
        num_evaluations=0,
        arrays={
            "latents_GSCHW": drawn.latents_GSCHW.numpy(),
            "log_prob_GT": drawn.log_prob_GT.numpy(),
            "scored_T": drawn.scored_T.numpy(),
            "reward_G": np.zeros(2, np.float32),
        },
    )
    return stack_groups([group], torch.device("cpu"))


@pytest.fixture(scope="module")
def item_N3() -> torch.Tensor:
    return torch.tensor([[0, sibling, step] for sibling in range(2) for step in range(3)])


@pytest.fixture(scope="module")
def probe(chain: Chain, batch: RoundBatch, item_N3: torch.Tensor) -> TransitionProbe:
    """Against a reference whose means are 0.1 beside ours."""
    plain = TransitionProbe(chain, batch)
    with torch.no_grad():
        means_NCHW = plain.means(chain.policy.denoiser, item_N3)
    return replace(plain, ref_mean_PGTCHW=means_NCHW.view(1, 2, 3, *means_NCHW.shape[1:]) + 0.1)


def kl(probe: TransitionProbe, item_N3: torch.Tensor) -> torch.Tensor:
    """Each step's KL of both siblings, (2, 3)."""
    with torch.no_grad():
        return probe(probe.chain.policy.denoiser, item_N3)[:, 1].view(2, 3)


def test_means_a_tenth_apart_at_a_sigma_of_a_half_have_an_exact_kl_of_0_02(
    probe: TransitionProbe, item_N3: torch.Tensor
) -> None:
    """B8; means are fp32. The last step has no density."""
    torch.testing.assert_close(
        kl(probe, item_N3), torch.tensor([[0.02, 0.02, 0.0]] * 2, dtype=torch.float64), rtol=1e-5, atol=0
    )


def test_flow_grpos_kl_is_the_exact_one_times_the_steps_length(probe: TransitionProbe, item_N3: torch.Tensor) -> None:
    """B8: Flow-GRPO divides by 2 std^2, where the step's variance is std^2 times its length."""
    length_T = probe.chain.schedule.length_N
    assert length_T.tolist() == [0.25, 0.25, 0.5]
    own, exact = kl(replace(probe, kl_factor_T=length_T), item_N3), kl(probe, item_N3)
    torch.testing.assert_close(own, exact * length_T, rtol=1e-12, atol=0)
    assert own[0].tolist() == [pytest.approx(0.005, rel=1e-5)] * 2 + [0.0]


def test_log_probabilities_are_the_same_with_either_kl(
    probe: TransitionProbe, chain: Chain, batch: RoundBatch, item_N3: torch.Tensor
) -> None:
    with torch.no_grad():
        scored = probe(chain.policy.denoiser, item_N3)[:, 0]
        alone = TransitionProbe(chain, batch)(chain.policy.denoiser, item_N3)
    assert torch.equal(scored, alone)
