"""Groups become arrays in the order of their tickets, whatever order they came in."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.batching import RoundBatch, items_where, micro_batches, stack, stack_groups
from protocol.errors import TrainingError
from protocol.groups import Group

CPU = torch.device("cpu")
MakeGroup = Callable[..., Group]
masks = st.tuples(*[st.integers(1, 4)] * 3, st.integers(0, 2**16)).map(
    lambda drawn: torch.rand(drawn[:3], generator=torch.Generator().manual_seed(drawn[3])) < 0.4
)


def equal(one: RoundBatch, other: RoundBatch) -> bool:
    """True if two batches agree bit for bit."""
    names = ("latents_PGSCHW", "log_prob_PGT", "scored_PT", "reward_PG")
    return one.prompts == other.prompts and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)


def test_the_batch_does_not_depend_on_the_order_of_arrival(make_group: MakeGroup) -> None:
    groups = [make_group(index, round_=3) for index in range(8)]
    expected = stack_groups(groups, CPU)
    for seed in range(5):
        shuffled = random.Random(seed).sample(groups, len(groups))
        assert equal(stack_groups(shuffled, CPU), expected)


def test_each_row_is_the_group_of_its_ticket(make_group: MakeGroup) -> None:
    groups = [make_group(index) for index in (5, 2, 7)]
    batch = stack_groups(groups, CPU)
    assert [group.index for group in batch.groups] == [2, 5, 7]
    for row, group in enumerate(batch.groups):
        assert batch.prompts[row] == group.prompt
        assert np.array_equal(batch.latents_PGSCHW[row].numpy(), group.array("latents_GSCHW"))
        assert np.array_equal(batch.log_prob_PGT[row].numpy(), group.array("log_prob_GT"))
        assert np.array_equal(batch.scored_PT[row].numpy(), group.array("scored_T"))
        assert np.array_equal(batch.reward_PG[row].numpy(), group.array("reward_G"))
    assert batch.num_latent_entries == 4 * 8 * 8


def test_half_precision_latents_are_widened_exactly(make_group: MakeGroup) -> None:
    group = make_group()
    half = group.array("latents_GSCHW").astype(np.float16)
    batch = stack_groups([Group(**{**vars(group), "arrays": {**group.arrays, "latents_GSCHW": half}})], CPU)
    assert batch.latents_PGSCHW.dtype == torch.float32
    assert np.array_equal(batch.latents_PGSCHW[0].numpy(), half.astype(np.float32))
    assert batch.log_prob_PGT.dtype == torch.float64


def test_a_group_that_lacks_a_field_is_refused_with_the_fields_name(make_group: MakeGroup) -> None:
    group = make_group()
    for field in ("latents_GSCHW", "log_prob_GT", "scored_T"):
        arrays = {name: array for name, array in group.arrays.items() if name != field}
        with pytest.raises(TrainingError, match=f"lacks the field {field}"):
            stack_groups([Group(**{**vars(group), "arrays": arrays})], CPU)


def test_rewards_are_asked_for_only_where_they_are_needed(make_group: MakeGroup) -> None:
    """Self-play on trajectories has none."""
    group = make_group()
    arrays = {name: array for name, array in group.arrays.items() if name != "reward_G"}
    batch = stack_groups([Group(**{**vars(group), "arrays": arrays})], CPU)
    assert torch.equal(batch.log_prob_PGT[0], torch.from_numpy(group.array("log_prob_GT")))
    with pytest.raises(TrainingError, match="lacks the field reward_G"):
        _ = batch.reward_PG


def test_a_field_is_stacked_as_it_is_in_the_order_given(make_group: MakeGroup) -> None:
    groups = [make_group(index) for index in (5, 2)]
    for name in groups[0].arrays:
        stacked = stack(groups, name, CPU)
        assert str(stacked.dtype).removeprefix("torch.") == str(groups[0].array(name).dtype)
        assert np.array_equal(stacked.numpy(), np.stack([group.array(name) for group in groups]))


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_are_equal_and_together_the_whole(make_group: MakeGroup, num_parts: int) -> None:
    batch = stack_groups([make_group(index) for index in range(8)], CPU)
    parts = [batch.part(number, num_parts) for number in range(num_parts)]
    assert {len(part.groups) for part in parts} == {8 // num_parts}
    assert [group for part in parts for group in part.groups] == list(batch.groups)
    for name in ("latents_PGSCHW", "log_prob_PGT", "scored_PT", "reward_PG"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


@pytest.mark.parametrize("num_parts", [1, 2, 4])
def test_parts_are_cut_where_chunks_of_arrays_are(make_group: MakeGroup, num_parts: int) -> None:
    batch = stack_groups([make_group(index) for index in range(8)], CPU)
    for number, chunk in enumerate(batch.log_prob_PGT.chunk(num_parts)):
        assert torch.equal(batch.part(number, num_parts).log_prob_PGT, chunk)


@given(masks)
def test_items_are_exactly_the_true_entries_once_each(wanted_PGT: torch.Tensor) -> None:
    items = items_where(wanted_PGT)
    counted = torch.zeros(wanted_PGT.shape, dtype=torch.long)
    counted.index_put_(tuple(items.unbind(1)), torch.ones(len(items), dtype=torch.long), accumulate=True)
    assert torch.equal(counted, wanted_PGT.long())


@given(masks)
def test_items_come_by_group_then_step_then_sibling(wanted_PGT: torch.Tensor) -> None:
    keys = [(group, step, sibling) for group, sibling, step in items_where(wanted_PGT).tolist()]
    assert keys == sorted(keys)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 7, 100])
def test_micro_batches_are_as_many_on_every_rank(micro_batch_size: int) -> None:
    """Their number depends on the shape of a part and the mask of steps, never on the groups themselves."""
    scored_PGT = torch.tensor([True, True, False]).expand(4, 5, 3)
    assert len(micro_batches(items_where(scored_PGT), micro_batch_size)) == -(-40 // micro_batch_size)


@given(masks, st.integers(1, 9))
def test_micro_batches_are_together_the_items(wanted_PGT: torch.Tensor, size: int) -> None:
    """Of no items there are none: the network is never asked about nothing."""
    items = items_where(wanted_PGT)
    batches = micro_batches(items, size)
    assert all(0 < len(batch) <= size for batch in batches)
    assert torch.equal(torch.cat([items[:0], *batches]), items)
