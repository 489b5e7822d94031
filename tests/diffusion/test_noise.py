"""Draws have a key and no history: K-T12 for the noise itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.noise import initial_noise, step_noise
from protocol.tickets import Source, TicketPlan

SHAPE = (4, 3, 2)
seeds = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6)


@given(seeds, st.integers(0, 999))
def test_a_siblings_noise_does_not_depend_on_its_batch(seeds_G: list[int], step: int) -> None:
    together = step_noise(seeds_G, step, SHAPE)
    first = initial_noise(seeds_G, SHAPE, shared=False)
    for g, seed in enumerate(seeds_G):
        assert torch.equal(together[g], step_noise([seed], step, SHAPE)[0])
        assert torch.equal(first[g], initial_noise([seed], SHAPE, shared=False)[0])


@given(seeds)
def test_noise_follows_the_order_of_the_seeds(seeds_G: list[int]) -> None:
    assert torch.equal(step_noise(seeds_G[::-1], 3, SHAPE), step_noise(seeds_G, 3, SHAPE).flip(0))


def test_noise_does_not_depend_on_what_was_drawn_before() -> None:
    expected = step_noise([5, 6], 7, SHAPE)
    for step in (9, 1, 7, 3):
        step_noise([6, 8], step, SHAPE)
    torch.manual_seed(123)
    assert torch.equal(step_noise([5, 6], 7, SHAPE), expected)


def test_drawing_noise_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    initial_noise([1, 2], SHAPE, shared=False)
    step_noise([1, 2], 0, SHAPE)
    assert torch.equal(torch.get_rng_state(), state)


def test_steps_siblings_and_purposes_have_noise_of_their_own() -> None:
    draws = [initial_noise([1, 2], SHAPE, shared=False), *(step_noise([1, 2], t, SHAPE) for t in range(5))]
    rows = torch.cat(draws).flatten(1)
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_shared_initial_noise_is_the_first_siblings() -> None:
    shared = initial_noise([3, 4, 5], SHAPE, shared=True)
    assert torch.equal(shared, initial_noise([3, 3, 3], SHAPE, shared=False))


def test_noise_is_standard_normal() -> None:
    noise = step_noise(range(200), 0, (4, 8, 8)).double().flatten()
    assert noise.mean().item() == pytest.approx(0, abs=4 / len(noise) ** 0.5)
    assert noise.var().item() == pytest.approx(1, abs=4 * (2 / len(noise)) ** 0.5)
    assert (noise**4).mean().item() == pytest.approx(3, abs=4 * (96 / len(noise)) ** 0.5)


def test_the_noise_of_a_ticket_is_the_same_whatever_else_is_in_its_round() -> None:
    """Moving a ticket between ranks or actors moves nothing in it: its seeds come from its own name."""
    prompts = (Source.of_prompts(("a", "b")),)
    small, large = (TicketPlan(7, prompts, num_groups=n, group_size=4, lag=0) for n in (2, 64))
    for index in range(2):
        ours, theirs = (plan.ticket(0, index, "0" * 64).seeds_G for plan in (small, large))
        assert torch.equal(step_noise(ours, 1, SHAPE), step_noise(theirs, 1, SHAPE))
