"""The policy against the base model and plain diffusers: K-T7 (guidance), K-T10 (LoRA is exactly the base)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffusion.conditioning import Conditioning
from diffusion.policy import Policy
from diffusion.weights import pack, unpack, weights_digest
from protocol.errors import ModelError
from protocol.recipe import Full, Lora, Sampler

PROMPTS = ["a red seven", "a blue one"]
Items = tuple[Tensor, Tensor, Conditioning]


def load(source: str, trainable: Lora | Full | None = None, **settings: Any) -> Policy:
    """A policy of the tiny model."""
    return Policy(source, trainable=trainable or Lora(rank=2, alpha=2.0), **{"seed": 0, **settings})


def items(policy: Policy) -> Items:
    """States, timesteps and embeddings of two items."""
    states = torch.randn(2, *policy.latent_shape_CHW, generator=torch.Generator().manual_seed(0))
    return states, torch.tensor([10, 700]), policy.condition(PROMPTS)


def train_a_little(policy: Policy) -> None:
    """Moves every trained weight, as optimizer steps would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in policy.trainable_state().values():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@torch.no_grad()
def predict(policy: Policy, guidance_scale: float = 1.0) -> Tensor:
    """The network's output on the two items."""
    return policy.predict(policy.denoiser, *items(policy), guidance_scale)


@torch.no_grad()
def predict_reference(policy: Policy, guidance_scale: float = 1.0) -> Tensor:
    """The reference's output on the two items."""
    with policy.reference(policy.denoiser) as reference:
        return policy.predict(reference, *items(policy), guidance_scale)


@torch.no_grad()
def output_of(unet: UNet2DConditionModel, at: Items) -> Tensor:
    """A plain U-Net's output."""
    states, timesteps, embeddings = at
    return unet(states, timesteps, encoder_hidden_states=embeddings.text_NLE).sample


def gradients(policy: Policy, at: Items, guidance_scale: float) -> Tensor:
    """The gradient of a fixed functional of the guided output in all trained weights."""
    output = policy.predict(policy.denoiser, *at, guidance_scale)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    parameters = [p for p in policy.denoiser.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad((weights * output).sum(), parameters)])


def test_guidance_one_is_the_conditional_branch_and_zero_the_unconditional_one(tiny_model: str) -> None:
    policy = load(tiny_model)
    states, timesteps, embeddings = items(policy)
    empty = policy.condition(["", ""])
    assert torch.equal(predict(policy, 1.0), output_of(policy.denoiser, (states, timesteps, embeddings)))
    both = output_of(
        policy.denoiser, (torch.cat([states] * 2), torch.cat([timesteps] * 2), Conditioning.cat([empty, embeddings]))
    )
    assert torch.equal(predict(policy, 0.0), both[:2])


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0, 5.0, -1.5])
def test_guided_outputs_lie_on_the_line_through_both_branches(tiny_model: str, guidance_scale: float) -> None:
    policy = load(tiny_model)
    states, timesteps, embeddings = items(policy)
    unconditional = output_of(policy.denoiser, (states, timesteps, policy.condition(["", ""])))
    conditional = output_of(policy.denoiser, (states, timesteps, embeddings))
    expected = (1 - guidance_scale) * unconditional + guidance_scale * conditional
    torch.testing.assert_close(predict(policy, guidance_scale), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0, 5.0])
def test_gradients_arrive_through_both_branches_with_their_factors(tiny_model: str, guidance_scale: float) -> None:
    policy = load(tiny_model, dtype=torch.float64)
    train_a_little(policy)
    states, timesteps, embeddings = items(policy)
    conditional = gradients(policy, (states, timesteps, embeddings), 1.0)
    unconditional = gradients(policy, (states, timesteps, policy.condition(["", ""])), 1.0)
    guided = gradients(policy, (states, timesteps, embeddings), guidance_scale)
    expected = guidance_scale * conditional + (1 - guidance_scale) * unconditional
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_lora_at_initialisation_is_the_base_bit_for_bit(tiny_model: str, guidance_scale: float) -> None:
    base = predict(load(tiny_model, Full(form="full")), guidance_scale)
    assert torch.equal(predict(load(tiny_model), guidance_scale), base)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_trained_lora_switched_off_is_the_base_bit_for_bit(tiny_model: str, guidance_scale: float) -> None:
    base = predict(load(tiny_model, Full(form="full")), guidance_scale)
    policy = load(tiny_model)
    train_a_little(policy)
    trained = predict(policy, guidance_scale)
    assert not torch.equal(trained, base)
    assert torch.equal(predict_reference(policy, guidance_scale), base)
    assert torch.equal(predict(policy, guidance_scale), trained)


