"""The two-pass gradient against one-shot autograd on a real, tiny U-Net: K-T9, P-T7."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion.chain import Chain
from diffusion.policy import Denoiser, Policy
from learner.algorithms.metrics import Metrics
from learner.algorithms.prdp import prdp
from learner.batching import items_where
from learner.two_pass import differentiate, surrogate
from protocol.algorithms import Prdp
from protocol.recipe import Lora, Sampler

PROMPTS = ("a red seven", "a blue one")
NUM_STEPS, NUM_SIBLINGS = 4, 3


@dataclass(frozen=True)
class Problem:
    """A round of two groups of a chain whose weights have moved since they were sampled."""

    chain: Chain
    latents_PGSCHW: Tensor
    old_PGT: Tensor
    ref_PGT: Tensor
    scored_PT: Tensor
    reward_PG: Tensor

    def score(self, item_N3: Tensor, denoiser: Denoiser | None = None) -> Tensor:
        """The log-probabilities of (group, sibling, step) items, as the learner evaluates them."""
        group_N, sibling_N, step_N = item_N3.unbind(1)
        policy = self.chain.policy
        return self.chain.step(
            denoiser or policy.denoiser,
            self.latents_PGSCHW[group_N, sibling_N, step_N],
            step_N,
            policy.condition(PROMPTS)[group_N],
            next_state_NCHW=self.latents_PGSCHW[group_N, sibling_N, step_N + 1],
        ).log_prob_N

    def score_all(self, denoiser: Denoiser | None = None) -> Tensor:
        """All log-probabilities in one batch, (P, G, T)."""
        items = items_where(torch.ones_like(self.old_PGT, dtype=torch.bool))
        return torch.zeros_like(self.old_PGT).index_put(tuple(items.unbind(1)), self.score(items, denoiser))

    def loss(self, log_prob_PGT: Tensor) -> tuple[Tensor, Metrics]:
        """PRDP with a window that some steps have left."""
        return prdp(
            log_prob_PGT,
            self.old_PGT,
            self.ref_PGT,
            self.scored_PT,
            self.reward_PG,
            settings=Prdp(name="prdp", kl_weight=0.05, clip_eps=1e-4),
            num_latent_entries=self.latents_PGSCHW[0, 0, 0].numel(),
            normaliser=len(PROMPTS),
        )

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The trained parameters."""
        return [p for p in self.chain.policy.denoiser.parameters() if p.requires_grad]

    def gradient(self, backward: Callable[[], object]) -> Tensor:
        """What a backward pass, or several, leave in the trained parameters."""
        for parameter in self.parameters:
            parameter.grad = None
        backward()
        return torch.cat([p.grad.flatten().clone() for p in self.parameters])

    def one_shot(self) -> Tensor:
        """The gradient of the whole loss by autograd, all graphs at once."""
        return self.gradient(lambda: self.loss(self.score_all())[0].backward())

    def two_pass(self, wanted_PGT: Tensor, omega: Tensor, micro_batch_size: int) -> Tensor:
        """Pass B over the wanted items."""

        def backward() -> None:
            for items in items_where(wanted_PGT).split(micro_batch_size):
                surrogate(self.score, items, omega).backward()

        return self.gradient(backward)

    def omega(self) -> Tensor:
        """Pass A."""
        with torch.no_grad():
            now_PGT = self.score_all()
        return differentiate(self.loss, now_PGT)[1]


def move(policy: Policy, scale: float, seed: int) -> None:
    """Moves the trained weights, as optimizer steps would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.trainable_state().values():
        parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="module")
def problem(tiny_model: str) -> Problem:
    """Networks in fp64, so that micro-batches agree to the rounding of the fp32 kernel."""
    policy = Policy(tiny_model, trainable=Lora(rank=2, alpha=2.0), seed=0, dtype=torch.float64)
    chain = Chain(policy, Sampler(num_steps=NUM_STEPS, guidance_scale=2.0))
    move(policy, 0.05, seed=1)
    seeds = range(NUM_SIBLINGS)
    drawn = [chain.sample(prompt, [10 * n + g for g in seeds]) for n, prompt in enumerate(PROMPTS)]
    move(policy, 0.02, seed=2)
    made = functools.partial(
        Problem,
        chain,
        torch.stack([group.latents_GSCHW for group in drawn]),
        torch.stack([group.log_prob_GT for group in drawn]),
        scored_PT=torch.stack([group.scored_T for group in drawn]),
        reward_PG=torch.randn(2, NUM_SIBLINGS, generator=torch.Generator().manual_seed(3)),
    )
    unreferenced = made(torch.zeros(2, NUM_SIBLINGS, NUM_STEPS, dtype=torch.float64))
    with torch.no_grad(), policy.reference(policy.denoiser) as reference:
        return made(unreferenced.score_all(reference))


def test_some_steps_are_saturated_and_some_are_not(problem: Problem) -> None:
    """What makes the following laws worth testing."""
    saturated = problem.omega()[problem.scored_PT[:, None, :].expand_as(problem.old_PGT)] == 0
    assert saturated.any()
    assert not saturated.all()


@pytest.mark.parametrize("micro_batch_size", [1, 5, 64])
def test_two_passes_give_the_gradient_of_the_whole_loss(problem: Problem, micro_batch_size: int) -> None:
    omega = problem.omega()
    expected = problem.one_shot()
    found = problem.two_pass(omega != 0, omega, micro_batch_size)
    assert expected.norm() > 0
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_skipping_items_of_weight_zero_is_exact(problem: Problem) -> None:
    omega = problem.omega()
    everything = torch.ones_like(omega, dtype=torch.bool)
    skipped, whole = (problem.two_pass(wanted, omega, 1) for wanted in (omega != 0, everything))
    assert torch.equal(skipped, whole)


def test_an_item_of_weight_zero_adds_exactly_nothing(problem: Problem) -> None:
    """How a rank with fewer passes joins the collectives of the others."""
    filler = torch.zeros((1, 3), dtype=torch.long)
    nothing = problem.gradient(lambda: surrogate(problem.score, filler, torch.zeros_like(problem.old_PGT)).backward())
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_pass_a_returns_the_loss_and_its_gradient_without_a_graph(problem: Problem) -> None:
    with torch.no_grad():
        now_PGT = problem.score_all()
    loss, omega, metrics = differentiate(problem.loss, now_PGT)
    leaf = now_PGT.clone().requires_grad_()
    expected, _ = problem.loss(leaf)
    expected.backward()
    assert torch.equal(loss, expected.detach())
    assert torch.equal(omega, leaf.grad)
    assert not any(value.requires_grad for value in (loss, omega, now_PGT, *metrics.values()))


def test_no_gradient_flows_into_the_weights_of_the_surrogate() -> None:
    omega = torch.tensor([[[2.0, -3.0]]], requires_grad=True)
    values = torch.tensor([5.0, 7.0], requires_grad=True)
    total = surrogate(lambda _: values, torch.tensor([[0, 0, 1], [0, 0, 0]]), omega)
    total.backward()
    assert total.item() == -3 * 5 + 2 * 7
    assert values.grad.tolist() == [-3, 2]
    assert omega.grad is None
