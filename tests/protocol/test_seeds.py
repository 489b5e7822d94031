"""A seed depends on its whole key and on nothing else."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from protocol.seeds import SEED_BITS, Purpose, derive_seed

coordinates = st.lists(st.one_of(st.integers(), st.text(max_size=5)), max_size=4)


@given(st.integers(), st.sampled_from(Purpose), coordinates)
def test_a_seed_fits_a_signed_64_bit_integer(root: int, purpose: Purpose, at: list[int | str]) -> None:
    assert 0 <= derive_seed(root, purpose, *at) < 2**SEED_BITS <= 2**63


def test_seeds_are_the_same_on_every_machine_and_in_every_release() -> None:
    assert derive_seed(0, Purpose.SIBLING, "000000-0000", 0) == 4430987482766528378
    assert derive_seed(7, Purpose.STEP_NOISE, 3) == 3372017655274351674


def test_every_part_of_the_key_matters() -> None:
    keys = [(root, purpose, a, b) for root in range(5) for purpose in Purpose for a in range(5) for b in range(5)]
    assert len({derive_seed(*key) for key in keys}) == len(keys)


@given(coordinates, coordinates)
def test_different_coordinates_never_run_together(one: list[int | str], other: list[int | str]) -> None:
    def same(a: list[int | str], b: list[int | str]) -> bool:
        return [str(x) for x in a] == [str(x) for x in b]

    equal = derive_seed(1, Purpose.EVALUATION, *one) == derive_seed(1, Purpose.EVALUATION, *other)
    assert equal == same(one, other)


def test_bits_are_balanced() -> None:
    seeds = [derive_seed(1, Purpose.INITIAL_NOISE, n) for n in range(4000)]
    shares = [sum(seed >> bit & 1 for seed in seeds) / len(seeds) for bit in range(SEED_BITS)]
    # Five standard deviations of a fair coin thrown 4000 times.
    assert all(abs(share - 0.5) < 0.04 for share in shares)
