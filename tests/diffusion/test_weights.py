"""Weights as bytes: what goes through the wire comes back bit for bit, and the digest tells any difference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.weights import pack, unpack, weights_digest
from protocol.errors import ModelError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)


def some_state() -> dict[str, Tensor]:
    """Weights of several dtypes and shapes, a scalar and an empty tensor among them."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn((2, 3, 4), generator=generator) * 100
    state = {f"layer.{str(dtype).removeprefix('torch.')}": numbers.to(dtype) for dtype in DTYPES}
    return {**state, "scalar": torch.tensor(0.5), "empty": torch.empty(0, 3), "special": specials()}


def specials() -> Tensor:
    """Numbers that compare unequal to themselves, or equal to others of different bits."""
    return torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45])


def bits(tensor: Tensor) -> list[int]:
    """The bytes of a tensor."""
    return list(tensor.contiguous().view(-1).view(torch.uint8).tolist())


def flip_bit(tensor: Tensor, bit: int) -> Tensor:
    """A copy with one bit of its memory inverted."""
    flipped = tensor.clone()
    flipped.view(-1).view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    return flipped


def test_unpacking_gives_back_every_name_dtype_shape_and_bit() -> None:
    state = some_state()
    arrived = unpack(pack(state))
    assert set(arrived) == set(state)
    for name, tensor in state.items():
        assert arrived[name].dtype == tensor.dtype
        assert arrived[name].shape == tensor.shape
        assert bits(arrived[name]) == bits(tensor)
    assert weights_digest(arrived) == weights_digest(state)


def test_bytes_and_digest_do_not_depend_on_the_order_of_names() -> None:
    state = some_state()
    backwards = dict(reversed(state.items()))
    assert pack(backwards) == pack(state)
    assert weights_digest(backwards) == weights_digest(state)


def test_bytes_and_digest_do_not_depend_on_strides() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    column_major = matrix.t().contiguous().t()
    assert pack({"w": column_major}) == pack({"w": matrix})
    assert weights_digest({"w": column_major}) == weights_digest({"w": matrix})


def test_parameters_that_need_gradients_are_packed_by_value() -> None:
    parameter = torch.nn.Parameter(torch.arange(3.0))
    before = pack({"w": parameter})
    digest = weights_digest({"w": parameter})
    with torch.no_grad():
        parameter.add_(1)
    assert torch.equal(unpack(before)["w"], torch.arange(3.0))
    assert weights_digest({"w": parameter}) != digest


@given(st.integers(0, 6 * 32 - 1))
def test_the_digest_changes_with_any_bit(bit: int) -> None:
    state = {"a": torch.ones(2), "w": specials()}
    assert weights_digest({**state, "w": flip_bit(state["w"], bit)}) != weights_digest(state)


def test_the_digest_changes_with_a_name_a_dtype_a_shape_or_a_missing_tensor() -> None:
    zeros = torch.zeros(4)
    variants = [
        {"w": zeros, "b": zeros},
        {"w": zeros, "c": zeros},
        {"w": zeros.view(2, 2), "b": zeros},
        {"w": zeros, "b": zeros.view(torch.int32)},
        {"w": zeros},
        {},
    ]
    assert len({weights_digest(state) for state in variants}) == len(variants)


def test_the_digest_changes_when_two_tensors_swap_names() -> None:
    first, second = torch.tensor([1.0]), torch.tensor([2.0])
    assert weights_digest({"a": first, "b": second}) != weights_digest({"a": second, "b": first})


def test_the_digest_is_64_hex_digits() -> None:
    digest = weights_digest(some_state())
    assert len(digest) == 64
    assert set(digest) <= set("0123456789abcdef")


@pytest.mark.parametrize("keep", [0, 7, 20, -1])
def test_truncated_weights_are_refused(keep: int) -> None:
    with pytest.raises(ModelError, match="weights cannot be read"):
        unpack(pack(some_state())[:keep])