def test_the_reference_of_a_full_policy_stays_where_it_was_kept(tiny_model: str) -> None:
    policy = load(tiny_model, Full(form="full"))
    policy.keep_reference()
    base = predict(policy)
    train_a_little(policy)
    assert not torch.equal(predict(policy), base)
    assert torch.equal(predict_reference(policy), base)


def test_after_the_reference_the_same_weights_are_trained_again(tiny_model: str) -> None:
    policy = load(tiny_model)
    before = policy.trainable_state()
    with policy.reference(policy.denoiser):
        pass
    assert policy.trainable_state().keys() == before.keys()
    assert gradients(policy, items(policy), 1.0).abs().max() > 0


def test_an_error_under_the_reference_leaves_the_adapters_on(tiny_model: str) -> None:
    policy = load(tiny_model)
    train_a_little(policy)
    trained = predict(policy)
    with pytest.raises(ZeroDivisionError), policy.reference(policy.denoiser):
        raise ZeroDivisionError
    assert torch.equal(predict(policy), trained)


def test_switching_adapters_may_be_nested(tiny_model: str) -> None:
    """A perceptual encoder of live weights is asked for features while the reference is in use."""
    policy = load(tiny_model)
    base = predict(policy)
    train_a_little(policy)
    trained = predict(policy)
    assert not torch.equal(trained, base)
    with policy.reference(policy.denoiser):
        with policy.adapters(enabled=True):
            assert torch.equal(predict(policy), trained)
            with policy.adapters(enabled=False):
                assert torch.equal(predict(policy), base)
            assert torch.equal(predict(policy), trained)
        assert torch.equal(predict(policy), base)
    assert torch.equal(predict(policy), trained)


@torch.no_grad()
def test_predicted_noise_is_the_conditional_branchs_whatever_the_network_predicts(
    tiny_model: str, tiny_velocity_model: str
) -> None:
    epsilon, velocity = load(tiny_model), load(tiny_velocity_model)
    states, timesteps, embeddings = items(epsilon)
    output = predict(epsilon)
    assert torch.equal(epsilon.predict_target(epsilon.denoiser, states, timesteps, embeddings), output)
    # v = A noise - S x0 and x = A x0 + S noise, so noise = A v + S x; the two models' networks are the same.
    alpha_bar = epsilon.alpha_bar.double()[timesteps].view(-1, 1, 1, 1)
    expected = alpha_bar.sqrt() * output + (1 - alpha_bar).sqrt() * states
    found = velocity.predict_target(velocity.denoiser, states, timesteps, embeddings)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


def test_only_the_trainable_part_takes_gradients(tiny_model: str) -> None:
    lora = load(tiny_model)
    assert all("lora" in name for name in lora.trainable_state())
    full = load(tiny_model, Full(form="full"))
    assert full.trainable_state().keys() == dict(full.denoiser.named_parameters()).keys()
    for policy in (lora, full):
        assert policy.vae is not None
        for frozen in (policy.vae, *policy.family.networks.values()):
            assert not any(p.requires_grad for p in frozen.parameters())


def test_all_networks_are_in_eval_mode(tiny_model: str) -> None:
    policy = load(tiny_model)
    assert policy.vae is not None
    for network in (policy.denoiser, policy.vae, *policy.family.networks.values()):
        assert not any(module.training for module in network.modules())


