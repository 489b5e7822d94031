"""A run's base is a model and a LoRA together, the sum that diffusers makes of the same files."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion.chain import Chain
from diffusion.families import FAMILIES
from diffusion.policy import Policy
from diffusion.starting_lora import LowRank, joined
from diffusion.weights import weights_digest
from protocol.errors import ModelError
from protocol.models import FAMILIES as PARTS
from protocol.recipe import Full, Lora, Sampler, Trainable
from protocol.starting_lora import LORA_FILE, StartingLora
from protocol.tensor_header import digest_of
from tests.loras import in_original_names, kohya_layers, networks_of, write_kohya, write_peft
from tests.models import make_tiny_model, make_tiny_xl_model

PROMPT, SEEDS = "a red seven", (5, 6)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and LoRA files of every kind."""
    folder = tmp_path_factory.mktemp("loras")
    model, xl = make_tiny_model(folder / "model"), make_tiny_xl_model(folder / "xl")
    write_kohya(folder / "kohya.safetensors", model)
    write_peft(folder / "peft", model)
    write_peft(folder / "old", model, old_names=True)
    parts = ("unet", "text_encoder", "text_encoder_2")
    write_kohya(folder / "xl.safetensors", xl, parts=parts)
    layers = kohya_layers(xl, parts=parts)
    encoders = {name: tensor for name, tensor in layers.items() if "lora_te" in name}
    save_file(encoders | in_original_names(layers), folder / "original.safetensors")
    return folder


KINDS = {
    "kohya.safetensors": "model",
    "peft": "model",
    "old": "model",
    "xl.safetensors": "xl",
    "original.safetensors": "xl",
}


def policy_with(desk: Path, name: str, *, trainable: Trainable | None = None, **options: Any) -> Policy:
    lora = StartingLora(path=str(desk / name), **{k: options.pop(k) for k in ("scale", "digest") if k in options})
    return Policy(str(desk / KINDS[name]), trainable=trainable or Lora(rank=2), seed=0, lora=lora, **options)


