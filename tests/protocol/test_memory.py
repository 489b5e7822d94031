"""The estimate at the size of real models: their configurations, and files that have a header and no weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn

from protocol.errors import ModelError
from protocol.memory import (
    BUCKET_ENTRIES,
    PROCESS_BYTES,
    Process,
    estimate,
    memory_numbers,
    num_trained,
)
from protocol.model_files import read_model_files
from protocol.recipe import Recipe
from protocol.recipe_file import parse_recipe

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def write_header(file: Path, network: nn.Module) -> None:
    """Writes a safetensors file of a network's shapes whose data is a hole: it takes no room on the disk."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)


def write_part(folder: Path, network: Any, name: str = "diffusion_pytorch_model.safetensors") -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(network.config)))
    write_header(folder / name, network)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stable Diffusion 1.5's U-Net and autoencoder, and a text encoder of its size."""
    folder = tmp_path_factory.mktemp("sd15")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with torch.device("meta"):
        write_part(folder / "unet", UNet2DConditionModel(**SD15))
        sides = (128, 256, 512, 512)
        kinds = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        write_part(folder / "vae", AutoencoderKL(block_out_channels=sides, layers_per_block=2, **kinds))
        text = nn.Linear(123_060_480 // 768, 768, bias=False)
    (folder / "text_encoder").mkdir()
    write_header(folder / "text_encoder" / "model.safetensors", text)
    (folder / "text_encoder" / "config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    return folder


def recipe_of(model: Path, *, form: str = "lora", **changes: Any) -> Recipe:
    learner = {"num_gpus": 1, "micro_batch_size": 4, **changes.pop("learner", {})}
    document = {
        "rounds": 2,
        "model": {"path": str(model), "trainable": {"form": form}},
        "batch": {"num_groups": 8, "group_size": 4},
        "prompts": {"train": "assets/prompts_few.txt"},
        "rewards": [{"name": "jpeg_compressibility"}],
        "algorithm": {"name": "prdp", "kl_weight": 1.0, "clip_eps": 1e-4},
        "learner": learner,
        "rollout_worker": {"num_gpus": 1},
        **changes,
    }
    return parse_recipe(document, source="test")


def processes(recipe: Recipe) -> list[Process]:
    found = estimate(recipe)
    assert found is not None
    return found


def held(process: Process) -> dict[str, int]:
    return {item.name: item.size_bytes for item in process.items}


def learner_of(model: Path, form: str, **learner: Any) -> dict[str, int]:
    return held(processes(recipe_of(model, form=form, learner=learner))[0])


def test_parameters_are_counted_from_headers(sd15: Path) -> None:
    files = read_model_files(str(sd15))
    assert files is not None
    assert files.num_denoiser == 859_520_964
    assert files.num_vae == 83_653_863
    assert files.num_text == 123_060_480


def test_an_adapters_parameters_are_those_that_peft_makes(sd15: Path) -> None:
    from peft import LoraConfig

    recipe = recipe_of(sd15)
    files = read_model_files(str(sd15))
    assert files is not None
    with torch.device("meta"):
        network = UNet2DConditionModel(**SD15).requires_grad_(False)
        network.add_adapter(LoraConfig(r=8, target_modules=list(recipe.model.trainable.targets)), "own")  # type: ignore[union-attr]
    assert num_trained(recipe, files) == sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_a_rank_of_adapters_in_bf16_has_two_bytes_a_weight(sd15: Path) -> None:
    rank = learner_of(sd15, "lora", precision="bf16")
    files, recipe = read_model_files(str(sd15)), recipe_of(sd15)
    assert files is not None
    assert rank["the denoiser's weights"] == 2 * (files.num_denoiser + num_trained(recipe, files))
    assert "the frozen reference" not in rank


OF_ADAMW = ("the denoiser's weights", "fp32 masters", "AdamW's moments", "gradients", "fp32 sums of gradients")


@pytest.mark.parametrize(
    ("stage", "world_size", "bytes_a_parameter"),
    [(0, 1, 16), (0, 4, 16), (1, 1, 24), (2, 4, 4 + 4 + (4 + 8 + 4) / 4), (2, 8, 4 + 4 + (4 + 8 + 4) / 8)],
)
def test_full_fine_tuning_in_fp32_is_adamws_sixteen_bytes_and_shards(
    sd15: Path, stage: int, world_size: int, bytes_a_parameter: float
) -> None:
    rank = learner_of(sd15, "full", zero_stage=stage, world_size=world_size)
    total = sum(rank.get(name, 0) for name in OF_ADAMW)
    assert total == pytest.approx(bytes_a_parameter * 859_520_964, rel=1e-6)
    assert rank["the frozen reference"] == 4 * 859_520_964


def test_offloading_moves_the_optimizer_into_main_memory_and_keeps_its_size(sd15: Path) -> None:
    settings = {"zero_stage": 2, "world_size": 2}
    here = processes(recipe_of(sd15, form="full", learner=settings))[0]
    there = processes(recipe_of(sd15, form="full", learner={**settings, "offload_optimizer": True}))[0]
    names = {"fp32 masters", "AdamW's moments", "fp32 sums of gradients"}
    moved = sum(item.size_bytes for item in here.held("gpu") if item.name in names)
    assert moved == sum(item.size_bytes for item in there.held("host") if item.name in names)
    assert not names & {item.name for item in there.held("gpu")}
    assert moved == 16 * 859_520_964 // 2


def test_activations_grow_with_the_micro_batch_and_with_guidance_and_shrink_with_checkpointing(sd15: Path) -> None:
    def activations(guidance_scale: float, **learner: Any) -> int:
        sampler = {"guidance_scale": guidance_scale}
        rank = processes(recipe_of(sd15, learner={"precision": "bf16", **learner}, sampler=sampler))[0]
        return next(item.size_bytes for item in rank.items if item.name.startswith("activations"))

    one = activations(1.0, micro_batch_size=1)
    assert activations(1.0, micro_batch_size=8) == 8 * one
    assert activations(5.0, micro_batch_size=8) == 16 * one
    assert activations(1.0, micro_batch_size=1, gradient_checkpointing=True) < one / 3
    # Counted in diffusers' own network: every allocation of a forward and a backward pass over one latent.
    assert one == pytest.approx(893.6 * 2**20, rel=0.02)


def test_a_micro_batch_is_not_larger_than_what_a_rank_has(sd15: Path) -> None:
    whole, larger = (learner_of(sd15, "lora", micro_batch_size=size) for size in (8 * 4 * 19, 10**6))
    assert whole == larger
    assert f"activations of {8 * 4 * 19} latents" in whole


def test_deepspeeds_bucket_is_counted_on_gpus_only(sd15: Path) -> None:
    name = "DeepSpeed's bucket of gradients"
    assert learner_of(sd15, "lora", zero_stage=2)[name] == 4 * BUCKET_ENTRIES
    assert name not in learner_of(sd15, "lora", zero_stage=2, num_gpus=0)
    assert name not in learner_of(sd15, "lora", zero_stage=0)


def test_on_a_cpu_everything_is_main_memory(sd15: Path) -> None:
    on_gpu, on_cpu = (processes(recipe_of(sd15, learner={"num_gpus": number}))[0] for number in (1, 0))
    assert on_cpu.size_bytes("gpu") == 0
    assert on_cpu.size_bytes("host") == on_gpu.size_bytes("gpu") + on_gpu.size_bytes("host")
    assert on_gpu.size_bytes("host") > PROCESS_BYTES


def test_a_rounds_latents_are_counted_a_rank(sd15: Path) -> None:
    two, one = (learner_of(sd15, "lora", world_size=size) for size in (2, 1))
    entries = math.prod((4, 64, 64))
    assert one["the round's latents"] == pytest.approx(8 * 4 * 21 * entries * 4, rel=0.001)
    assert two["the round's latents"] == one["the round's latents"] // 2


def test_a_model_that_is_not_on_disk_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    recipe = recipe_of(Path("nobody/no-such-model-here"))
    assert estimate(recipe) is None
    assert memory_numbers(recipe) == {"memory": "known once nobody/no-such-model-here is on disk"}


def test_a_model_in_several_files_is_counted_whole(sd15: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "model_index.json"):
        (tmp_path / part).symlink_to(sd15 / part)
    unet = tmp_path / "unet"
    unet.mkdir()
    (unet / "config.json").write_text((sd15 / "unet" / "config.json").read_text())
    first, second = nn.Linear(3, 5), nn.Linear(7, 2, bias=False)
    write_header(unet / "a.safetensors", nn.ModuleDict({"first": first}))
    write_header(unet / "b.safetensors", nn.ModuleDict({"second": second}))
    weight_map = {"first.weight": "a.safetensors", "first.bias": "a.safetensors", "second.weight": "b.safetensors"}
    index = {"weight_map": weight_map}
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    files = read_model_files(str(tmp_path))
    assert files is not None
    assert files.num_denoiser == 3 * 5 + 5 + 7 * 2


def test_a_resolution_scales_what_is_made_of_images(sd15: Path) -> None:
    def at(side: int | None) -> Recipe:
        recipe = recipe_of(sd15)
        return recipe.model_copy(update={"model": recipe.model.model_copy(update={"resolution": side})})

    usual, small = (processes(at(side)) for side in (None, 256))
    activations = [held(found[0])["activations of 4 latents"] for found in (usual, small)]
    assert activations[0] / activations[1] == pytest.approx(4, rel=0.1)
    with pytest.raises(ModelError, match="a multiple of 64"):
        estimate(at(260))


def test_an_average_and_moments_of_8_bits_are_counted(sd15: Path) -> None:
    trained = 859_520_964
    plain, small = (
        learner_of(sd15, "full", zero_stage=1, **settings) for settings in ({}, {"optimizer": "adamw_8bit"})
    )
    assert plain["AdamW's moments"] == 8 * trained
    assert small["AdamW's moments"] == 2 * trained
    averaged = learner_of(sd15, "full", zero_stage=1, world_size=2, ema={"decay": 0.99})
    assert averaged["the moving average"] == 4 * trained // 2


def test_offloaded_parameters_wait_in_main_memory(sd15: Path) -> None:
    recipe = recipe_of(sd15, form="full", learner={"zero_stage": 3, "offload_parameters": True})
    places = {item.name: item.place for item in processes(recipe)[0].items}
    assert places["the denoiser's weights, this rank's part"] == "host"
    assert places["weights while they are used"] == "device"


def test_a_rank_that_samples_too_holds_less_than_a_rank_and_a_rollout_together(sd15: Path) -> None:
    apart, alone = processes(recipe_of(sd15)), processes(recipe_of(sd15, rollouts=0))
    assert [process.role for process in alone] == ["a learner rank", "beside them"]
    rank, rollout, both = apart[0].size_bytes("gpu"), apart[1].size_bytes("gpu"), alone[0].size_bytes("gpu")
    assert rank < both <= rank + rollout - held(apart[0])["the denoiser's weights"]
    assert held(alone[0])["autoencoder"] == held(apart[1])["autoencoder"]
    aside = held(alone[0])["text encoders and autoencoder, set aside"]
    assert aside == held(alone[0])["autoencoder"] + held(alone[0])["text encoders"]
    helped = processes(recipe_of(sd15, rollouts={"min": 0, "max": 2}))
    assert [(process.role, process.count) for process in helped[:2]] == [("a learner rank", 1), ("a rollout actor", 0)]


def test_only_what_learning_has_on_the_gpu_makes_room_for_sampling_there(sd15: Path) -> None:
    settings = {"precision": "bf16", "zero_stage": 2, "micro_batch_size": 1, "gradient_checkpointing": True}
    drawn = next(name for name in held(processes(recipe_of(sd15, form="full"))[1]) if name.startswith("sampling"))
    on_gpu, offloaded = (
        held(processes(recipe_of(sd15, form="full", rollouts=0, learner={**settings, "offload_optimizer": offload}))[0])
        for offload in (False, True)
    )
    assert on_gpu.get(drawn, 0) < offloaded[drawn]
