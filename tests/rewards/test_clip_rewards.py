"""Rewards by CLIP, on small random CLIP models in transformers' layout, against transformers' own model and processor.

What is said of missing weights holds for all rewards that have any.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from protocol.errors import RewardError
from protocol.paths import ROOT
from rewards.aesthetic import Aesthetic
from rewards.clip_score import ClipScore
from rewards.contract import check_scores, probe_images
from rewards.hpsv2 import Hpsv2
from rewards.image_reward import ImageReward
from rewards.loading import build, declared
from rewards.pick_score import PickScore
from rewards.pretrained import clip_pixels, even_half, lower_half
from tests.rewards.hub_cache import add_repository

TOKENIZER = ROOT / "assets" / "digits-base" / "tokenizer"
SIZE = 24
LENGTH = 16
PROMPTS = ["a red seven on a blue ground", "a cat", f"{'many words ' * 20}", "a cat", ""]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two layers a tower and 768 features, as ViT-L/14 has."""
    folder = tmp_path_factory.mktemp("clip") / "model"
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config={**small, **ends, "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH},
                vision_config={**small, "image_size": SIZE, "patch_size": 8},
                projection_dim=768,
                logit_scale_init_value=3.0,
            )
        )
        # Tell images and prompts apart by more than rounding: the usual start makes them all but equal.
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def head() -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of sac+logos+ava1-l14-linearMSE.pth."""
    shapes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    generator = torch.Generator().manual_seed(1)
    weights = {}
    for number, (out, into) in shapes.items():
        weights[f"layers.{number}.weight"] = torch.randn(out, into, generator=generator) * into**-0.5
        weights[f"layers.{number}.bias"] = torch.randn(out, generator=generator)
    return weights


@pytest.fixture
def head_file(head: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    """The head's weights, as torch saves them."""
    file = tmp_path / "head" / "aesthetic-model.pth"
    file.parent.mkdir()
    torch.save(head, file)
    return file


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HOME of a machine without a network, at first with nothing in its cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    return tmp_path / "hf"


def images_of(count: int, height: int, width: int) -> np.ndarray:
    """Images of any shape, smooth to noisy."""
    return np.ascontiguousarray(probe_images(count, max(height, width))[:, :height, :width])