def plain_pipeline(model: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(model)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    return pipeline


def draw(pipeline: Any, start_GCHW: Tensor) -> Tensor:
    arguments = {"num_inference_steps": 3, "guidance_scale": 1.0, "eta": 0.0, "height": 16, "width": 16}
    return pipeline(PROMPT, num_images_per_prompt=2, latents=start_GCHW, output_type="latent", **arguments)[0]


def our_chain(policy: Policy) -> Tensor:
    return Chain(policy, Sampler(num_steps=3, eta=0.0)).sample(PROMPT, SEEDS).latents_GSCHW


@pytest.mark.parametrize(("name", "scale"), [*zip(KINDS, (1.0, -0.5, 2.0, 0.5, 1.0), strict=True)])
def test_the_base_draws_what_diffusers_draws_with_the_lora(desk: Path, name: str, scale: float) -> None:
    policy = policy_with(desk, name, scale=scale)
    ours = our_chain(policy)
    pipeline = plain_pipeline(desk / KINDS[name])
    before = draw(pipeline, ours[:, 0])
    pipeline.load_lora_weights(desk / name, adapter_name="a")
    pipeline.set_adapters("a", scale)
    after = draw(pipeline, ours[:, 0])
    assert torch.allclose(ours[:, -1], after, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(before, after, rtol=1e-2, atol=1e-2)
    with policy.reference(policy.denoiser), torch.no_grad():
        assert torch.equal(our_chain(policy), ours)


@pytest.mark.parametrize("name", ["kohya.safetensors", "peft", "original.safetensors"])
def test_an_export_holds_both_for_the_plain_base(desk: Path, name: str, tmp_path: Path) -> None:
    policy = policy_with(desk, name, scale=0.5, trainable=Lora(rank=3, alpha=5))
    before = our_chain(policy)
    generator = torch.Generator().manual_seed(3)
    for tensor in policy.trainable_state().values():
        tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))
    policy.export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]
    ours, pipeline = our_chain(policy), plain_pipeline(desk / KINDS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.load_lora_weights(tmp_path)
    assert torch.allclose(ours[:, -1], draw(pipeline, ours[:, 0]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours[:, -1], before[:, -1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["peft", "xl.safetensors"])
def test_a_run_may_start_from_an_export(desk: Path, name: str, tmp_path: Path) -> None:
    first = policy_with(desk, name)
    for tensor in first.trainable_state().values():
        tensor.add_(0.05)
    first.export(tmp_path)
    lora = StartingLora(path=str(tmp_path))
    second = Policy(str(desk / KINDS[name]), trainable=Full(form="full"), seed=0, lora=lora)
    assert torch.allclose(our_chain(second), our_chain(first), rtol=1e-4, atol=1e-4)


def test_a_full_export_holds_every_network_that_the_lora_has_changed(desk: Path, tmp_path: Path) -> None:
    policy = policy_with(desk, "xl.safetensors", trainable=Full(form="full"))
    policy.export(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"unet", "text_encoder", "text_encoder_2"}
    pipeline = plain_pipeline(desk / "xl")
    for part in ("unet", "text_encoder", "text_encoder_2"):
        setattr(pipeline, part, getattr(pipeline, part).from_pretrained(tmp_path / part))
    ours = our_chain(policy)
    assert torch.allclose(ours[:, -1], draw(pipeline, ours[:, 0]), rtol=1e-4, atol=1e-4)


def test_each_layers_own_alpha_counts(desk: Path, tmp_path: Path) -> None:
    """By hand, W + scale alpha / r up down; diffusers 0.42 has most layers' alpha for an attention layer."""
    tensors = kohya_layers(desk / "model", parts=("unet",))
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{layer}.alpha"] = torch.tensor(0.5)
    save_file(tensors, tmp_path / "own.safetensors")
    lora = StartingLora(path=str(tmp_path / "own.safetensors"), scale=2.0)
    policy = Policy(str(desk / "model"), trainable=Full(form="full"), seed=0, lora=lora)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    update = tensors[f"{layer}.lora_up.weight"] @ tensors[f"{layer}.lora_down.weight"]
    expected = networks_of(desk / "model")["unet"].state_dict()[name] + 2.0 * 0.5 / 2 * update
    assert torch.allclose(policy.denoiser.state_dict()[name], expected, rtol=1e-5, atol=1e-6)


def test_joined_layers_add_up() -> None:
    generator = torch.Generator().manual_seed(0)

    def layer(rank: int, *kernel: int) -> LowRank:
        up = torch.randn(4, rank, *(1 for _ in kernel), generator=generator)
        return LowRank(torch.randn(rank, 5, *kernel, generator=generator), up)

    one = {"unet": {"a": layer(2), "b": layer(3, 3, 3)}, "text_encoder": {"d": layer(1)}}
    other = {"unet": {"a": layer(4), "b": layer(1, 3, 3), "c": layer(2)}}
    both = joined(one, other)
    for name in ("a", "b"):
        total = one["unet"][name].update + other["unet"][name].update
        assert torch.allclose(both["unet"][name].update, total, atol=1e-6)
    assert both["unet"]["c"] is other["unet"]["c"]
    assert both["text_encoder"] == one["text_encoder"]
    assert len(both["unet"]["a"].down) == 6
    assert {name: len(each.down) for name, each in one["unet"].items()} == {"a": 2, "b": 3}


def test_in_half_precision_the_sum_is_rounded_once(desk: Path) -> None:
    exact = policy_with(desk, "kohya.safetensors", trainable=Full(form="full"))
    half = policy_with(desk, "kohya.safetensors", trainable=Full(form="full"), dtype=torch.bfloat16)
    for one, other in zip(
        (exact.denoiser, *exact.family.networks.values()), (half.denoiser, *half.family.networks.values()), strict=True
    ):
        rounded = {
            name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
            for name, tensor in one.state_dict().items()
        }
        assert weights_digest(other.state_dict()) == weights_digest(rounded)


def test_the_base_digest_is_of_the_model_the_lora_and_its_scale(desk: Path, tmp_path: Path) -> None:
    plain = Policy(str(desk / "model"), trainable=Lora(rank=2), seed=0)
    shutil.copy(desk / "kohya.safetensors", tmp_path / "same.safetensors")
    encoder = load_file(desk / "kohya.safetensors")
    next(tensor for name, tensor in encoder.items() if name.startswith("lora_te_")).mul_(2)
    save_file(encoder, tmp_path / "other.safetensors")

    def digest(file: Path, **options: Any) -> str:
        lora = StartingLora(path=str(file), **options)
        return Policy(str(desk / "model"), trainable=Lora(rank=2), seed=0, lora=lora, with_decoder=False).base_digest

    first = digest(desk / "kohya.safetensors")
    assert digest(tmp_path / "same.safetensors") == first
    others = {plain.base_digest, digest(tmp_path / "other.safetensors"), digest(desk / "kohya.safetensors", scale=0.5)}
    assert len({first, *others}) == 4


def test_another_file_than_the_recipes_is_refused(desk: Path) -> None:
    digest = digest_of(desk / "kohya.safetensors")
    policy_with(desk, "kohya.safetensors", digest=digest, with_decoder=False)
    with pytest.raises(ModelError, match=rf"is another than the recipe's.*{digest}"):
        policy_with(desk, "kohya.safetensors", digest="0" * 64)


def test_what_only_loading_can_tell_is_refused(desk: Path, tmp_path: Path) -> None:
    """Resnets of Stable Diffusion's own names, and numbers, are not in a header that can be compared."""
    layers = kohya_layers(desk / "xl", parts=("unet",))
    broken = dict(layers)
    broken[next(iter(broken))] = torch.full_like(broken[next(iter(broken))], torch.nan)
    foreign = in_original_names(layers)
    foreign["lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight"] = torch.ones(2, 99, 3, 3)
    foreign["lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight"] = torch.ones(8, 2, 1, 1)
    for tensors, told in ((broken, "not finite"), (foreign, r"does not fit.*down_blocks.0.resnets.0.conv1")):
        save_file(tensors, tmp_path / "bad.safetensors")
        with pytest.raises(ModelError, match=told):
            Policy(
                str(desk / "xl"), trainable=Lora(), seed=0, lora=StartingLora(path=str(tmp_path / "bad.safetensors"))
            )


def test_families_and_their_parts_are_known_to_the_check_before_the_start() -> None:
    assert PARTS.keys() == FAMILIES.keys()
    for name, family in FAMILIES.items():
        assert PARTS[name][0] == family.part


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_network_is_never_read_from_a_pickle(desk: Path, tmp_path: Path, part: str) -> None:
    pickled = shutil.copytree(desk / "model", tmp_path / "pickled")
    (file,) = (pickled / part).glob("*.safetensors")
    state = load_file(file)
    file.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    torch.save(state, pickled / part / name)
    with pytest.raises(ModelError, match=rf"the {part} of the base model cannot be loaded"):
        Policy(str(pickled), trainable=Lora(), seed=0)
