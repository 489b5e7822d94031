"""The cache of latents gives the bits that encoding gives, whatever happens to its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from actors.latents import LatentCache

PARTS = {"base": "9f86d081", "fingerprint": "cpu", "pixels": "16 px"}
KEYS = ("winner", "loser")
IMAGE_BYTES = 2 * 4 * 2 * 2 * 4
"""Two moments of (4, 2, 2) fp32."""


class Encoder:
    """Four channels of two moments at an eighth of the side; remembers how many images it was asked for at a time."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, images_NHWC: np.ndarray) -> tuple[Tensor, Tensor]:
        self.asked.append(len(images_NHWC))
        pixels_N3HW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 255
        small_N3HW = torch.nn.functional.avg_pool2d(pixels_N3HW, 8)
        mean_NCHW = torch.cat([small_N3HW, small_N3HW.mean(1, keepdim=True)], 1)
        return mean_NCHW, mean_NCHW.exp()


def images(seed: int = 0, number: int = 2) -> np.ndarray:
    """Random images of 16 pixels."""
    return np.random.default_rng(seed).integers(0, 256, (number, 16, 16, 3), dtype=np.uint8)


def refuse() -> np.ndarray:
    """What must not be called: nothing is missing."""
    raise AssertionError("images were loaded although all moments are cached")


@pytest.fixture
def open_cache(tmp_path: Path) -> Callable[..., LatentCache]:
    """Opens the cache of one folder, as each process does: nothing is in memory."""

    def open_(encoder: Encoder, max_memory_bytes: int = 2**20, **parts: str) -> LatentCache:
        return LatentCache(tmp_path, {**PARTS, **parts}, encoder, max_memory_bytes=max_memory_bytes)

    return open_


def files(folder: Path) -> list[Path]:
    """All files of the cache."""
    return sorted(file for file in folder.rglob("*") if file.is_file())


def test_moments_are_the_encoders_from_memory_and_from_disk(open_cache: Callable[..., LatentCache]) -> None:
    encoder = Encoder()
    expected = Encoder()(images())
    cache = open_cache(encoder)
    for found in (
        cache.moments(KEYS, images),
        cache.moments(KEYS, refuse),
        open_cache(encoder).moments(KEYS, refuse),
    ):
        assert [tensor.dtype for tensor in found] == [torch.float32, torch.float32]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert encoder.asked == [1, 1]


def test_each_image_is_encoded_by_itself_whichever_are_missing(open_cache: Callable[..., LatentCache]) -> None:
    """The bits of a batch may depend on its size."""
    encoder = Encoder()
    cache = open_cache(encoder)
    cache.moments(KEYS[1:], lambda: images()[1:])
    mean_NCHW, _ = cache.moments(KEYS, images)
    assert encoder.asked == [1, 1]
    assert torch.equal(mean_NCHW, Encoder()(images())[0])


def test_an_image_in_two_pairs_is_encoded_once(open_cache: Callable[..., LatentCache]) -> None:
    encoder = Encoder()
    cache = open_cache(encoder)
    shared, other = images(1)
    cache.moments(("a", "b"), lambda: np.stack([shared, other]))
    cache.moments(("c", "a"), lambda: np.stack([images(2)[0], shared]))
    cache.moments(("a", "a"), refuse)
    assert encoder.asked == [1, 1, 1]


@pytest.mark.parametrize("part", sorted(PARTS))
def test_nothing_is_shared_between_models_machines_or_sizes(open_cache: Callable[..., LatentCache], part: str) -> None:
    open_cache(Encoder()).moments(KEYS, images)
    encoder = Encoder()
    open_cache(encoder, **{part: "another"}).moments(KEYS, images)
    assert encoder.asked == [1, 1]


@pytest.mark.parametrize("damage", ["truncate", "empty", "header", "one bit", "another's", "no digest", "folder"])
def test_a_damaged_file_is_made_again(tmp_path: Path, open_cache: Callable[..., LatentCache], damage: str) -> None:
    expected = open_cache(Encoder()).moments(KEYS[:1], lambda: images()[:1])
    (file,) = files(tmp_path)
    data = file.read_bytes()
    if damage == "folder":
        file.parent.rename(tmp_path / "gone")
    elif damage == "another's":
        save_file({"weights": torch.zeros(3)}, file)
    elif damage == "no digest":
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    else:
        file.write_bytes(
            {
                "truncate": data[:-5],
                "empty": b"",
                "header": b"\xff" * 8 + data[8:],
                "one bit": data[:-1] + bytes([data[-1] ^ 1]),
            }[damage]
        )
    encoder = Encoder()
    again = open_cache(encoder).moments(KEYS[:1], lambda: images()[:1])
    assert encoder.asked == [1]
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert file.read_bytes() == data


def test_memory_holds_the_latest_used_up_to_its_limit(tmp_path: Path, open_cache: Callable[..., LatentCache]) -> None:
    encoder = Encoder()
    cache = open_cache(encoder, max_memory_bytes=2 * IMAGE_BYTES)
    for key in ("a", "b", "a", "c"):
        cache.moments((key,), lambda: images(number=1))
    for file in files(tmp_path):
        file.unlink()
    cache.moments(("a", "c"), refuse)
    cache.moments(("b",), lambda: images(number=1))
    assert len(encoder.asked) == 4


def test_a_cache_without_memory_reads_its_files(open_cache: Callable[..., LatentCache]) -> None:
    encoder = Encoder()
    cache = open_cache(encoder, max_memory_bytes=0)
    first = cache.moments(KEYS, images)
    assert all(torch.equal(one, other) for one, other in zip(first, cache.moments(KEYS, refuse), strict=True))
    assert encoder.asked == [1, 1]


def test_two_who_make_one_image_leave_one_whole_file(tmp_path: Path, open_cache: Callable[..., LatentCache]) -> None:
    early, late = open_cache(Encoder()), open_cache(Encoder())

    def load_while_the_other_writes() -> np.ndarray:
        early.moments(KEYS[:1], lambda: images()[:1])
        return images()[:1]

    late_mean, _ = late.moments(KEYS[:1], load_while_the_other_writes)
    assert len(files(tmp_path)) == 1
    assert torch.equal(open_cache(Encoder()).moments(KEYS[:1], refuse)[0], late_mean)
