"""Noise-conditioned perception: errors between features of the U-Net's own encoder, one denoising step further.

For an estimate e of the noise in x_tau, one step noise z for all estimates, and the frozen encoder f:

    step(x, e, z) = (x - (b/S) e)/sqrt(alpha) + sigma z
    P(e)          = mean of (f(step(x, e, z)) - f(step(x, noise, z)))^2

(NCP: Gambashidze et al., arXiv 2406.17636, Eq. 12-19). We differ from the authors' code in that the step stays in fp32:
the differences to resolve are about 1e-3 of a latent (algorithms.md 3.2). Nothing here draws noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffusion.conditioning import Conditioning
from diffusion.policy import Policy
from diffusion.schedules import noise_level
from protocol.algorithms import Perception
from protocol.errors import ModelError
from protocol.seeds import Purpose, derive_seed

Encode = Callable[[Tensor, Tensor, Conditioning], Sequence[Tensor]]
"""(states (N, C, H, W), timesteps (N,), N prompts) -> features (N, ...), one tensor a block."""

Blocks = Literal["down", "down_mid", "mid", "multi", "identity"]
Norm = Literal["none", "relative", "k2"]

EXACT = (torch.float32, torch.float64)


@dataclass(frozen=True)
class InputConstants:
    """How the encoder's input depends on N estimates: x' = state x + estimate e + sigma z, at noise level timestep_N.

    All fp64 but `timestep_N`. A worked example, the SD schedule, one step from timestep 500: timestep 499, state
    1.0024, estimate -0.00567, sigma 0.0693.
    """

    timestep_N: Tensor
    state_N: Tensor
    estimate_N: Tensor
    sigma_N: Tensor

    @property
    def k_N(self) -> Tensor:
        """|dx'/de|: identity features have k^2 times the noise's error; 0 where no estimate makes a difference."""
        return self.estimate_N.abs()


def step_constants(alpha_bar: Tensor, timestep_N: Tensor) -> InputConstants:
    """Returns the constants of one DDPM step tau -> tau - 1, with the posterior ("small") variance (Ho et al., arXiv
    2006.11239, Eq. 7, 11): state 1/sqrt(alpha), estimate -b/(sqrt(alpha) S), alpha = abar/abar', b = 1 - alpha.

    alpha_bar: (1000,) cumulative signal levels of training. There is no step from 0: it returns x for every estimate.
    """
    _check_timesteps(alpha_bar, timestep_N)
    previous_N = (timestep_N - 1).clamp(min=0)
    now_N, next_N = alpha_bar.double()[timestep_N], alpha_bar.double()[previous_N]
    alpha_N = now_N / next_N
    b_N = 1 - alpha_N
    estimate_N = -b_N / (alpha_N * (1 - now_N)).sqrt()
    return InputConstants(previous_N, alpha_N.rsqrt(), estimate_N, (b_N * (1 - next_N) / (1 - now_N)).sqrt())


def uniform_constants(alpha_bar: Tensor, timestep_N: Tensor, fresh_timestep_N: Tensor) -> InputConstants:
    """Returns the constants of re-noising x0_hat with e itself to a fresh timestep: state A'/A, estimate S' - A' S/A.

    The authors' uniform mode; they feed the clean x0_hat with a random timestep's embedding for SDXL. There is no
    step noise. At the same timestep the state comes back, whatever the estimate.
    """
    _check_timesteps(alpha_bar, timestep_N)
    _check_timesteps(alpha_bar, fresh_timestep_N)
    now, fresh = noise_level(alpha_bar, timestep_N), noise_level(alpha_bar, fresh_timestep_N)
    state_N = fresh.signal_N / now.signal_N
    estimate_N = fresh.noise_N - state_N * now.noise_N
    return InputConstants(fresh_timestep_N, state_N, estimate_N, torch.zeros_like(state_N))


@dataclass(frozen=True)
class Target:
    """What estimates of the noise in N latents are compared with; the same for policy, reference and opponent.

    Made by `perceptual_target`, used by `perceptual_error`. input_NCHW is the encoder's input but for the estimate's
    part, features are those of the true noise, one tensor a block, divisor_BN is what each block's error is divided
    by. usable_N: false where that would be 0, which `relative` makes possible; such an error is 0 and must be dropped.
    """

    constants: InputConstants
    conditioning: Conditioning
    input_NCHW: Tensor
    features: Sequence[Tensor]
    divisor_BN: Tensor
    usable_N: Tensor

    @property
    def dead_N(self) -> Tensor:
        """True where no estimate makes a difference (timestep 0): the error is 0, and so is its gradient."""
        return self.constants.estimate_N == 0


@torch.no_grad()
def perceptual_target(
    state_NCHW: Tensor,
    noise_NCHW: Tensor,
    step_noise_NCHW: Tensor,
    conditioning: Conditioning,
    constants: InputConstants,
    encode: Encode,
    *,
    norm: Norm,
) -> Target:
    """Returns what estimates of `noise_NCHW`, the noise in N noised latents, are compared with; without a graph.

    Latents are fp32 (or fp64). `step_noise_NCHW` is z, one for all estimates of an item; a pair's members share it as
    well, which is for the caller. It does not count where sigma is 0. Raises ValueError for other dtypes, shapes that
    do not fit, and non-finite numbers.
    """
    for name, latent_NCHW in (("state", state_NCHW), ("noise", noise_NCHW), ("step noise", step_noise_NCHW)):
        _check_latent(name, latent_NCHW, state_NCHW.shape, constants)
        if not bool(torch.isfinite(latent_NCHW).all()):
            raise ValueError(f"a perceptual error was asked of a non-finite {name}")
    input_NCHW = (
        _spread(constants.state_N, state_NCHW) * state_NCHW + _spread(constants.sigma_N, state_NCHW) * step_noise_NCHW
    )
    features = encode(_with_estimate(input_NCHW, noise_NCHW, constants), constants.timestep_N, conditioning)
    divisor_BN = torch.stack([_divisor(feature, constants, norm) for feature in features])
    safe_BN = torch.where(divisor_BN > 0, divisor_BN, 1.0)
    return Target(constants, conditioning, input_NCHW, features, safe_BN, (divisor_BN > 0).all(0))


def perceptual_error(estimate_NCHW: Tensor, target: Target, encode: Encode) -> Tensor:
    """Returns the error of N noise estimates, (N,) fp32 (fp64 latents' stays fp64): each block's mean over feature
    entries, averaged over blocks. Differentiable in `estimate_NCHW`, through the input of `encode`.

    `estimate_NCHW` is the network's prediction, as epsilon, for the target's states. 0 with zero gradient for dead
    and unusable items. Raises ValueError for a half-precision estimate or one that does not fit, and where the
    encoder cut the graph of an estimate that has one: training would stop and say nothing.
    """
    _check_latent("estimate", estimate_NCHW, target.input_NCHW.shape, target.constants)
    input_NCHW = _with_estimate(target.input_NCHW, estimate_NCHW, target.constants)
    features = encode(input_NCHW, target.constants.timestep_N, target.conditioning)
    error_BN = torch.stack(
        [(own - true).square().flatten(1).mean(1) for own, true in zip(features, target.features, strict=True)]
    )
    if estimate_NCHW.requires_grad and not error_BN.requires_grad:
        raise ValueError("the estimate has a graph, but its features have none: no gradient would reach the network")
    counts_N = target.usable_N & ~target.dead_N
    return torch.where(counts_N, (error_BN / target.divisor_BN).mean(0), 0.0)


class Encoder:
    """f of the equations: a U-Net's down (and middle) blocks as a function of their input alone.

    They are the model's own, shared with whoever trains them, and no up block is run. `num_forward` counts latents
    encoded so far (`cost/encoder_forward`). Weights get no gradient: while a graph is made none requires any, so that
    autograd takes them for constants, whatever they are switched to afterwards.

    With ZeRO-3 blocks are called beside the engine, not through it: DeepSpeed's hooks sit on every submodule and
    gather what it needs. Every rank must make the same calls in the same order, as for the engine itself.
    """

    def __init__(self, stack: EncoderStack, blocks: Blocks, weights: Callable[[], AbstractContextManager[Any]]) -> None:
        """`weights()` is entered around every call and puts the weights in force. Raises ModelError for blocks in half
        precision."""
        dtypes = {parameter.dtype for parameter in stack.parameters()}
        if not dtypes <= set(EXACT):
            raise ModelError(
                "the perceptual encoder must compute in fp32: half precision rounds away what it is to tell apart",
                value=", ".join(map(str, dtypes)),
                do="set learner.precision: fp32",
            )
        self._stack, self._blocks, self._weights = stack, blocks, weights
        self.num_forward = 0

    def __call__(self, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning) -> Sequence[Tensor]:
        """Returns the features of N states, one tensor a block; `identity` gives back the states."""
        if self._blocks == "identity":
            return [state_NCHW]
        self.num_forward += len(state_NCHW)
        with self._weights(), _constant(self._stack):
            return self._stack.features(state_NCHW, timestep_N, conditioning, self._blocks)


class EncoderStack(nn.Module):
    """The part of a U-Net of diffusers that encodes: its modules, not copies."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.conv_in, self.time_proj, self.time_embedding = unet.conv_in, unet.time_proj, unet.time_embedding
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        # Of Stable Diffusion XL, which is told the pooled prompt and the image's size too.
        self.add_time_proj, self.add_embedding = (
            getattr(unet, "add_time_proj", None),
            getattr(unet, "add_embedding", None),
        )

    def features(
        self, state_NCHW: Tensor, timestep_N: Tensor, conditioning: Conditioning, blocks: Blocks
    ) -> Sequence[Tensor]:
        """Returns hidden states after blocks, as `UNet2DConditionModel.forward` computes them."""
        time_NE = self.time_embedding(self.time_proj(timestep_N).to(state_NCHW.dtype))
        if conditioning.pooled_NP is not None and conditioning.size_N6 is not None:
            assert self.add_time_proj is not None, "a network that is told a size has layers for it"
            assert self.add_embedding is not None
            sizes_NE = self.add_time_proj(conditioning.size_N6.flatten()).view(len(conditioning), -1)
            told_NE = torch.cat([conditioning.pooled_NP, sizes_NE.to(conditioning.pooled_NP.dtype)], dim=1)
            time_NE = time_NE + self.add_embedding(told_NE.to(time_NE.dtype))
        hidden_NCHW, down = self.conv_in(state_NCHW), []
        for block in self.down_blocks:
            hidden_NCHW, _ = _call(block, hidden_NCHW, time_NE, conditioning.text_NLE)
            down.append(hidden_NCHW)
        if blocks == "down":
            return down[-1:]
        middle_NCHW = _call(self.mid_block, hidden_NCHW, time_NE, conditioning.text_NLE)
        if blocks == "mid":
            return [middle_NCHW]
        return [*(down if blocks == "multi" else down[-1:]), middle_NCHW]


def make_encoder(policy: Policy, settings: Perception, seed: int) -> Encoder:
    """Returns the encoder that the settings ask for; `seed` is the run's, for random weights.

    `frozen_base` is the policy's reference: its U-Net with adapters off, or the copy that `keep_reference` made for
    full fine-tuning. `ema` is the network that `keep_average` made, whose weights the caller keeps up to date. `live`
    is its U-Net with adapters on, also where the caller has switched them off. `random_init` is as diffusers
    initialises such a U-Net, of which only the encoder is kept. Raises ModelError in half precision.
    """
    if settings.encoder_weights == "frozen_base":
        with policy.reference(policy.denoiser) as base:
            stack = EncoderStack(base)
        return Encoder(stack, settings.blocks, lambda: policy.reference(policy.denoiser))
    if settings.encoder_weights == "live":
        return Encoder(EncoderStack(policy.denoiser), settings.blocks, lambda: policy.adapters(enabled=True))
    if settings.encoder_weights == "ema":
        assert policy.average_denoiser is not None, "keep_average makes the network of the average"
        return Encoder(EncoderStack(policy.average_denoiser), settings.blocks, nullcontext)
    return Encoder(_random_stack(policy, seed), settings.blocks, nullcontext)


def _random_stack(policy: Policy, seed: int) -> EncoderStack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, Purpose.ENCODER_INIT))
        unet = policy.denoiser.from_config(policy.denoiser.config)
    return EncoderStack(unet).to(policy.device, policy.dtype).eval().requires_grad_(False)


