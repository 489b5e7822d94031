"""Whatever is sent comes back bit for bit; whatever else arrives is a `WireError`."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import protocol.codec
from protocol.codec import DTYPES, MAX_DIMS, SCHEMA, decode_group, decode_ticket, encode_group, encode_ticket
from protocol.errors import WireError
from protocol.groups import Group
from protocol.tickets import Ticket

Fields = dict[bytes, bytes]

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
naturals = st.integers(0, 2**63 - 1)
tickets = st.builds(
    Ticket,
    ticket_id=texts,
    round=naturals,
    index=naturals,
    prompt=texts,
    source=naturals,
    row=naturals,
    seeds_G=st.lists(naturals, min_size=1, max_size=9).map(tuple),
    version=naturals,
    weights_digest=texts,
)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    """Any bits at all in any shape: NaNs with payloads, -0.0, no elements, no dimensions."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    size_bytes = int(np.prod(shape)) * dtype.itemsize
    data = draw(st.binary(min_size=size_bytes, max_size=size_bytes))
    raw = np.frombuffer(data, np.uint8)
    return (raw % 2 if dtype.kind == "b" else raw).view(dtype).reshape(shape)


names = st.text("abcXYZ_019.:+-", min_size=1, max_size=12)
groups = st.builds(
    Group,
    ticket_id=texts,
    round=naturals,
    index=naturals,
    prompt=texts,
    version=naturals,
    weights_digest=texts,
    sampler=texts,
    fingerprint=texts,
    worker=texts,
    rollout_s=st.floats(),
    reward_s=st.floats(),
    num_images=naturals,
    num_evaluations=naturals,
    arrays=st.dictionaries(names, arrays(), max_size=3),
)


def bits(group: Group) -> dict[str, str]:
    """All of a group in a form in which equal bits are equal, NaN included."""
    found = {field.name: repr(getattr(group, field.name)) for field in dataclasses.fields(group)}
    found["arrays"] = repr(sorted((n, a.dtype.str, a.shape, a.tobytes()) for n, a in group.arrays.items()))
    return found


@given(tickets)
def test_a_ticket_comes_back_as_it_was(ticket: Ticket) -> None:
    assert decode_ticket(encode_ticket(ticket)) == ticket


@given(groups)
def test_a_group_comes_back_bit_for_bit(group: Group) -> None:
    assert bits(decode_group(encode_group(group))) == bits(group)