def test_initial_adapters_depend_on_the_seed_alone(tiny_model: str) -> None:
    torch.manual_seed(1)
    first = weights_digest(load(tiny_model, seed=3).trainable_state())
    torch.manual_seed(2)
    assert weights_digest(load(tiny_model, seed=3).trainable_state()) == first
    assert weights_digest(load(tiny_model, seed=4).trainable_state()) != first


def test_the_base_digest_is_the_base_models_whatever_is_trained(tiny_model: str) -> None:
    lora, full = load(tiny_model), load(tiny_model, Full(form="full"))
    plain = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    assert lora.base_digest == full.base_digest == weights_digest(plain.state_dict())


def test_a_prompts_embedding_does_not_depend_on_who_else_was_encoded(tiny_model: str) -> None:
    together, alone = load(tiny_model), load(tiny_model)
    both = together.condition(["a far longer prompt than that", *PROMPTS, ""]).text_NLE
    assert torch.equal(both[2:3], alone.condition([PROMPTS[1]]).text_NLE)
    assert torch.equal(both[3:], alone.condition([""]).text_NLE)
    assert torch.equal(together.condition(PROMPTS[::-1]).text_NLE, both[[2, 1]])


def test_embeddings_are_those_of_the_diffusers_pipeline(tiny_model: str) -> None:
    policy = load(tiny_model)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.set_progress_bar_config(disable=True)
    for prompt in (*PROMPTS, "", "a prompt that is longer than the text encoder's window of tokens"):
        theirs, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        assert torch.equal(policy.condition([prompt]).text_NLE, theirs)


def test_images_are_those_of_the_diffusers_pipeline(tiny_model: str) -> None:
    policy = load(tiny_model)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    latents = items(policy)[0]
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    theirs = pipeline.image_processor.postprocess(decoded, output_type="pil")
    assert np.array_equal(policy.decode(latents), np.stack([np.asarray(image) for image in theirs]))


def test_latents_of_images_are_those_of_the_diffusers_autoencoder_each_by_itself(tiny_model: str) -> None:
    policy = load(tiny_model)
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    side = policy.image_side
    assert side == pipeline.vae_scale_factor * pipeline.unet.config.sample_size == 16
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    mean_NCHW, std_NCHW = policy.encode(images)
    with torch.no_grad():
        theirs = pipeline.vae.encode(pipeline.image_processor.preprocess(images / 255.0).float()).latent_dist
    scale = pipeline.vae.config.scaling_factor
    torch.testing.assert_close(mean_NCHW, theirs.mean * scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std_NCHW, theirs.std * scale, rtol=1e-4, atol=1e-5)
    for number in range(3):
        alone = policy.encode(images[number][None])
        assert torch.equal(alone[0][0], mean_NCHW[number])
        assert torch.equal(alone[1][0], std_NCHW[number])


@pytest.mark.parametrize("trainable", [Lora(rank=2, alpha=2.0), Full(form="full")])
def test_weights_carry_over_to_another_process(tiny_model: str, trainable: Lora | Full) -> None:
    sender, receiver = load(tiny_model, trainable), load(tiny_model, trainable, seed=9)
    train_a_little(sender)
    receiver.load_trainable_state(unpack(pack(sender.trainable_state())))
    assert weights_digest(receiver.trainable_state()) == weights_digest(sender.trainable_state())
    assert torch.equal(predict(receiver), predict(sender))


def foreign_states(policy: Policy) -> dict[str, dict[str, Tensor]]:
    """States that must not be loaded: a tensor short, one too many, one of another shape."""
    own = {name: tensor + 1 for name, tensor in policy.trainable_state().items()}
    first, *rest = own
    return {
        "missing": {name: own[name] for name in rest},
        "extra": {**own, "unet.surplus": torch.zeros(1)},
        "reshaped": {**own, first: own[first].t()},
        "empty": {},
    }


@pytest.mark.parametrize("kind", ["missing", "extra", "reshaped", "empty"])
def test_foreign_weights_are_refused_and_nothing_is_changed(tiny_model: str, kind: str) -> None:
    policy = load(tiny_model)
    digest = weights_digest(policy.trainable_state())
    with pytest.raises(ModelError, match="weights do not fit this model"):
        policy.load_trainable_state(foreign_states(policy)[kind])
    assert weights_digest(policy.trainable_state()) == digest


