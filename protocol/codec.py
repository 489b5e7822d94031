"""Tickets and groups as the flat named fields of one Redis entry, and back.

    schema    a number, the same in every entry that this version of the code can read
    kind      `ticket` or `group`
    <name>    text as UTF-8, whole numbers in decimal, seconds as Python's repr of a float
    seeds_G   little-endian int64 bytes
    array/<name>, array/<name>/spec    the bytes of one tensor, and its dtype and shape: `<f4|8,11,4,8,8`
    checksum  SHA-256 over all other fields, sorted and length-prefixed

Nothing is ever unpickled, and every number has one spelling. Whatever arrives, decoding returns a whole value
or raises `WireError` with the reason: a claimed size is compared with the bytes that are there before it is
used. Decoded arrays are read-only views of the entry's own bytes; copy one before writing to it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from protocol.errors import WireError
from protocol.groups import Group
from protocol.tickets import Ticket

Fields = Mapping[bytes, bytes]

SCHEMA = 3
MAX_ENTRY_BYTES = 256 * 1024**2
"""Redis breaks the connection at fields over 512 MiB; an SDXL group of 8 siblings and 50 steps is 52 MB."""

DTYPES = ("<f2", "<f4", "<f8", "<i4", "<i8", "|u1", "|b1")
MAX_DIMS = 8
MAX_WHOLE_NUMBER = 2**63 - 1

_ARRAY_NAME = re.compile(r"[A-Za-z0-9_.:+-]{1,128}")
_ENVELOPE = ("schema", "kind", "checksum")
_TICKET_FIELDS = ("ticket_id", "round", "index", "prompt", "source", "row", "seeds_G", "version", "weights_digest")
_GROUP_FIELDS = (
    *("ticket_id", "round", "index", "prompt", "version", "weights_digest"),
    *("sampler", "fingerprint", "worker", "rollout_s", "reward_s", "num_images", "num_evaluations"),
)


def encode_ticket(ticket: Ticket) -> dict[bytes, bytes]:
    """Returns the fields of a ticket, or raises `WireError` if they could not be read back."""
    return _seal(
        "ticket",
        {
            b"ticket_id": _text_bytes("ticket_id", ticket.ticket_id),
            b"round": _number_bytes("round", ticket.round),
            b"index": _number_bytes("index", ticket.index),
            b"prompt": _text_bytes("prompt", ticket.prompt),
            b"source": _number_bytes("source", ticket.source),
            b"row": _number_bytes("row", ticket.row),
            b"seeds_G": _seed_bytes(ticket.seeds_G),
            b"version": _number_bytes("version", ticket.version),
            b"weights_digest": _text_bytes("weights_digest", ticket.weights_digest),
        },
    )


def decode_ticket(fields: Fields) -> Ticket:
    """Returns the ticket in an entry, or raises `WireError`."""
    _check_envelope("ticket", fields)
    _check_names(fields, _TICKET_FIELDS)
    return Ticket(
        ticket_id=_text(fields, "ticket_id"),
        round=_number(fields, "round"),
        index=_number(fields, "index"),
        prompt=_text(fields, "prompt"),
        source=_number(fields, "source"),
        row=_number(fields, "row"),
        seeds_G=_seeds(fields[b"seeds_G"]),
        version=_number(fields, "version"),
        weights_digest=_text(fields, "weights_digest"),
    )


def encode_group(group: Group) -> dict[bytes, bytes]:
    """Returns the fields of a group, or raises `WireError` if they could not be read back."""
    _check_size(sum(array.nbytes for array in group.arrays.values()))
    fields = {
        b"ticket_id": _text_bytes("ticket_id", group.ticket_id),
        b"round": _number_bytes("round", group.round),
        b"index": _number_bytes("index", group.index),
        b"prompt": _text_bytes("prompt", group.prompt),
        b"version": _number_bytes("version", group.version),
        b"weights_digest": _text_bytes("weights_digest", group.weights_digest),
        b"sampler": _text_bytes("sampler", group.sampler),
        b"fingerprint": _text_bytes("fingerprint", group.fingerprint),
        b"worker": _text_bytes("worker", group.worker),
        b"rollout_s": repr(float(group.rollout_s)).encode(),
        b"reward_s": repr(float(group.reward_s)).encode(),
        b"num_images": _number_bytes("num_images", group.num_images),
        b"num_evaluations": _number_bytes("num_evaluations", group.num_evaluations),
    }
    for name, array in group.arrays.items():
        fields |= _array_fields(name, array)
    return _seal("group", fields)


def decode_group(fields: Fields) -> Group:
    """Returns the group in an entry, its arrays being read-only views, or raises `WireError`."""
    _check_envelope("group", fields)
    names = _array_names(fields)
    _check_names(fields, (*_GROUP_FIELDS, *(f"array/{n}" for n in names), *(f"array/{n}/spec" for n in names)))
    return Group(
        ticket_id=_text(fields, "ticket_id"),
        round=_number(fields, "round"),
        index=_number(fields, "index"),
        prompt=_text(fields, "prompt"),
        version=_number(fields, "version"),
        weights_digest=_text(fields, "weights_digest"),
        sampler=_text(fields, "sampler"),
        fingerprint=_text(fields, "fingerprint"),
        worker=_text(fields, "worker"),
        rollout_s=_seconds(fields, "rollout_s"),
        reward_s=_seconds(fields, "reward_s"),
        num_images=_number(fields, "num_images"),
        num_evaluations=_number(fields, "num_evaluations"),
        arrays={name: _array(fields, name) for name in names},
    )


def _seal(kind: str, fields: dict[bytes, bytes]) -> dict[bytes, bytes]:
    fields |= {b"schema": str(SCHEMA).encode(), b"kind": kind.encode()}
    fields[b"checksum"] = _checksum(fields)
    _check_size(_size_bytes(fields))
    return fields


def _checksum(fields: Fields) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(fields):
        if name != b"checksum":
            for part in (name, fields[name]):
                digest.update(len(part).to_bytes(8, "little"))
                digest.update(part)
    return digest.hexdigest().encode()


def _check_envelope(kind: str, fields: Fields) -> None:
    """Checks in the order that gives the most telling reason: a newer schema is not a corrupted entry."""
    _check_size(_size_bytes(fields))
    missing = [name for name in _ENVELOPE if name.encode() not in fields]
    if missing:
        raise WireError("an entry lacks fields", value=missing, expected=f"a {kind} of schema {SCHEMA}")
    for name, expected in (("schema", str(SCHEMA)), ("kind", kind)):
        if fields[name.encode()] != expected.encode():
            raise WireError(f"wrong {name}", value=_clip(fields[name.encode()]), expected=expected)
    if fields[b"checksum"] != _checksum(fields):
        raise WireError("the checksum does not match: the entry was corrupted or truncated")


def _check_names(fields: Fields, expected: Iterable[str]) -> None:
    wanted = {name.encode() for name in expected}
    if missing := sorted(wanted - fields.keys()):
        raise WireError("an entry lacks fields", value=missing)
    if unknown := sorted(fields.keys() - wanted - {name.encode() for name in _ENVELOPE}):
        raise WireError("an entry has unknown fields", value=[_clip(name) for name in unknown[:5]])


def _size_bytes(fields: Fields) -> int:
    return sum(len(name) + len(value) for name, value in fields.items())


def _check_size(size_bytes: int) -> None:
    if size_bytes > MAX_ENTRY_BYTES:
        raise WireError(
            "an entry is too large",
            value=f"{size_bytes} bytes",
            expected=f"at most {MAX_ENTRY_BYTES}",
            do="use fewer siblings or steps, or store latents in half precision",
        )


def _text_bytes(name: str, text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise WireError(f"{name} cannot be written as UTF-8", value=text[:80]) from None


def _text(fields: Fields, name: str) -> str:
    try:
        return fields[name.encode()].decode()
    except UnicodeDecodeError:
        raise WireError(f"{name} is not UTF-8", value=_clip(fields[name.encode()])) from None


def _number_bytes(name: str, number: int) -> bytes:
    if not 0 <= number <= MAX_WHOLE_NUMBER:
        raise WireError(f"{name} is out of range", value=number, expected="a whole number below 2**63")
    return str(int(number)).encode()


def _number(fields: Fields, name: str) -> int:
    return _whole_number(fields[name.encode()], name)


def _whole_number(digits: bytes, name: str) -> int:
    number = int(digits) if digits.isdigit() and len(digits) <= 19 else -1
    if not 0 <= number <= MAX_WHOLE_NUMBER or str(number).encode() != digits:
        raise WireError(f"{name} is not a whole number", value=_clip(digits), expected="decimal, below 2**63")
    return number


def _seconds(fields: Fields, name: str) -> float:
    text = fields[name.encode()]
    try:
        seconds = float(text[:32])
    except ValueError:
        seconds = math.nan
    if repr(seconds).encode() != text:
        raise WireError(f"{name} is not a number", value=_clip(text), expected="Python's repr of a float")
    return seconds


def _seed_bytes(seeds_G: tuple[int, ...]) -> bytes:
    if not seeds_G or not all(0 <= seed <= MAX_WHOLE_NUMBER for seed in seeds_G):
        raise WireError("a ticket needs seeds in [0, 2**63)", value=seeds_G[:8])
    return np.array(seeds_G, dtype="<i8").tobytes()


def _seeds(data: bytes) -> tuple[int, ...]:
    seeds = np.frombuffer(data[: len(data) // 8 * 8], dtype="<i8")
    if len(data) % 8 or not data or seeds.min() < 0:
        raise WireError("seeds_G is not a list of seeds", value=_clip(data), expected="int64 in [0, 2**63)")
    return tuple(seeds.tolist())


def _array_fields(name: str, array: np.ndarray) -> dict[bytes, bytes]:
    if not _ARRAY_NAME.fullmatch(name):
        raise WireError("an array's name cannot be sent", value=name[:200], expected=_ARRAY_NAME.pattern)
    if array.dtype.str not in DTYPES or array.ndim > MAX_DIMS:
        value = f"{array.dtype.str} with {array.ndim} dimensions"
        raise WireError(f"array {name} cannot be sent", value=value, expected=f"one of {', '.join(DTYPES)}")
    spec = f"{array.dtype.str}|{','.join(map(str, array.shape))}"
    return {f"array/{name}".encode(): array.tobytes(), f"array/{name}/spec".encode(): spec.encode()}


def _array_names(fields: Fields) -> list[str]:
    """Returns the arrays that an entry claims to hold; each must turn out to have both its fields."""
    names = {name.split(b"/")[1].decode(errors="replace") for name in fields if name.startswith(b"array/")}
    if wrong := sorted(name for name in names if not _ARRAY_NAME.fullmatch(name)):
        raise WireError("an array has an illegal name", value=wrong[0][:200], expected=_ARRAY_NAME.pattern)
    return sorted(names)


def _array(fields: Fields, name: str) -> np.ndarray:
    data, spec = fields[f"array/{name}".encode()], fields[f"array/{name}/spec".encode()]
    dtype, shape = _parse_spec(name, spec)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise WireError(f"array {name}: {len(data)} bytes do not fill its shape", value=_clip(spec))
    array = np.frombuffer(data, dtype=dtype).reshape(shape)
    if dtype.kind == "b" and (array.view("|u1") > 1).any():
        raise WireError(f"array {name} holds a boolean that is neither 0 nor 1")
    return array


def _parse_spec(name: str, spec: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    matched = re.fullmatch(rb"([<|][a-z]\d)\|([\d,]{0,128})", spec)
    if not matched or matched[1].decode() not in DTYPES:
        expected = f"dtype|shape with a dtype among {', '.join(DTYPES)}"
        raise WireError(f"array {name} has an unknown form", value=_clip(spec), expected=expected)
    dims = matched[2].split(b",") if matched[2] else []
    shape = tuple(_whole_number(dim, f"a dimension of array {name}") for dim in dims)
    # An empty array may claim any other dimensions, and numpy overflows on absurd ones.
    if len(shape) > MAX_DIMS or math.prod(filter(None, shape)) > MAX_ENTRY_BYTES:
        raise WireError(f"array {name} has an absurd shape", value=_clip(spec))
    return np.dtype(matched[1].decode()), shape


def _clip(data: bytes) -> bytes:
    return data[:80]