def _call(block: Any, hidden_NCHW: Tensor, time_NE: Tensor, text_NLE: Tensor) -> Any:
    if getattr(block, "has_cross_attention", False):
        return block(hidden_NCHW, time_NE, encoder_hidden_states=text_NLE)
    return block(hidden_NCHW, time_NE)


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Within it no parameter requires a gradient."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _with_estimate(input_NCHW: Tensor, estimate_NCHW: Tensor, constants: InputConstants) -> Tensor:
    return input_NCHW + _spread(constants.estimate_N, input_NCHW) * estimate_NCHW.to(input_NCHW.dtype)


def _divisor(feature_NV: Tensor, constants: InputConstants, norm: Norm) -> Tensor:
    """Returns what a block's error is divided by, (N,); 0 only for features that are all 0, under `relative`."""
    if norm == "relative":
        return feature_NV.square().flatten(1).mean(1)
    if norm == "k2":
        # A dead item's error is 0 by itself.
        return torch.where(constants.estimate_N == 0, 1.0, constants.k_N.square()).to(feature_NV.dtype)
    return torch.ones_like(feature_NV.flatten(1)[:, 0])


def _spread(value_N: Tensor, like_NCHW: Tensor) -> Tensor:
    return value_N.to(like_NCHW.dtype)[:, None, None, None]


def _check_timesteps(alpha_bar: Tensor, timestep_N: Tensor) -> None:
    if not bool(((timestep_N >= 0) & (timestep_N < len(alpha_bar))).all()):
        raise ValueError(f"timesteps must be from 0 to {len(alpha_bar) - 1}, but are {timestep_N.tolist()}")


def _check_latent(name: str, latent_NCHW: Tensor, shape: torch.Size, constants: InputConstants) -> None:
    if latent_NCHW.dtype not in EXACT:
        raise ValueError(f"the denoising step of a perceptual error is fp32, but the {name} is {latent_NCHW.dtype}")
    if latent_NCHW.shape != shape or len(shape) != 4 or len(constants.state_N) != shape[0]:
        raise ValueError(
            f"{len(constants.state_N)} items need latents (N, C, H, W) of one shape, but the {name} is "
            f"{tuple(latent_NCHW.shape)} beside {tuple(shape)}"
        )