@pytest.mark.parametrize(
    "array",
    [
        np.array([0x7FC00001, 0xFFC12345, 0x80000000], "<u4").view("<f4"),
        np.array(-0.0),
        np.zeros((0, 3), np.float16),
        np.array(True),
        np.arange(24, dtype=np.int64).reshape(2, 3, 4).transpose(2, 0, 1)[::-1],
    ],
    ids=["NaN payloads and -0.0", "no dimensions", "no elements", "a boolean", "not contiguous"],
)
def test_unusual_arrays_come_back_bit_for_bit(make_group: Callable[..., Group], array: np.ndarray) -> None:
    group = dataclasses.replace(make_group(), arrays={"x": array})
    decoded = decode_group(encode_group(group)).array("x")
    assert (decoded.dtype, decoded.shape, decoded.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_decoded_arrays_are_read_only_contiguous_views(make_group: Callable[..., Group]) -> None:
    fields = encode_group(make_group())
    decoded = decode_group(fields).array("latents_GSCHW")
    assert decoded.flags.c_contiguous
    assert not decoded.flags.writeable
    assert np.shares_memory(decoded, np.frombuffer(fields[b"array/latents_GSCHW"], np.uint8))


def test_every_field_is_bytes_and_readable_by_other_programs(make_group: Callable[..., Group]) -> None:
    fields = encode_group(make_group(index=3))
    assert all(type(part) is bytes for item in fields.items() for part in item)
    assert (fields[b"kind"], fields[b"index"], fields[b"rollout_s"]) == (b"group", b"3", b"0.41")
    assert fields[b"array/latents_GSCHW/spec"] == b"<f4|4,6,4,8,8"
    assert fields[b"array/scored_T/spec"] == b"|b1|5"


envelope_names = st.sampled_from([b"schema", b"kind", b"checksum"])
envelope_values = st.sampled_from([str(SCHEMA).encode(), b"group", b"ticket"])
arbitrary_fields = st.dictionaries(
    st.one_of(st.binary(max_size=20), envelope_names), st.one_of(st.binary(max_size=50), envelope_values)
)


@settings(max_examples=300)
@given(arbitrary_fields)
def test_arbitrary_fields_are_a_wire_error(fields: Fields) -> None:
    for decode in (decode_ticket, decode_group):
        with pytest.raises(WireError):
            decode(fields)


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_group_is_a_wire_error_or_the_same_group(
    data: st.DataObject, make_group: Callable[..., Group]
) -> None:
    damaged = damage(data, encode_group(make_group()))
    try:
        decoded = decode_group(damaged)
    except WireError:
        return
    assert bits(decoded) == bits(make_group())


@settings(max_examples=500)
@given(data=st.data())
def test_damage_under_a_valid_checksum_is_never_anything_but_a_wire_error(
    data: st.DataObject, make_group: Callable[..., Group], make_ticket: Callable[..., Ticket]
) -> None:
    """What a sender with a bug, or with bad intent, can do to a reader: nothing worse."""
    whole, decode = data.draw(
        st.sampled_from([(encode_group(make_group()), decode_group), (encode_ticket(make_ticket()), decode_ticket)])
    )
    damaged = damage(data, whole)
    damaged[b"checksum"] = protocol.codec._checksum(damaged)
    with contextlib.suppress(WireError):
        decode(damaged)


def damage(data: st.DataObject, fields: Fields) -> Fields:
    """Flips a bit, cuts, replaces, drops, duplicates or renames one field."""
    damaged = dict(fields)
    name = data.draw(st.sampled_from(sorted(fields)))
    value = fields[name]
    position = data.draw(st.integers(0, max(0, len(value) - 1)))
    match data.draw(st.sampled_from(["flip", "cut", "replace", "drop", "duplicate", "rename"])):
        case "flip":
            bit = 1 << data.draw(st.integers(0, 7))
            damaged[name] = value[:position] + bytes([value[position] ^ bit]) + value[position + 1 :]
        case "cut":
            damaged[name] = value[:position]
        case "replace":
            damaged[name] = data.draw(st.one_of(st.binary(max_size=40), st.from_regex(rb"<f4\|[\d,-]*")))
        case "drop":
            del damaged[name]
        case "duplicate":
            damaged[data.draw(st.sampled_from(sorted(fields)))] = value
        case "rename":
            damaged[data.draw(st.one_of(st.binary(max_size=8), st.just(name + b"/spec")))] = damaged.pop(name)
    return damaged


def resealed(fields: Fields, **changes: bytes) -> Fields:
    changed = fields | {name.replace("__", "/").encode(): value for name, value in changes.items()}
    return changed | {b"checksum": protocol.codec._checksum(changed)}


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("schema", b"1", "wrong schema"),
        ("schema", b"9", "wrong schema"),
        ("kind", b"ticket", "wrong kind"),
        ("round", b"-1", "round is not a whole number"),
        ("round", b"007", "round is not a whole number"),
        ("round", "٣".encode(), "round is not a whole number"),
        ("round", b"9" * 5000, "round is not a whole number"),
        ("rollout_s", b"0.410", "rollout_s is not a number"),
        ("rollout_s", b"1_0.0", "rollout_s is not a number"),
        ("num_images", b"8.0", "num_images is not a whole number"),
        ("prompt", b"\xff\xfe", "prompt is not UTF-8"),
        ("novelty", b"1", "unknown fields"),
        ("array__extra", b"1234", "lacks fields"),
        ("array__a__b__spec", b"<f4|1", "lacks fields"),
        ("array__reward_G__spec", b"|O8|4", "unknown form"),
        ("array__reward_G__spec", b">f4|4", "unknown form"),
        ("array__reward_G__spec", b"<f4|5", "do not fill its shape"),
        ("array__reward_G__spec", b"<f4|-4", "unknown form"),
        ("array__reward_G__spec", b"<f4|4,", "a dimension of array reward_G is not a whole number"),
        ("array__reward_G__spec", b"<f4|" + b"1," * MAX_DIMS + b"4", "absurd shape"),
        ("array__reward_G__spec", b"<f4|0,4611686018427387904,4611686018427387904", "absurd shape"),
        ("array__scored_T", b"\x01\x01\x00\x02\x01", "neither 0 nor 1"),
    ],
)
def test_a_defect_is_named(make_group: Callable[..., Group], field: str, value: bytes, reason: str) -> None:
    with pytest.raises(WireError, match=reason):
        decode_group(resealed(encode_group(make_group()), **{field: value}))