def transformers_says(folder: Path, images: np.ndarray, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines (N,) and image embeddings (N, 768) of unit length by CLIPModel's own forward."""
    square = {"height": SIZE, "width": SIZE}
    processor = CLIPProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=square), CLIPTokenizer.from_pretrained(folder)
    )
    model = CLIPModel.from_pretrained(folder).eval()
    batch = processor(
        text=prompts,
        images=[Image.fromarray(image) for image in images],
        padding=True,
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    with torch.no_grad():
        out = model(**batch)
    return out.logits_per_image.diagonal() / model.logit_scale.exp().detach(), out.image_embeds


@pytest.mark.parametrize(
    ("height", "width"), [(24, 24), (96, 96), (13, 13), (40, 24), (24, 41), (61, 37), (37, 64), (200, 31)]
)
def test_images_are_prepared_as_by_transformers_pillow_processor_to_the_last_bit(height: int, width: int) -> None:
    images = images_of(2, height, width)
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    expected = processor([Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(clip_pixels(images, SIZE), expected)


def test_a_crop_begins_where_transformers_or_where_torchvision_begins_it() -> None:
    assert [lower_half(excess) for excess in range(8)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [even_half(excess) for excess in range(8)] == [0, 0, 1, 2, 2, 2, 3, 4]
    images = images_of(1, SIZE, SIZE + 3)
    cut = clip_pixels(np.ascontiguousarray(images[:, :, 2 : SIZE + 2]), SIZE)
    assert torch.equal(clip_pixels(images, SIZE, even_half), cut)


@pytest.mark.parametrize(("height", "width"), [(24, 24), (61, 37)])
def test_pick_score_is_the_scaled_cosine_of_transformers_own_forward(
    clip_folder: Path, height: int, width: int
) -> None:
    images = images_of(5, height, width)
    scores = PickScore(str(clip_folder), str(clip_folder))(images, PROMPTS)
    cosines, _ = transformers_says(clip_folder, images, PROMPTS)
    assert scores == pytest.approx((np.exp(3.0) * cosines).numpy(), abs=1e-4)
    assert np.ptp(scores) > 0.5, "scores that are all the same would prove nothing"


def test_clip_score_is_two_and_a_half_times_the_cosine_where_that_is_positive(clip_folder: Path) -> None:
    images = images_of(5, 32, 32)
    cosines = transformers_says(clip_folder, images, PROMPTS)[0].numpy()
    assert ClipScore(str(clip_folder), plain=True)(images, PROMPTS) == pytest.approx(cosines, abs=1e-5)
    scores = ClipScore(str(clip_folder))(images, PROMPTS)
    assert scores == pytest.approx(2.5 * np.clip(cosines, 0, None), abs=1e-5)
    assert cosines.min() < 0 < cosines.max()
    assert scores.min() == 0


def test_an_aesthetic_score_is_the_published_layers_one_after_the_other_on_clips_unit_embedding(
    clip_folder: Path, head: dict[str, torch.Tensor], head_file: Path
) -> None:
    images = images_of(4, 32, 32)
    _, features = transformers_says(clip_folder, images, ["any"] * 4)
    for number in (0, 2, 4, 6, 7):
        features = features @ head[f"layers.{number}.weight"].T + head[f"layers.{number}.bias"]
    scores = Aesthetic(str(clip_folder), str(head_file))(images, ["any"] * 4)
    assert scores == pytest.approx(features[:, 0].numpy(), abs=1e-4)
    assert np.ptp(scores) > 0.01


def test_an_aesthetic_score_is_of_the_crop_that_openais_code_makes(clip_folder: Path, head_file: Path) -> None:
    aesthetic = Aesthetic(str(clip_folder), str(head_file))
    images = images_of(2, SIZE, SIZE + 3)
    middle = np.ascontiguousarray(images[:, :, 2 : SIZE + 2])
    assert np.array_equal(aesthetic(images, ["", ""]), aesthetic(middle, ["", ""]))


def test_the_aesthetic_head_is_read_from_a_file_a_folder_and_safetensors(
    clip_folder: Path, head: dict[str, torch.Tensor], head_file: Path, tmp_path: Path
) -> None:
    save_file(head, tmp_path / "head.safetensors")
    images = images_of(2, 32, 32)
    forms = (head_file, head_file.parent, tmp_path / "head.safetensors")
    file, folder, safe = (Aesthetic(str(clip_folder), str(form))(images, ["", ""]) for form in forms)
    assert np.array_equal(file, folder)
    assert np.array_equal(file, safe)


def rewards_of(clip_folder: Path, head_file: Path, **kwargs: Any) -> list[Any]:
    """The three rewards, built as a run builds them."""
    model = {"model": str(clip_folder), **kwargs}
    return [
        build("pick_score", {**model, "tokenizer": str(clip_folder)}),
        build("clip_score", {**model, "plain": True}),
        build("aesthetic", {**model, "head": str(head_file)}),
    ]


def test_a_score_depends_on_its_own_image_and_prompt_only_and_comes_again(clip_folder: Path, head_file: Path) -> None:
    images = images_of(5, 32, 32)
    for reward in rewards_of(clip_folder, head_file):
        together = check_scores("reward", reward(images, PROMPTS), PROMPTS)
        alone = [reward(images[n : n + 1], [prompt])[0] for n, prompt in enumerate(PROMPTS)]
        assert together == pytest.approx(alone, abs=1e-4)
        assert np.array_equal(together, reward(images, PROMPTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_scores_of_a_smaller_dtype_are_near_those_in_float32(clip_folder: Path, head_file: Path, dtype: str) -> None:
    images = images_of(5, 32, 32)
    exact = rewards_of(clip_folder, head_file)
    rough = rewards_of(clip_folder, head_file, dtype=dtype)
    for one, other, scale in zip(exact, rough, (20.0, 1.0, 1.0), strict=True):
        assert one(images, PROMPTS) == pytest.approx(other(images, PROMPTS), abs=0.05 * scale)


def test_an_unknown_dtype_is_refused(clip_folder: Path) -> None:
    with pytest.raises(RewardError, match=r"pick_score does not know this dtype.*'half'.*float32"):
        PickScore(str(clip_folder), dtype="half")


def test_models_are_found_in_the_hubs_cache_by_their_usual_names(hub: Path, clip_folder: Path, head_file: Path) -> None:
    tokenizer = {file.name: file.read_bytes() for file in clip_folder.glob("*token*.json")}
    model = {name: (clip_folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    add_repository(hub, "yuvalkirstain/PickScore_v1", model)
    add_repository(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", tokenizer)
    add_repository(hub, "openai/clip-vit-large-patch14", model | tokenizer)
    add_repository(hub, "trl-lib/ddpo-aesthetic-predictor", {"aesthetic-model.pth": head_file.read_bytes()})
    images = images_of(2, 32, 32)
    for reward, same in zip(
        (PickScore(), ClipScore(plain=True), Aesthetic()), rewards_of(clip_folder, head_file), strict=True
    ):
        assert np.array_equal(reward(images, ["p", "q"]), same(images, ["p", "q"]))


@pytest.mark.parametrize(
    ("name", "file", "size"),
    [
        ("pick_score", "yuvalkirstain/PickScore_v1 config.json model.safetensors", "3.9 GB"),
        ("clip_score", "openai/clip-vit-large-patch14 config.json model.safetensors", "1.7 GB"),
        ("aesthetic", "trl-lib/ddpo-aesthetic-predictor aesthetic-model.pth", "4 MB"),
        ("image_reward", "THUDM/ImageReward ImageReward.pt", "1.8 GB"),
        ("hpsv2", "xswu/HPSv2 HPS_v2.1_compressed.pt", "2 GB"),
    ],
)
def test_where_weights_are_missing_it_is_said_which_how_large_and_how_to_fetch_them(
    hub: Path, name: str, file: str, size: str
) -> None:
    with pytest.raises(RewardError) as refused:
        build(name, {})
    assert f"`hf download {file}` ({size})" in str(refused.value)
    assert file.split()[0] in declared(name).downloads
    assert size in declared(name).downloads


@pytest.mark.parametrize(
    "kwargs", [{"model": "./nowhere"}, {"model": "{empty}"}, {"head": "./nowhere.pth"}, {"head": "{empty}"}]
)
def test_a_folder_without_the_files_is_named(
    hub: Path, clip_folder: Path, head_file: Path, tmp_path: Path, kwargs: dict[str, str]
) -> None:
    (tmp_path / "empty").mkdir()
    wrong = {name: value.format(empty=tmp_path / "empty") for name, value in kwargs.items()}
    with pytest.raises(RewardError, match="reward aesthetic finds no ") as refused:
        Aesthetic(**{"model": str(clip_folder), "head": str(head_file), **wrong})
    assert repr(*wrong.values()) in str(refused.value)
    assert "hf download" not in str(refused.value), "that would fetch nothing"


def test_a_clip_model_that_lacks_a_part_is_refused_and_not_filled_up_at_random(
    clip_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    shutil.copytree(clip_folder, tmp_path / "torn")
    tensors = load_file(tmp_path / "torn" / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RewardError, match=r"lacks 1 tensors.*visual_projection\.weight"):
        ClipScore(str(tmp_path / "torn"))


@pytest.mark.parametrize("tokenizer", ["laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "./nowhere", "{empty}"])
def test_a_tokenizer_without_its_vocabulary_is_refused_where_transformers_makes_an_empty_one(
    hub: Path, clip_folder: Path, tmp_path: Path, tokenizer: str
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match=r"finds no vocab\.json merges\.txt .* of .*3 MB"):
        PickScore(str(clip_folder), tokenizer.format(empty=tmp_path / "empty"))


def test_a_head_of_another_model_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    torch.save({"layers.0.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(RewardError, match="are of another model"):
        Aesthetic(str(clip_folder), str(tmp_path / "other.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(RewardError, match="finds no tensors by name"):
        Aesthetic(str(clip_folder), str(tmp_path / "list.pth"))


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_code_in_a_weights_file_is_not_run(clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.weight": _Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(RewardError, match=r"cannot read the weights.*UnpicklingError"):
        Aesthetic(str(clip_folder), str(tmp_path / "bomb.pth"))
    assert not (tmp_path / "exploded").exists()


def test_hpsv2_and_image_reward_refuse_what_they_do_not_know_before_they_load_anything() -> None:
    with pytest.raises(RewardError, match=r"does not know this version.*'v3'.*v2\.0.*v2\.1"):
        Hpsv2("v3")
    with pytest.raises(RewardError, match="does not know this dtype"):
        ImageReward(dtype="int8")