def test_weights_of_another_rank_or_form_are_refused(tiny_model: str) -> None:
    policy = load(tiny_model)
    for other in (Lora(rank=4, alpha=2.0), Lora(rank=2, alpha=2.0, targets=("to_q",)), Full(form="full")):
        with pytest.raises(ModelError, match="use the recipe that the weights were trained with"):
            policy.load_trainable_state(load(tiny_model, other).trainable_state())


@pytest.mark.parametrize("alpha", [4.0, 6.0])
def test_exported_lora_gives_the_same_unet_in_a_plain_pipeline(tiny_model: str, tmp_path: Path, alpha: float) -> None:
    policy = load(tiny_model, Lora(rank=4, alpha=alpha))
    train_a_little(policy)
    policy.export(tmp_path / "export")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(tmp_path / "export")
    torch.testing.assert_close(output_of(pipeline.unet, items(policy)), predict(policy), rtol=0, atol=1e-6)


def test_an_exported_full_unet_is_the_trained_one(tiny_model: str, tmp_path: Path) -> None:
    policy = load(tiny_model, Full(form="full"))
    train_a_little(policy)
    policy.export(tmp_path / "export")
    unet = UNet2DConditionModel.from_pretrained(tmp_path / "export" / "unet")
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model, unet=unet)
    assert torch.equal(output_of(pipeline.unet, items(policy)), predict(policy))


def test_half_precision_policy_and_reference_share_their_dtype(tiny_model: str) -> None:
    policy = load(tiny_model, dtype=torch.bfloat16)
    dtypes = {p.dtype for p in (*policy.denoiser.parameters(), *policy.family.networks["text_encoder"].parameters())}
    assert dtypes == {torch.bfloat16}
    assert torch.equal(predict(policy), predict_reference(policy))
    assert predict(policy).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("force_upcast", [True, False])
def test_an_autoencoder_that_overflows_in_fp16_computes_in_fp32(
    tiny_xl_model: Path, tmp_path: Path, dtype: torch.dtype, force_upcast: bool
) -> None:
    source = shutil.copytree(tiny_xl_model, tmp_path / "model")
    config = source / "vae" / "config.json"
    assert json.loads(config.read_text())["force_upcast"]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": force_upcast}))
    policy, exact = load(str(source), dtype=dtype), load(str(source))
    upcast = dtype == torch.float16 and force_upcast
    assert policy.denoiser.dtype == dtype
    assert {p.dtype for p in policy.vae.parameters()} == {torch.float32 if upcast else dtype}
    # Beyond fp16, as activations of the real one are.
    latents = 1e5 * items(exact)[0]
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    assert np.array_equal(policy.decode(latents), exact.decode(latents)) == upcast
    assert torch.equal(policy.encode(images)[0], exact.encode(images)[0]) == upcast


def test_the_prediction_type_and_schedule_are_the_models_own(tiny_model: str, tiny_velocity_model: str) -> None:
    assert load(tiny_model).prediction_type == "epsilon"
    velocity = load(tiny_velocity_model)
    assert velocity.prediction_type == "v_prediction"
    assert velocity.schedule(Sampler(num_steps=5)).timestep_N.tolist() == [801, 601, 401, 201, 1]
    theirs = StableDiffusionPipeline.from_pretrained(tiny_model).scheduler.alphas_cumprod
    assert torch.equal(load(tiny_model).alpha_bar, theirs)


@pytest.mark.parametrize("part", ["tokenizer", "text_encoder", "unet", "vae", "scheduler"])
def test_a_model_without_one_of_its_parts_is_refused(tiny_model: str, tmp_path: Path, part: str) -> None:
    incomplete = shutil.copytree(tiny_model, tmp_path / "model")
    shutil.rmtree(incomplete / part)
    with pytest.raises(ModelError, match=f"the {part} of the base model (cannot be loaded|is missing)") as error:
        load(str(incomplete))
    assert str(incomplete) in str(error.value)