def test_a_corrupted_byte_is_caught_by_the_checksum(make_group: Callable[..., Group]) -> None:
    fields = encode_group(make_group())
    fields[b"prompt"] = fields[b"prompt"].swapcase()
    with pytest.raises(WireError, match="checksum"):
        decode_group(fields)


@pytest.mark.parametrize("seeds", [b"", b"1234567", b"\xff" * 8])
def test_seeds_that_are_no_seeds_are_refused(make_ticket: Callable[..., Ticket], seeds: bytes) -> None:
    with pytest.raises(WireError, match="seeds"):
        decode_ticket(resealed(encode_ticket(make_ticket()), seeds_G=seeds))


@pytest.mark.parametrize("field", ["source", "row"])
def test_what_a_ticket_starts_from_is_a_number(make_ticket: Callable[..., Ticket], field: str) -> None:
    fields = encode_ticket(make_ticket(index=2))
    assert fields[field.encode()] == str(getattr(make_ticket(index=2), field)).encode()
    with pytest.raises(WireError, match=f"{field} is not a whole number"):
        decode_ticket(resealed(fields, **{field: b"-1"}))


def test_a_ticket_is_no_group_and_a_group_no_ticket(
    make_group: Callable[..., Group], make_ticket: Callable[..., Ticket]
) -> None:
    with pytest.raises(WireError, match="wrong kind"):
        decode_ticket(encode_group(make_group()))
    with pytest.raises(WireError, match="wrong kind"):
        decode_group(encode_ticket(make_ticket()))


def test_a_claimed_size_allocates_nothing(make_group: Callable[..., Group]) -> None:
    fields = resealed(encode_group(make_group()), array__reward_G__spec=b"<f4|60000000")
    tracemalloc.start()
    with pytest.raises(WireError):
        decode_group(fields)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 200_000


@pytest.mark.parametrize("dtype", ["c8", "O", "U3", ">f4", "<u4", "M8[s]"])
def test_other_dtypes_are_not_sent(make_group: Callable[..., Group], dtype: str) -> None:
    group = dataclasses.replace(make_group(), arrays={"x": np.zeros(2, dtype)})
    with pytest.raises(WireError, match="cannot be sent"):
        encode_group(group)


@pytest.mark.parametrize("name", ["", "a/b", "a/spec", "é", "a b", "x" * 129])
def test_ambiguous_array_names_are_not_sent(make_group: Callable[..., Group], name: str) -> None:
    with pytest.raises(WireError, match="name"):
        encode_group(dataclasses.replace(make_group(), arrays={name: np.zeros(2)}))


def test_an_oversized_group_is_neither_sent_nor_read(
    make_group: Callable[..., Group], monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = encode_group(make_group())
    monkeypatch.setattr(protocol.codec, "MAX_ENTRY_BYTES", 20_000)
    with pytest.raises(WireError, match="too large"):
        encode_group(make_group())
    with pytest.raises(WireError, match="too large"):
        decode_group(fields)


@pytest.mark.parametrize(
    "change",
    [
        *({"round": -1}, {"index": 2**63}, {"source": -1}, {"row": 2**63}),
        *({"prompt": "\ud800"}, {"seeds_G": (-1,)}, {"seeds_G": ()}),
    ],
    ids=str,
)
def test_what_could_not_be_read_back_is_not_sent(make_ticket: Callable[..., Ticket], change: dict[str, object]) -> None:
    with pytest.raises(WireError):
        encode_ticket(dataclasses.replace(make_ticket(), **change))  # type: ignore[arg-type]


def test_the_codec_cannot_execute_what_it_reads() -> None:
    tree = ast.parse(Path(protocol.codec.__file__).read_text())
    words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    words |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not words & {"pickle", "marshal", "eval", "exec", "loads", "load", "literal_eval"}
